"""Every operator that writes, as its schema says it, refuses a packed weight or lands in it."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fqcompile.errors import FineQuantError
from fqcompile.weights.parameter import PackedWeight
from tests.weights.test_packed_writes import codes, make


def overloads() -> Iterator[Any]:
    """Every operator of aten that has a Python name."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if namespace == "aten" and found is not None:
            yield found


def written(schema: Any) -> list[Any]:
    """The tensors, or lists of tensors, that it writes to."""
    return [
        argument
        for argument in schema.arguments
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and "Tensor" in str(argument.type)
    ]


@pytest.mark.parametrize("shown", ["weight", "view"])
def test_no_operator_that_writes_goes_unnoticed(shown: str) -> None:
    weight = make((12, 16))
    target = weight if shown == "weight" else weight.view(3, 4, 16)
    before = codes(weight)
    seen = 0
    for op in overloads():
        for argument in written(op._schema):
            value: Any = [torch.ones(1), target] if "List" in str(argument.type) else target
            given = {a.name: None for a in op._schema.arguments} | {argument.name: value}
            named = {a.name for a in op._schema.arguments if a.kwarg_only}
            args = tuple(v for name, v in given.items() if name not in named)
            kwargs = {name: v for name, v in given.items() if name in named}
            if op is torch.ops.aten.copy_.default:
                continue  # lands
            with pytest.raises(FineQuantError, match=r"packed weight.*layer\.weight.*restore"):
                type(target).__torch_dispatch__(op, (type(target),), args, kwargs)
            seen += 1
    assert seen > 1000, "lists and out= among them"
    assert all(map(torch.equal, codes(weight), before))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without collectives")
@pytest.mark.parametrize("name", ["broadcast_", "allreduce_", "recv_", "_allgather_base_"])
def test_no_collective_writes_without_effect(name: str) -> None:
    """Their schemas do not say that they write."""
    weight = make((12, 16))
    op = getattr(torch.ops.c10d, name).default
    value = weight if name.startswith("_") else [weight]
    with pytest.raises(FineQuantError, match=r"packed weight.*fqcompile\.restore"):
        PackedWeight.__torch_dispatch__(op, (), (value, *(None for _ in op._schema.arguments[1:])))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, foreach=False),
    "foreach sgd": lambda p: torch.optim.SGD(p, 0.1, foreach=True),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_steps_without_effect(name: str) -> None:
    packed = nn.Parameter(make((12, 16)), requires_grad=True)
    dense = nn.Parameter(torch.ones(12, 16))
    for parameter in (packed, dense):
        parameter.grad = torch.ones(12, 16)
    assert isinstance(packed, PackedWeight)
    before = codes(packed)
    with pytest.raises(FineQuantError, match=r"fqcompile\.restore"):
        OPTIMIZERS[name]([dense, packed]).step()
    assert all(map(torch.equal, codes(packed), before))


def test_a_dense_tensor_does_not_take_the_memory_of_a_packed_weight() -> None:
    for source in (make((12, 16)), make((12, 16))[:, 3:]):
        with pytest.raises(FineQuantError, match="packed weight"):
            torch.empty(0).set_(source)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "finequant"])
@pytest.mark.parametrize("write", ["assign", "copy", "through a view", "foreach"])
def test_what_a_compiled_graph_writes_does_not_vanish(write: str, backend: str) -> None:
    def forward(w: Tensor) -> Tensor:
        if write == "assign":
            w[3] = 0.0
        elif write == "copy":
            w[:4].copy_(torch.ones(4, 16))
        elif write == "through a view":
            w.view(3, 4, 16)[1].add_(1)
        else:
            torch._foreach_mul_([w], 2.0)
        return w + 0

    w = make((12, 16))
    before = codes(w)
    with pytest.raises(Exception, match=r"packed weight[\s\S]*fqcompile\.restore"):
        torch.compile(forward, backend=backend)(w)
    assert all(map(torch.equal, codes(w), before))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "finequant"])
def test_views_are_read_in_compiled_graphs(backend: str) -> None:
    def forward(w: Tensor) -> tuple[Tensor, ...]:
        v = w.view(3, 4, 16)
        torch._dynamo.graph_break()
        return v + 1, w[3] + w[:, 2:5].sum(), w.t().reshape(-1), v, w[1:3], w.t().contiguous()

    w = make((12, 16))
    options = {"inner_backend": "eager"} if backend == "finequant" else None
    found = torch.compile(forward, backend=backend, options=options)(w)
    for actual, expected in zip(found, forward(w.dequantized()), strict=True):
        assert torch.equal(actual + 0, expected + 0)


def test_views_are_read_by_what_reads_memory_or_copies() -> None:
    w = make((12, 16))
    view, expected = w.view(3, 4, 16)[1], w.dequantized().view(3, 4, 16)[1]
    assert view.tolist() == expected.tolist() and view[0, 0].item() == expected[0, 0].item()
    for array in (view.numpy(), np.asarray(view)):
        assert (array == expected.numpy()).all()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    own = view.numpy(force=True)
    own[0] = 1
    for copied in (copy.deepcopy(view), pickle.loads(pickle.dumps(view)), view.clone()):
        assert type(copied) is Tensor and torch.equal(copied, expected)
        copied.zero_()
    with pytest.raises(FineQuantError, match=r"layer\.weight.*fqcompile\.restore.*clone"):
        view.data_ptr()
    for read in (torch.from_dlpack, lambda t: save({"w": t})):
        with pytest.raises(FineQuantError, match=r"fqcompile\.restore"):
            read(view)
    assert torch.equal(view + 0, expected)


def test_a_view_shows_what_is_written_to_the_weight_after_it_was_taken() -> None:
    w = make((12, 16))
    rows, block, data, turned = w[2:5], w.view(3, 4, 16), w.data, w.t()
    for values in (torch.ones(12, 16), torch.full((12, 16), 1e-30), torch.eye(12, 16)):
        w.copy_(values)  # the second needs scales of another type, in another memory
        now = w.dequantized()
        assert torch.equal(rows.dequantized(), now[2:5])
        assert torch.equal(block + 0, now.view(3, 4, 16))
        assert torch.equal(data.dequantized(), now) and torch.equal(turned.dequantized(), now.t())
        data[0].copy_(torch.full((16,), -4.0))
        assert bool(((w.dequantized()[0] + 4).abs() <= 4 * 2.0**-11).all()), "but for the step's"
        assert torch.equal(w.dequantized()[1:], now[1:])
