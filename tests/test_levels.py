"""Normal levels through the package: what is not said of a format elsewhere holds for them too."""

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.checkpoint.manifest import MANIFEST, read_manifest
from fqcompile.config import FineQuantConfig
from fqcompile.errors import OptionError
from fqcompile.modules.weights import module_weights
from fqcompile.weights.parameter import PackedWeight, rebuild_packed_weight
from tests.checkpoint.small_models import Small, contents
from tests.helpers import InnerGraphs, Mlp, assert_close, finequant, frozen, oracle, report

# In sixteenths, of codes -8 to 7.
NORMAL_LEVELS = [-127, -97, -76, -60, -46, -33, -21, -10, 0, 11, 23, 36, 50, 66, 87, 117]
LEVELS = {"normal": [n / 16 for n in NORMAL_LEVELS], "uniform": [*range(-8, 8)]}
G32: dict[str, Any] = {"granularity": 32, "min_elements": 0}


def values_of(w: PackedWeight) -> Tensor:
    """ŵ [N, K] in float64, from the plain codes and scales alone; K is even."""
    packed = w.quantized()
    codes = torch.stack([packed.qweight & 15, packed.qweight >> 4], -1).flatten(1)
    levels = torch.tensor(LEVELS[packed.format.levels], dtype=torch.float64)[codes.long()]
    groups = torch.arange(codes.shape[1]) // packed.group_size
    return levels * packed.scale.double()[:, groups]


def weights_of(model: nn.Module) -> dict[str, PackedWeight]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, PackedWeight)}


@pytest.mark.parametrize("given", [{}, {"levels": "normal"}, {"levels": "uniform"}], ids=str)
def test_a_plan_tells_levels_and_the_model_has_them(given: dict[str, Any]) -> None:
    levels = given.get("levels", "normal")
    model = frozen(Mlp())
    dense = copy.deepcopy(model)
    plan = fqcompile.quantize_(model, **G32, **given)
    assert {site.levels for site in plan.quantized} == {levels}
    assert {row["levels"] for row in json.loads(plan.to_json())["sites"]} == {levels}
    assert ("normal4" in str(plan), "int4" in str(plan)) == (levels == "normal", levels != "normal")
    for name, w in weights_of(model).items():
        w_hat, exact = values_of(w), dense.get_parameter(name).double()
        assert torch.equal(w.dequantized().double(), w_hat.float().double())
        error = next(site.relative_error for site in plan.sites if site.name == name)
        assert ((w_hat - exact).norm() / exact.norm()).item() == pytest.approx(error, rel=1e-6)
    x = torch.randn(3, 128)
    assert_close(model(x), fqcompile.fake_quantize_(dense, plan)(x), depth=2)


def test_heads_and_overrides_have_their_own() -> None:
    model = nn.ModuleDict(
        {"lm_head": nn.Linear(64, 64), "a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}
    )
    plan = fqcompile.quantize_(frozen(model), **G32, overrides={"^b": {"levels": "uniform"}})
    found = {site.name: (site.bits, site.levels) for site in plan.sites}
    assert found["lm_head.weight"] == (8, "uniform")
    assert (found["a.weight"], found["b.weight"]) == ((4, "normal"), (4, "uniform"))


def test_an_error_budget_goes_on_to_8_bits_which_are_uniform() -> None:
    plan = fqcompile.quantize_(frozen(Mlp()), **G32, error_budget=0.02)
    assert {(site.bits, site.levels) for site in plan.sites} == {(8, "uniform")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "levels": "normal"}, "levels is 'normal', and bits are 8.* drop levels"),
        ({"overrides": {"a": {"bits": 8, "levels": "normal"}}}, r"overrides\['a'\]\.levels is"),
        ({"bits": 8, "overrides": {"a": {"levels": "normal"}}}, r"overrides\['a'\]\.levels is"),
        ({"levels": "Normal"}, "did you mean 'normal'"),
        ({"levels": 4}, r"levels is 4 \(int\); allowed: 'normal', 'uniform'"),
    ],
    ids=str,
)
def test_levels_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FineQuantConfig.from_options(options)


