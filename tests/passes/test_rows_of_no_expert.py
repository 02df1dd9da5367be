"""Rows beyond the last offset: zeros from transformers' fallback, whatever is fused behind it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines the operator)
from torch import Tensor

import fqcompile

E, N, K, ROWS = 3, 64, 64, 9
GENERATOR = torch.Generator().manual_seed(0)
GATE, UP = (torch.randn(E, K, N, generator=GENERATOR) / K**0.5 for _ in range(2))
OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)


def product(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, w, offsets)


PROGRAMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alone": lambda x, o: product(x, GATE, o),
    "activation": lambda x, o: F.gelu(product(x, GATE, o)),
    "gated": lambda x, o: F.silu(product(x, GATE, o)) * product(x, UP, o),
    "siblings": lambda x, o: product(x, GATE, o).sin() + product(x, UP, o),
    "scaled": lambda x, o: product(x, GATE, o) * 3 + 1,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_rows_of_no_expert_are_those_of_eager(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PROGRAMS[name]
    options = {"inner_backend": "eager", "min_elements": 1, "bits": 8}
    compiled = torch.compile(lambda x, o: forward(x, o), backend="finequant", options=options)
    x = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(1))
    x[5:] = torch.nan
    with torch.no_grad():
        compiled(x, OFFSETS)
        monkeypatch.setattr(Tensor, "new_empty", lambda t, *s, **k: t.new_full(s, 7.0, **k))
        got = compiled(x, OFFSETS)
        monkeypatch.undo()
        want = forward(x.nan_to_num(), OFFSETS)
    assert fqcompile.reports()[-1].plan.totals.quantized >= 1
    assert torch.equal(got[5:], want[5:])
    # int8 moves a sum by at most s/2 a weight, s = max|w| / 127: far below one hundredth here.
    assert (got[:5] - want[:5]).norm() <= 0.02 * want[:5].norm()
