"""The page's numbers of a tiny model, worked out again from its weights."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.kernels.roofline import read_bandwidth
from tests.helpers import finequant
from tests.report.page_parser import Page

GROUP, SCALE_BYTES, ROWS = 32, 2, 3
NAMES = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 160, bias=False)
        self.down = nn.Linear(160, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).sin())


class Tower(nn.Module):
    """Two blocks, then a matrix so small that it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(), Block())
        self.small = nn.Linear(64, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.layers(x))


@pytest.fixture
def model() -> Tower:
    return Tower().half().eval()


@pytest.fixture
def page(model: Tower, tmp_path: Path) -> Page:
    with torch.no_grad():
        x = torch.randn(ROWS, 64, dtype=torch.float16)
        options = {"granularity": GROUP, "min_elements": 1024, "debug_dir": str(tmp_path)}
        finequant(model, **options)(x)
    (path,) = tmp_path.glob("*/report.html")
    return Page(path.read_text(encoding="utf-8"))


def packed_bytes(weight: Tensor) -> int:
    n, k = weight.shape
    return n * k // 2 + n * math.ceil(k / GROUP) * SCALE_BYTES


def weights(model: nn.Module) -> list[Tensor]:
    return [model.get_parameter(f"{name}.weight").detach() for name in NAMES]


def errors(model: nn.Module) -> list[float]:
    """By putting what was delivered into a copy of the model in double precision."""
    delivered = fqcompile.fake_quantize_(copy.deepcopy(model).double(), fqcompile.reports()[-1])
    pairs = zip(weights(model), weights(delivered), strict=True)
    return [float((w.double() - d).norm() / w.double().norm()) for w, d in pairs]


def test_facts_are_those_of_the_weights(model: Tower, page: Page) -> None:
    before = 2 * sum(p.numel() for p in model.parameters())
    small = 2 * model.small.weight.numel()
    after = sum(map(packed_bytes, weights(model)))
    count = sum(w.numel() for w in weights(model))
    assert page.facts["sites quantized"] == "4 of 5"
    times = f"{before / (after + small):.1f}"
    sizes = f"{before / 2**20:.2f} → {(after + small) / 2**20:.2f} MiB"
    assert page.facts[f"of weights, {times} times smaller"] == sizes
    assert page.facts["bits per quantized weight"] == f"{8 * after / count:.2f}"
    mean = sum(errors(model)) / 4
    assert float(page.facts["mean relative error"]) == pytest.approx(mean, abs=2e-4)


def test_points_and_rows_have_the_error_that_was_delivered(model: Tower, page: Page) -> None:
    for at, (name, error) in enumerate(zip(NAMES, errors(model), strict=True)):
        titles = [title.split("\n") for title in page.titles if title.startswith(name)]
        assert len(titles) == 2, "one point in each plot"
        for title in titles:
            said, bits = title[1].removeprefix("error ").split(", normal4 32, ")
            assert float(said) == pytest.approx(error, abs=2e-4)
            weight = weights(model)[at]
            exact = 8 * packed_bytes(weight) / weight.numel()
            assert bits == f"{exact:.2f} bits per weight"
        row = next(row for row in page.rows["sites"] if row[0] == f"{name}.weight")
        assert float(row[7]) == pytest.approx(error, abs=2e-4)


def test_roles_add_up_their_layers(model: Tower, page: Page) -> None:
    up, down = weights(model)[0], weights(model)[1]
    expected = [
        [
            role,
            "2",
            f"{2 * 2 * w.numel() / 2**20:.2f}",
            f"{2 * packed_bytes(w) / 2**20:.2f}",
            f"{8 * packed_bytes(w) / w.numel():.2f}",
            "",
        ]
        for role, w in (("up", up), ("down", down))
    ]
    assert page.rows["sizes"][:2] == expected
    assert page.rows["sizes"][2][:2] == ["small", "1"]


def test_kernels_have_the_time_that_their_bytes_take(model: Tower, page: Page) -> None:
    activations = sum(2 * ROWS * sum(w.shape) for w in weights(model))
    moved = sum(map(packed_bytes, weights(model))) + activations
    assert sum(int(row[1]) for row in page.rows["kernels"]) == 4
    told = sum(float(row[3]) for row in page.rows["kernels"])
    assert told == pytest.approx(1e6 * moved / read_bandwidth(), abs=0.06)


def test_what_was_kept_is_there_with_its_reason(model: Tower, page: Page) -> None:
    (summary,) = [s for s in page.summaries if s.startswith("1 site,")]
    assert "elements" in summary
    assert page.rows["granularity-map"] and len(page.rows["granularity-map"]) == 2
    assert [row[0] for row in page.rows["granularity-map"]] == ["normal4 g32"] * 2