def test_levels_of_other_bits_are_no_contradiction() -> None:
    config = FineQuantConfig(bits=8, overrides={"a": {"bits": 4}, "b": {"levels": "uniform"}})
    assert config.site_options("a").levels == "normal"
    FineQuantConfig(levels="normal", overrides={"a": {"bits": 8}})


class Siblings(nn.Module):
    """Two layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize("differ", [False, True])
def test_siblings_are_joined_where_levels_are_equal(
    inner_graphs: InnerGraphs, differ: bool
) -> None:
    model, x = frozen(Siblings()), torch.randn(5, 64)
    overrides = {"^b": {"levels": "uniform"}} if differ else {}
    results = finequant(model, inner_backend="fqtest_spy", **G32, overrides=overrides)(x)
    assert len(inner_graphs.linears()) == (2 if differ else 1)
    assert {s.name: s.levels for s in report().plan.sites} == {
        "a.weight": "normal", "b.weight": "uniform" if differ else "normal",
    }  # fmt: skip
    for got, want in zip(results, oracle(model)(x), strict=True):
        assert_close(got, want)


def test_packed_rows_of_other_levels_are_dequantized_before_they_are_joined() -> None:
    model = frozen(Siblings())
    fqcompile.quantize_(model, **G32, overrides={"^b": {"levels": "uniform"}})
    joined = torch.cat([model.a.weight, model.b.weight])
    assert not isinstance(joined, PackedWeight)
    expected = torch.cat([values_of(w) for w in weights_of(model).values()])
    assert torch.equal(joined.double(), expected.float().double())


def test_gradients_flow_through_the_levels() -> None:
    model, x = frozen(Mlp()), torch.randn(4, 128, requires_grad=True)
    compiled, exact = finequant(model, **G32), x.detach().clone().requires_grad_(True)
    compiled(x).square().sum().backward()
    oracle(model)(exact).square().sum().backward()
    assert x.grad is not None and exact.grad is not None
    assert_close(x.grad, exact.grad, depth=4)


def test_pickles_and_saved_tensors_keep_levels() -> None:
    model = frozen(Mlp())
    fqcompile.quantize_(model, **G32)
    for w in weights_of(model).values():
        file = io.BytesIO()
        torch.save(w, file)
        file.seek(0)
        for same in (pickle.loads(pickle.dumps(w)), torch.load(file), copy.deepcopy(w), w.clone()):
            assert same.format == w.format and torch.equal(values_of(same), values_of(w))


def test_pickles_of_earlier_versions_are_uniform() -> None:
    model = frozen(Mlp())
    fqcompile.quantize_(model, **G32, levels="uniform")
    w = model.up.weight
    make, (*parts, levels) = w.__reduce_ex__(2)
    assert make is rebuild_packed_weight and levels == "uniform"
    assert torch.equal(values_of(make(*parts)), values_of(w))


def test_a_directory_keeps_levels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = frozen(Small())
    plan = fqcompile.quantize_(model, min_elements=4096, overrides={"down": {"levels": "uniform"}})
    fqcompile.save(model, tmp_path / "d", plan=plan)
    assert json.loads((tmp_path / "d" / MANIFEST).read_text())["version"] == 4
    packed = read_manifest(tmp_path / "d").packed
    assert {n: r.levels for n, r in packed.items()} == {
        "up.weight": "normal",
        "down.weight": "uniform",
    }
    loaded = fqcompile.load(Small, tmp_path / "d")
    assert contents(loaded) == contents(model)
    for name, w in weights_of(loaded).items():
        assert w.format == weights_of(model)[name].format
        assert torch.equal(values_of(w), values_of(weights_of(model)[name]))


def test_experts_have_them_one_by_one() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 32, 64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.w.transpose(1, 2))

    model, x = Experts(), torch.randn(3, 5, 64)
    y = finequant(model, **G32)(x)
    (site,) = report().plan.sites
    assert (site.kind, site.levels) == ("experts", "normal")
    assert_close(y, oracle(model)(x))


def test_the_weights_of_a_config_that_asks_for_nothing_are_normal() -> None:
    config = FineQuantConfig.from_options({"min_elements": 0})
    for weight in module_weights(frozen(Mlp()), config):
        assert config.site_options(weight.name, head=weight.head).levels == "normal"
