"""A kernel that does not build is replaced once, aloud; other errors are the caller's."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fqcompile.errors import KernelBuildError
from fqcompile.kernels import registry
from fqcompile.kernels import run as run_module
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.registry import every_step_built
from fqcompile.kernels.run import dequantize_weight, run_matmul
from fqcompile.kernels.spec import DENSE, LaunchTable, TileConfig
from fqcompile.kernels.template import PLAIN, Layout, Routing, Template
from fqcompile.tensor.codes import pack
from fqcompile.tensor.format import INT4, Format
from fqcompile.tensor.quantized import QuantizedTensor

CODES = torch.randint(-8, 8, (6, 10), dtype=torch.int8)
WEIGHT = QuantizedTensor(pack(CODES, INT4), torch.full((6, 1), 0.5), Format(4, 10, 6, 10))
X = torch.randn(3, 10)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`install(error)`: a kernel "broken" that raises it, in the plain layout or one given."""
    monkeypatch.setattr(run_module, "BROKEN", {})

    def install(error: Exception, layout: Layout | None = None) -> None:
        def fails(*_: Any) -> torch.Tensor:
            raise error

        like = registry.TEMPLATES["dequantize"]
        broken: Template = replace(like, name="broken", run=fails, layout=layout or like.layout)
        monkeypatch.setitem(registry.TEMPLATES, "broken", broken)
        registry.parse_kernel.cache_clear()

    yield install
    registry.parse_kernel.cache_clear()


def run(**changes: Any) -> torch.Tensor:
    return run_matmul(X, WEIGHT, None, Epilogue(**changes), "broken")


def test_the_plain_way_gives_the_value_and_one_warning(
    install: Any, caplog: pytest.LogCaptureFixture
) -> None:
    install(KernelBuildError("out of shared memory"))
    residual, bias = torch.randn(3, 6), torch.randn(6)
    with caplog.at_level("WARNING", "fqcompile"):
        for _ in range(3):
            got = run(bias=bias, residual=residual, activation="relu")
    expected = torch.relu(X @ (0.5 * CODES.float()).t() + bias) + residual
    torch.testing.assert_close(got, expected, rtol=0, atol=10 * 10 * 2.0**-24)
    (record,) = caplog.records
    assert "kernel broken does not build here: out of shared memory" in record.getMessage()
    run(activation="gelu")  # another kernel
    assert len(run_module.BROKEN) == 2


def test_the_oldest_of_many_that_did_not_build_are_forgotten(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_MOST_BROKEN", 2)
    install(KernelBuildError("out of shared memory"))
    for activation in ("none", "relu", "gelu", "silu"):
        run(activation=activation)
    assert [key[-2] for key in run_module.BROKEN] == ["gelu", "silu"]


def test_any_other_error_is_not_hidden(install: Any) -> None:
    install(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run()


def test_a_layout_that_cannot_be_dequantized_has_no_other_way(install: Any) -> None:
    install(KernelBuildError("no compiler"), Layout("odd", PLAIN.pack_matrix, PLAIN.shapes))
    with pytest.raises(KernelBuildError, match="no compiler"):
        run()
    with pytest.raises(KernelBuildError, match="layout 'odd' cannot be dequantized"):
        dequantize_weight(WEIGHT, torch.float32, "broken")


SHORT, TALL = TileConfig(16, 64, 128), TileConfig(128, 64, 128)
STEPPED = f"stepped:{LaunchTable(((16, SHORT), (128, TALL), (None, DENSE)))}"
Ran = list[tuple[object, int]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ran]:
    """What "stepped", of which TALL does not build, was run with: configurations, rows."""
    found: Ran = []

    def run(x: Any, weight: Any, routing: Any, epilogue: Any, config: Any) -> torch.Tensor:
        found.append((config, x.shape[0]))
        assert routing is None or routing.ids.shape == x.shape[:1]
        if config == TALL:
            raise KernelBuildError("out of registers")
        return x.new_zeros(x.shape[0], 6)

    stepped = replace(registry.TEMPLATES["dequantize"], name="stepped", run=run)
    monkeypatch.setitem(registry.TEMPLATES, "stepped", stepped)
    registry.parse_kernel.cache_clear()
    yield found
    registry.parse_kernel.cache_clear()


def test_warming_up_builds_the_kernels_of_all_numbers_of_rows(ran: Ran) -> None:
    linear = partial(run_matmul, X, WEIGHT, None, Epilogue(), STEPPED)
    linear()
    assert ran == [(SHORT, 3)]
    with every_step_built():
        linear()
    assert ran[1:] == [(SHORT, 3), (TALL, 3), (DENSE, 3), (SHORT, 3)]
    linear()
    assert ran[5:] == [(SHORT, 3)]


@pytest.mark.parametrize("rows", [1, 200])
def test_warming_up_builds_those_of_sorted_and_of_other_rows(ran: Ran, rows: int) -> None:
    """Of 25 experts 51 rows are sorted; the second step has more and less."""
    stack = QuantizedTensor(
        WEIGHT.qweight.expand(25, -1, -1),
        WEIGHT.scale.expand(25, -1, -1),
        replace(WEIGHT.format, experts=25),
    )
    routing = Routing(ids=torch.arange(rows) % 25)
    with every_step_built():
        run_matmul(torch.randn(rows, 10), stack, routing, Epilogue(), STEPPED)
    assert ran[:-1] == [(SHORT, 1), (SHORT, 16), (TALL, 17), (TALL, 51), (DENSE, 51)]


def test_a_cuda_graph_has_each_kernel_once(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(), every_step_built():
        run_matmul(torch.empty(3, 10, device="cuda"), WEIGHT, None, Epilogue(), STEPPED)
    assert ran == [(SHORT, 3)]
