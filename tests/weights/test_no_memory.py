"""Who asks a packed weight or a view of one for its memory is told, and nothing is read there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fqcompile.errors import FineQuantError
from tests.weights.test_packed_writes import make

SHAPE = (4, 8)
ASKING: dict[str, Callable[[Tensor], Any]] = {
    "apply_": lambda w: w.apply_(lambda _: 0.0),
    "map_": lambda w: w.map_(torch.zeros(w.shape), lambda *_: 0.0),
    "map2_": lambda w: w.map2_(torch.zeros(w.shape), torch.zeros(w.shape), lambda *_: 0.0),  # type: ignore[attr-defined]
    "storage": lambda w: w.storage().fill_(0),
    "_typed_storage": lambda w: w._typed_storage().fill_(0),
    "from_dlpack": torch.from_dlpack,
    "to_dlpack": torch.utils.dlpack.to_dlpack,
}


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.data, lambda w: w.view(-1)])
@pytest.mark.parametrize("ask", ASKING)
def test_memory_is_refused(ask: str, view: Callable[[Tensor], Tensor]) -> None:
    """`to_dlpack` is a function in C, which nothing intercepts: the storage itself refuses it."""
    w = make(SHAPE)
    before = w.dequantize()
    error: type[Exception] = RuntimeError if ask == "to_dlpack" else FineQuantError
    with pytest.raises(error, match=r"data pointer|has no memory of its own"):
        ASKING[ask](view(w))
    assert torch.equal(w.dequantize(), before)
