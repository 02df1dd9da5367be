"""What the private names of PyTorch are used for, each tried on the PyTorch that is installed."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fqcompile import torch_compat as compat


def captured(function: Any, *args: Tensor, backend: Any = None) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend."""
    found: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        found.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep)(*args)
    return found[0]


def test_every_name_is_there() -> None:
    missing = [name for name in compat.__all__ if getattr(compat, name, None) is None]
    assert not missing


def test_inductor_says_whether_its_kernels_start_early() -> None:
    with compat.inductor_config.patch({"triton.enable_pdl": True}):
        assert compat.inductor_config.triton.enable_pdl is True


def test_writes_to_a_tensor_are_counted() -> None:
    tensor = torch.zeros(3)
    before = compat.count_of_writes(tensor)
    tensor.add_(1)
    compat.count_write(tensor)
    assert compat.count_of_writes(tensor) == before + 2


def test_memory_has_an_identity_that_views_share() -> None:
    tensor = torch.zeros(4, 4)
    assert compat.memory_id(tensor) == compat.memory_id(tensor[1:]) == compat.memory_id(tensor.t())
    assert compat.memory_id(tensor) != compat.memory_id(tensor.clone())


def test_a_wrapper_has_no_address_to_write_to() -> None:
    class Wrapper(Tensor):
        __torch_function__ = compat.no_torch_function

        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func

    made = compat.make_wrapper_subclass(Wrapper, (2, 3), dtype=torch.float32)
    compat.refuse_mutable_address(made)
    assert made.shape == (2, 3)
    with pytest.raises(RuntimeError):
        made.data_ptr()


def test_sources_of_a_graphs_inputs() -> None:
    model = nn.Linear(3, 2)
    graph = captured(model, torch.ones(1, 3)).graph
    sources = {n.name: compat.source_of(n) for n in graph.nodes if n.op == "placeholder"}
    assert any("weight" in source.name for source in sources.values())
    (node,) = [n for n in graph.nodes if n.op == "output"]
    assert compat.source_of(node) is None
    compat.set_source(node, 3)
    copied: dict[fx.Node, fx.Node] = {}
    fx.Graph().graph_copy(graph, copied)
    module = fx.GraphModule(nn.Module(), fx.Graph())
    compat.copy_sources(module, module, copied)
    for old, new in copied.items():
        assert compat.source_of(new) is compat.source_of(old)
    assert compat.sources_of_attributes(module) == {}


def test_symbolic_sizes_take_other_values() -> None:
    found: list[Any] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((module, inputs))
        return module.forward

    x = torch.ones(5, 7)
    torch._dynamo.mark_dynamic(x, 1, min=4, max=12)
    torch._dynamo.reset()
    torch.compile(lambda x: x.flatten() * 2, backend=backend, dynamic=True)(x)
    ((module, inputs),) = found
    fakes = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
    (size,) = [f for f in fakes if isinstance(f, torch.SymInt) and compat.hint_of(f) == 7]
    symbol = compat.symbol_of(size)
    assert symbol is not None and compat.symbol_of(7) is compat.symbol_of(size * 2) is None
    assert compat.size_at(size * 2, {symbol: 10}) == 20 and compat.size_at(3, {}) == 3
    assert [compat.size_within(size, n) for n in (2, 9, 99)] == [4, 9, 12]
    assert compat.hint_of(3) == 3 and len(inputs) == len(fakes)


def test_an_erased_node_is_known() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.relu, (x,))
    assert not compat.is_erased(node)
    graph.erase_node(node)
    assert compat.is_erased(node)


def test_inputs_that_are_static_are_marked() -> None:
    graph = captured(nn.Linear(3, 2), torch.ones(1, 3)).graph
    marks = [n.meta.get("tensor_dict", {}) for n in graph.nodes if n.op == "placeholder"]
    assert sum(compat.STATIC_INPUT in mark for mark in marks) == 2, "weight and bias"


