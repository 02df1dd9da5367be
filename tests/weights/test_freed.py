"""FreedWeight: still the parameter in all but its values; nothing reads memory that is gone."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fqcompile.errors import FreedWeightError
from fqcompile.weights.freed import FreedBy, FreedWeight, Refills, free, is_freed, refill

SHAPE = (6, 4)
VALUES = torch.arange(24.0).view(SHAPE)


def freed(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(SHAPE, dtype=dtype), requires_grad)
    record = FreedBy("fc.weight", "graph_7", lambda w: VALUES.to(w.dtype), lambda w, c: None)
    free(weight, record)
    return weight


def storage_bytes(weight: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return weight.untyped_storage().nbytes()


def test_freeing_keeps_the_object_and_drops_the_bytes() -> None:
    weight = nn.Parameter(torch.randn(SHAPE).t(), requires_grad=True)
    before, stride = id(weight), weight.stride()
    free(weight, FreedBy("w", "graph_0", lambda w: VALUES.t(), lambda w, c: None))
    assert (id(weight), type(weight), storage_bytes(weight)) == (before, FreedWeight, 0)
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.stride()) == (torch.Size((4, 6)), stride)
    assert weight.requires_grad and weight.is_leaf and weight.grad is None


def test_alias_of_a_freed_weight_keeps_its_values() -> None:
    weight = nn.Parameter(VALUES.clone())
    alias = weight.detach()
    free(weight, FreedBy("w", "graph_0", lambda w: VALUES, lambda w, c: None))
    assert torch.equal(alias, VALUES)


ABOUT_IT: dict[str, tuple[Callable[[nn.Parameter], Any], Any]] = {
    "shape": (lambda w: tuple(w.shape), SHAPE),
    "dtype": (lambda w: w.dtype, torch.float32),
    "device": (lambda w: w.device.type, "cpu"),
    "layout": (lambda w: w.layout, torch.strided),
    "size": (lambda w: w.size(1), 4),
    "stride": (lambda w: w.stride(), (4, 1)),
    "dim": (lambda w: (w.dim(), w.ndim, len(w)), (2, 2, 6)),
    "numel": (lambda w: (w.numel(), w.nelement(), torch.numel(w)), (24, 24, 24)),
    "nbytes": (lambda w: (w.nbytes, w.element_size(), w.itemsize), (96, 4, 4)),
    "version": (lambda w: w._version, 0),
    "is_leaf": (lambda w: (w.is_leaf, w.grad_fn, w.grad), (True, None, None)),
    "is_meta": (lambda w: (w.is_meta, w.is_cuda, w.is_sparse, w.is_quantized), (False,) * 4),
    "is_float": (
        lambda w: (w.is_floating_point(), torch.is_floating_point(w), w.is_complex()),
        (True, True, False),
    ),
    "contiguous": (lambda w: w.is_contiguous(), True),
    "hash": (lambda w: hash(w) == id(w), True),
    "is_param": (lambda w: isinstance(w, nn.Parameter), True),
    "zeros_like": (lambda w: torch.zeros_like(w).tolist(), torch.zeros(SHAPE).tolist()),
    "repr": (repr, "FreedWeight(fc.weight, 6x4, torch.float32, freed by graph_7)"),
    "format": (lambda w: f"{w}"[:22], "FreedWeight(fc.weight,"),
    "detach": (lambda w: w.detach() is w and w.data is w, True),
    "to its own": (
        lambda w: [w.to("cpu") is w, w.to(torch.float32) is w, w.to(VALUES) is w, w.to() is w],
        [True] * 4,
    ),
    "float, cpu": (lambda w: (w.float() is w, w.cpu() is w), (True, True)),
    "requires_grad_": (lambda w: w.requires_grad_(True).requires_grad, True),
    "freeze": (lambda w: w.requires_grad_(False).requires_grad, False),
}


@pytest.mark.parametrize("name", ABOUT_IT)
def test_what_needs_no_values_is_answered(name: str) -> None:
    ask, answer = ABOUT_IT[name]
    assert ask(freed()) == answer


READS: dict[str, Callable[[Tensor], object]] = {
    "half": lambda w: w.half(),
    "double": lambda w: w.double(),
    "to dtype": lambda w: w.to(torch.bfloat16),
    "to meta": lambda w: w.to("meta"),
    "to, a copy": lambda w: w.to(torch.float32, copy=True),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "t": lambda w: w.t(),
    "view": lambda w: w.view(-1),
    "view_as": lambda w: w.view_as(w),
    "add": lambda w: VALUES + w,
    "matmul": lambda w: VALUES @ w.T,
    "linear": lambda w: nn.functional.linear(torch.ones(1, 4), w),
    "embedding": lambda w: nn.functional.embedding(torch.tensor([1]), w),
    "index": lambda w: w[0],
    "iterate": list,
    "write an element": lambda w: w.__setitem__(0, 1.0),
    "equal": lambda w: torch.equal(w, VALUES),
    "==": lambda w: w == VALUES,
    "bool": bool,
    "sum": lambda w: w.sum(),
    "item": lambda w: w.item(),
    "tolist": lambda w: w.tolist(),
    "numpy": lambda w: w.detach().numpy(),
    "array": lambda w: w.__array__(),
    "dlpack": lambda w: w.__dlpack__(),
    "data_ptr": lambda w: w.data_ptr(),
    "storage": lambda w: w.untyped_storage(),
    "share_memory_": lambda w: w.share_memory_(),
    "as_subclass": lambda w: w.as_subclass(Tensor),
    "in a list": lambda w: torch.cat([VALUES, w]),
    "in place": lambda w: w.add_(1),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "init": nn.init.normal_,
    "written to another": lambda w: torch.zeros(SHAPE).copy_(w),
    "another freed one": lambda w: w.copy_(freed()),
    "vmap": lambda w: torch.vmap(lambda x: x @ w.t())(torch.ones(2, 4)),
    "safetensors": lambda w: safetensors.torch.save({"w": w}),
    "safetensors, detached": lambda w: safetensors.torch.save({"w": w.detach()}),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("grad", [False, True])
def test_what_needs_values_says_who_freed_them_and_what_to_do(name: str, grad: bool) -> None:
    weight = freed()
    message = (
        r" needs the values of fc\.weight, which graph_7 freed .*restore\(model\).*"
        r"free_weights=False.*fqcompile\.save\(model, directory\)"
    )
    with torch.set_grad_enabled(grad), pytest.raises(FreedWeightError, match=message):
        READS[name](weight)
    assert is_freed(weight)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["linear", "add", "sum", "embedding", "clone"])
def test_compiled_by_another_backend_it_is_the_same_error(backend: str, name: str) -> None:
    weight = freed()
    with pytest.raises(FreedWeightError, match="which graph_7 freed"):
        torch.compile(lambda: READS[name](weight), backend=backend)()


def test_safetensors_writes_no_file(tmp_path: Path) -> None:
    with pytest.raises(FreedWeightError):
        safetensors.torch.save_file({"w": freed()}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_and_pickles_are_ordinary_with_dequantised_values(dtype: torch.dtype) -> None:
    weight = freed(requires_grad=True, dtype=dtype)
    copies = [copy.deepcopy(weight), copy.copy(weight), pickle.loads(pickle.dumps(weight))]
    file = io.BytesIO()
    torch.save({"w": weight}, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=True)["w"])
    for copied in copies:
        assert (type(copied), copied.requires_grad) == (nn.Parameter, True)
        assert torch.equal(copied.detach(), VALUES.to(dtype))
    assert is_freed(weight)


def test_deepcopy_keeps_what_is_shared_shared() -> None:
    weight = freed()
    first, second = copy.deepcopy([weight, weight])
    assert first is second


def _layer(requires_grad: bool = False) -> nn.Linear:
    layer = nn.Linear(4, 6)
    layer.weight = freed(requires_grad)
    return layer


def test_module_with_a_freed_weight_lives_on() -> None:
    layer = _layer(requires_grad=True)
    assert sum(p.numel() for p in layer.parameters()) == 24 + 6
    assert layer.eval().requires_grad_(False) is layer
    assert layer.to("cpu", torch.float32) is layer and layer.float() is layer
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    layer.load_state_dict(state)
    assert is_freed(layer.weight)
    optimizer = torch.optim.AdamW(layer.requires_grad_(True).parameters())
    optimizer.zero_grad()
    optimizer.step()
    assert is_freed(layer.weight)
    with pytest.raises(FreedWeightError):
        layer.half()
    assert layer.weight.dtype == torch.float32


def test_load_state_dict_makes_it_ordinary_again() -> None:
    layer, count = _layer(requires_grad=True), Refills.count
    weight = layer.weight
    layer.load_state_dict({"weight": VALUES, "bias": torch.zeros(6)})
    assert layer.weight is weight
    assert (type(weight), weight.requires_grad, weight.is_leaf) == (nn.Parameter, True, True)
    assert torch.equal(weight.detach(), VALUES) and weight.data_ptr() != VALUES.data_ptr()
    assert Refills.count == count + 1


def test_assigning_data_makes_it_ordinary_again() -> None:
    weight, new = freed(), VALUES.clone()
    weight.data = new
    assert type(weight) is nn.Parameter and weight.data_ptr() == new.data_ptr()


@pytest.mark.parametrize("value", [torch.ones(5, 5), torch.ones(1, 4, 4)])
def test_values_of_another_shape_leave_it_freed(value: Tensor) -> None:
    weight = freed()
    with torch.no_grad(), pytest.raises(RuntimeError):
        weight.copy_(value)
    assert is_freed(weight)


def test_copy_under_grad_mode_is_refused_as_for_any_leaf() -> None:
    weight = freed(requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        weight.copy_(VALUES)
    assert is_freed(weight)
    with torch.no_grad():
        weight.copy_(VALUES[0])  # copy_ broadcasts
    assert torch.equal(weight.detach(), VALUES[0].expand(SHAPE))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fill", [refill, lambda w, values: w.copy_(values)])
def test_freeing_and_filling_work_in_every_mode(mode: Any, fill: Any) -> None:
    weight = nn.Parameter(VALUES.clone())
    with mode():
        free(weight, FreedBy("w", "graph_0", lambda w: VALUES, lambda w, c: None))
        fill(weight, VALUES)
    assert not weight.is_inference()
    weight.sum().backward()
    assert weight.grad is not None
