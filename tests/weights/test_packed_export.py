"""Exported programs of packed weights: decomposed in full or in part, they compute the same."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqcompile
from tests.helpers import assert_close, finequant, report

D = 128
MATMUL, DEQUANTIZE = "fqcompile.matmul.inference", "fqcompile.dequantize.default"


class Reads(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(D, D), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer.weight)


class Experts(nn.Module):
    is_transposed = False

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, D, D) / 8, requires_grad=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.experts)


# What reads the weight, and the operator that does in the program.
WHOLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "einsum": (lambda: Reads(lambda x, w: torch.einsum("bk,nk->bn", x, w)), DEQUANTIZE),
    "a view": (
        lambda: Reads(lambda x, w: torch.einsum("bk,hdk->bhd", x, w.view(8, 16, D)[:, :8])),
        DEQUANTIZE,
    ),
    "tensordot": (lambda: Reads(lambda x, w: torch.tensordot(x, w, ([1], [1]))), MATMUL),
    "inner": (lambda: Reads(torch.inner), MATMUL),
    "w @ x.T": (lambda: Reads(lambda x, w: w @ x.T), DEQUANTIZE),
    "columns": (lambda: Reads(lambda x, w: F.linear(x[:, :70], w[:, :70])), DEQUANTIZE),
    "double": (lambda: Reads(lambda x, w: F.linear(x.double(), w.double()).float()), DEQUANTIZE),
    "cdist": (lambda: Reads(torch.cdist), DEQUANTIZE),
    "conv1d": (lambda: Reads(lambda x, w: F.conv1d(x[..., None], w[..., None])), DEQUANTIZE),
    "LSTM cell": (lambda: Cell(nn.LSTMCell(D, D)), MATMUL),
    "GRU cell": (lambda: Cell(nn.GRUCell(D, D)), MATMUL),
    "experts by einsum": (
        lambda: Experts(lambda x, w: torch.einsum("bk,enk->ben", x, w)),
        DEQUANTIZE,
    ),
    "all experts": (lambda: Experts(lambda x, w: x @ w.mT), MATMUL),
    "some experts": (lambda: Experts(lambda x, w: x[:, None] @ w[[2, 0, 2]].mT), MATMUL),
}


class Cell(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("name", WHOLE)
def test_operators_that_would_stay_whole_are_decomposed_where_they_read_a_packed_weight(
    name: str,
) -> None:
    """An empty table asks composite operators to stay, which takes plain tensors."""
    torch.manual_seed(0)
    make, reader = WHOLE[name]
    model, x = make(), torch.randn(3, D)
    dense = copy.deepcopy(model)
    fqcompile.fake_quantize_(dense, fqcompile.quantize_(model, calibration=None, min_elements=1024))
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions({})
        assert_close(program.module()(x), dense(x), k=D, depth=2)
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert {n for n in called if n.startswith("fqcompile.")} == {reader}


# What reads rows of the weight that are no whole blocks of the kernel's layout.
ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "slices": lambda x, w: torch.cat([F.linear(x, w[:200]), F.linear(x, w[200:])], -1),
    "chunk": lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(3)], -1),
    "split": lambda x, w: torch.cat([F.linear(x, part) for part in w.split([90, 90, 120])], -1),
    "cat": lambda x, w: F.linear(x, torch.cat([w[200:], w[:200]])),
}


@pytest.mark.parametrize("how", ["finequant", "aot_eager", "export", "decomposed"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_cut_a_block_are_packed_again_in_the_graph(name: str, how: str) -> None:
    model, x = Reads(ROWS[name]), torch.randn(3, D)
    model.layer = nn.Linear(D, 300)
    assert_rows_are_packed_again(model, x, how)


@pytest.mark.parametrize("how", ["finequant", "aot_eager", "decomposed"])
def test_so_are_rows_that_several_threads_would_pack(how: str) -> None:
    """Threads other than the one that traces do not know its tensors."""
    model, x = Reads(lambda x, w: F.linear(x, w[:650])), torch.randn(3, 8192)
    model.layer = nn.Linear(8192, 700)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_rows_are_packed_again(model, x, how)
    finally:
        torch.set_num_threads(before)


def assert_rows_are_packed_again(model: nn.Module, x: Tensor, how: str) -> None:
    dense = copy.deepcopy(model)
    fqcompile.fake_quantize_(dense, fqcompile.quantize_(model, calibration=None, min_elements=1024))
    with torch.no_grad():
        if how in ("export", "decomposed"):
            program = torch.export.export(model, (x,))
            program = program.run_decompositions({}) if how == "decomposed" else program
            actual = program.module()(x)
        elif how == "finequant":
            actual = finequant(model, min_elements=1024)(x)
            assert not report().warnings and report().plan.quantized
        else:
            actual = torch.compile(model, backend=how, fullgraph=True)(x)
        assert_close(actual, dense(x), k=x.shape[1])
