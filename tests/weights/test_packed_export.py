"""Exported programs of packed weights: decomposed in full or in part, they compute the same."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqcompile
from tests.helpers import assert_close

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
