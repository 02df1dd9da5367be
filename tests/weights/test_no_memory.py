"""Who asks a packed weight or a view of one for its memory is told, and nothing is read there."""

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.errors import FineQuantError
from fqcompile.weights.parameter import PackedWeight
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


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def _packed_model() -> tuple[nn.Module, Tensor, Tensor]:
    """With x, and what its dequantized weights make of x; up to rounding of sums of 256 terms."""
    torch.manual_seed(0)
    model, x = _Twice().eval().requires_grad_(False), torch.randn(4, 256)
    fqcompile.quantize_(model)
    dense = fqcompile.restore(copy.deepcopy(model))
    return model, x, dense(x)


RECORDING: dict[str, Callable[[nn.Module, Tensor, Path], Any]] = {
    "trace": lambda model, x, _: torch.jit.trace(model, x),
    "trace_module": lambda model, x, _: torch.jit.trace_module(model, {"forward": x}),
    "onnx": lambda model, x, path: torch.onnx.export(model, (x,), path, dynamo=False),
}


@pytest.mark.parametrize("record", RECORDING)
def test_what_would_save_dense_memory_is_refused_when_it_records(
    record: str, tmp_path: Path
) -> None:
    model, x, expected = _packed_model()
    with pytest.raises(FineQuantError, match=r"first\.weight.*fqcompile\.restore\(model\)"):
        RECORDING[record](model, x, tmp_path / "model")
    torch.testing.assert_close(model(x), expected)
    torch.jit.save(torch.jit.trace(fqcompile.restore(model), x), tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), expected)


# PyTorch compiles these without a call that a tensor could answer: its storage itself refuses.
SCRIPTED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "module": lambda model, x: torch.jit.script(model),
    "frozen": lambda model, x: torch.jit.freeze(torch.jit.script(model)),
    "function": lambda model, x: torch.jit.trace(lambda x: model(x), x),
}


@pytest.mark.parametrize("script", SCRIPTED)
@pytest.mark.parametrize("in_memory", [False, True])
def test_scripts_run_and_are_not_saved_as_zeros(
    script: str, in_memory: bool, tmp_path: Path
) -> None:
    model, x, expected = _packed_model()
    scripted = SCRIPTED[script](model, x)
    torch.testing.assert_close(scripted(x), expected)
    with pytest.raises(RuntimeError, match="size_bytes_is_heap_allocated_"):
        torch.jit.save(scripted, io.BytesIO() if in_memory else str(tmp_path / "model.pt"))
    torch.testing.assert_close(scripted(x), expected)


def test_packed_layers_run_while_another_model_is_traced() -> None:
    model, x, expected = _packed_model()
    found = []

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: found.append(model(x.detach())))
            thread.start()
            thread.join()
            return x + 1

    torch.jit.trace(Other(), x, check_trace=False)
    torch.testing.assert_close(found, [expected])


def test_an_exported_program_is_saved_with_its_codes(tmp_path: Path) -> None:
    model, x, expected = _packed_model()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert isinstance(loaded.state_dict["first.weight"], PackedWeight)
    torch.testing.assert_close(loaded.module()(x), expected)


def test_the_storage_says_what_a_dense_weight_would_take() -> None:
    assert make(SHAPE).untyped_storage().nbytes() == 4 * 8 * 4