def test_schemas_name_arguments_and_what_is_written() -> None:
    schema = compat.schema_of(torch.ops.aten.add_.Tensor)
    assert [a.name for a in schema.arguments] == ["self", "other", "alpha"] and schema.is_mutable
    assert not compat.schema_of(torch.ops.aten.add.Tensor).is_mutable
    assert isinstance(torch.ops.aten.add.Tensor, compat.OpOverload)
    assert isinstance(torch.ops.aten.add, compat.OpOverloadPacket)
    assert isinstance(compat.cond_op, compat.HigherOrderOperator)
    assert compat.has_kernel("aten::matmul", "CompositeImplicitAutograd")
    assert not compat.has_kernel("aten::mm", "CompositeImplicitAutograd")
    assert compat.is_operator("aten::add.Tensor") and not compat.is_operator("aten::no_such")


def test_a_composite_operator_is_decomposed_whatever_its_table_says() -> None:
    x, inner = torch.randn(2, 3), torch.ops.aten.inner.default
    with pytest.MonkeyPatch.context() as patch:
        key = compat.DispatchKey.CompositeImplicitAutograd
        patch.setitem(inner.py_kernels, key, lambda *_: NotImplemented)
        assert inner.decompose(x, x) is NotImplemented
        assert torch.equal(compat.decomposed(inner, (x, x), {}), x @ x.T)


def test_autocast_can_be_left() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with compat.without_keys(compat.key_set("AutocastCPU")):
            assert (x @ x).dtype == torch.float32


def test_modules_behind_what_compiles_them() -> None:
    model = nn.Linear(3, 2)
    assert compat.plain_module(torch.compile(model)) is model
    assert compat.plain_module(model) is model and compat.compiled_call(model) is None
    model.compile(backend="eager")
    assert compat.compiled_call(model) is not None
    compat.set_compiled_call(model, None)
    assert compat.compiled_call(copy.deepcopy(model)) is None


def test_a_trace_shows_its_modules() -> None:
    model, seen = nn.Linear(3, 2), []
    model.register_forward_pre_hook(lambda *_: seen.append(compat.traced_modules()))
    torch.jit.trace(model, torch.ones(1, 3))
    known = [part for found in seen if found for pair in found.items() for part in pair]
    assert any(part is model for part in known) and compat.traced_modules() is None


def test_frames_that_dynamo_leaves_alone() -> None:
    def inner(x: Tensor) -> Tensor:
        return x + 1

    compat.not_for_dynamo(inner.__code__)
    torch._dynamo.reset()
    counter: list[object] = []

    def backend(module: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        counter.append(module)
        return module.forward

    torch.compile(inner, backend=backend)(torch.ones(1))
    assert not counter


def test_the_compile_lock_is_one_that_its_owner_may_take_twice() -> None:
    with compat.compile_lock, compat.compile_lock:
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(compat.compile_lock.acquire(False)))
        thread.start()
        thread.join()
    assert taken == [False]


def test_what_computes_a_weight_is_known_and_can_be_removed() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).eval()
    weight, remove = layer.weight.detach().clone(), compat.remover_of_norm(layer)
    assert remove is not None and compat.remover_of_norm(nn.Linear(3, 2)) is None
    remove()
    assert type(layer.weight) is nn.Parameter and torch.equal(layer.weight, weight)


def test_kernels_of_aten() -> None:
    w = torch.randint(-8, 8, (32, 64), dtype=torch.int32)
    x, scale = torch.randn(2, 64, dtype=torch.bfloat16), torch.rand(2, 32, 1, dtype=torch.bfloat16)
    scales = torch.cat([scale, torch.zeros_like(scale)], -1)
    y = compat.int4pack_mm(x, compat.pack_int4(w + 8, 1), 32, scales)
    dense = (w.view(32, 2, 32) * scale[:, :, 0].t()[:, :, None].float()).view(32, 64)
    # A bf16 weight and a bf16 result: two roundings of 2^-8 of sums of 64 products.
    assert torch.allclose(y.float(), x.float() @ dense.t(), rtol=2**-6, atol=2**-8 * 64)
    codes = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    got = compat.int8pack_mm(x, codes, scale[0, :, 0])
    wanted = x.float() @ (codes * scale[0].float()).t()
    assert torch.allclose(got.float(), wanted, rtol=2**-6, atol=2**-8 * 64 * 128)


def test_the_machine_is_asked() -> None:
    assert isinstance(compat.has_amx(), bool) and isinstance(compat.has_feature("avx512"), bool)
    assert compat.cpp_compiler() and compat.library_path.endswith(".so")
    assert issubclass(compat.InvalidCxxCompiler, Exception)
