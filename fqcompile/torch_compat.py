"""Every private or undocumented name of PyTorch that this package uses; no other file uses one.

All of them were tested with PyTorch 2.11.0, 2.13.0 and 2.14.1. If a release removes one, importing
this module fails and names it; `tests/test_torch_compat.py` tests what each is used for.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import DispatchKey, _disabled_torch_function_impl
from torch._C._autograd import _unsafe_set_version_counter
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._dynamo.aot_compile_types import SerializableCallable
from torch._dynamo.backends.registry import lookup_backend, register_backend
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule
from torch._dynamo.exc import RestartAnalysis, SkipFrame, Unsupported
from torch._dynamo.external_utils import wrap_inline
from torch._dynamo.source import AttrSource
from torch._guards import GuardSource, Source, TracingContext, detect_fake_mode, tracing
from torch._higher_order_ops.cond import cond_op
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InvalidCxxCompiler
from torch._logging._internal import trace_log, trace_structured
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import _get_default_store as default_store
from torch.jit import _trace as jit_trace
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_leaves, tree_map_only

__all__ = [
    "AttrSource",
    "Convolution",
    "DispatchKey",
    "FakeTensor",
    "GuardSource",
    "HigherOrderOperator",
    "InvalidCxxCompiler",
    "OpOverload",
    "OpOverloadPacket",
    "OptimizeContext",
    "OptimizedModule",
    "SerializableCallable",
    "Source",
    "TorchDispatchMode",
    "TracingContext",
    "compile_fx",
    "compile_lock",
    "cond_op",
    "default_store",
    "detect_fake_mode",
    "list_mode_options",
    "list_options",
    "lookup_backend",
    "register_backend",
    "return_and_correct_aliasing",
    "trace_log",
    "trace_structured",
    "tracing",
    "tree_iter",
    "tree_leaves",
    "tree_map_only",
    "wrap_inline",
]

dynamo_config = torch._dynamo.config
inductor_config = torch._inductor.config
optimize = torch._dynamo.optimize

# Tensors.
count_of_writes = attrgetter("_version")
is_expired = torch.UntypedStorage._expired
make_wrapper_subclass = Tensor._make_wrapper_subclass
refuse_mutable_address = torch._C._set_throw_on_mutable_data_ptr
no_torch_function = _disabled_torch_function_impl
held_here = attrgetter("_local_tensor")  # the shard of a DTensor that this rank holds

# Operators.
schema_of = attrgetter("_schema")
grouped_mm = torch._grouped_mm
int8pack_mm = torch.ops.aten._weight_int8pack_mm
int4pack_mm = torch.ops.aten._weight_int4pack_mm_for_cpu
pack_int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
is_operator = torch._C._dispatch_has_kernel  # whether it is defined or has any kernel
without_keys = torch._C._ExcludeDispatchKeyGuard  # a context manager

# The machine.
has_amx = torch.cpu._is_amx_tile_supported
library_path: str = torch._C.__file__

# Exceptions by which Inductor asks Dynamo to trace again or to skip a frame; they are no failures.
DYNAMO_REQUESTS = (RestartAnalysis, SkipFrame, Unsupported)
# Key of an input's `meta["tensor_dict"]` that tells CUDA graphs not to copy the input.
STATIC_INPUT = "_dynamo_static_input_type"


def decomposed(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a composite operator as calls of the operators that it is made of.

    `run_decompositions({})` lets operators refuse this to stay whole in the program. One that gets
    a weight which is no plain tensor cannot stay: then PyTorch's own kernel runs all the same.
    """
    result = func.decompose(*args, **kwargs)
    if result is NotImplemented:
        return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    return result


def memory_id(tensor: Tensor) -> int:
    """An id that all views of one storage share; unique while the storage lives."""
    return int(tensor.untyped_storage()._cdata)


def _remove_parametrizations(module: nn.Module) -> None:
    """PyTorch makes a buffer of a weight that was computed from two frozen parameters."""
    parametrize.remove_parametrizations(module, "weight")
    if "weight" not in module._parameters:
        weight: Tensor = module.weight  # type: ignore[assignment]
        del module.weight
        module.weight = nn.Parameter(weight.detach(), requires_grad=False)


_NORMS = (_WeightNorm, _SpectralNorm, _Orthogonal)


def remover_of_norm(module: nn.Module) -> Callable[[], object] | None:
    """What makes a parameter of the weight that PyTorch's norms compute in each call; None without.

    Only where nothing else computes it too.
    """
    if parametrize.is_parametrized(module, "weight"):
        steps: Any = module.parametrizations
        known = all(isinstance(step, _NORMS) for step in steps["weight"])
        return partial(_remove_parametrizations, module) if known else None
    hooks = module._forward_pre_hooks.values()
    for kind, remove in ((WeightNorm, remove_weight_norm), (SpectralNorm, remove_spectral_norm)):
        if any(isinstance(hook, kind) and hook.name == "weight" for hook in hooks):
            return partial(remove, module)
    return None


def count_write(tensor: Tensor) -> None:
    """Increment the version counter of a tensor after a write that PyTorch did not see."""
    _unsafe_set_version_counter((tensor,), (tensor._version + 1,))


def has_feature(name: str) -> bool:
    """Whether this CPU has an instruction set such as "avx512_bf16"."""
    return bool(getattr(torch.cpu, f"_is_{name}_supported")())


def cpp_compiler() -> str:
    """The C++ compiler that Inductor uses for CPU graphs; the query takes half a second."""
    return str(import_module("torch._inductor.cpp_builder").get_cpp_compiler())


def key_set(name: str) -> Any:
    """The set of one dispatch key, as `without_keys` takes it."""
    return torch._C.DispatchKeySet(getattr(DispatchKey, name))


def source_of(node: fx.Node) -> Any:
    """Where Dynamo found the value of an input; None if Dynamo did not create the input."""
    return getattr(node, "_dynamo_source", None)


def set_source(node: fx.Node, source: Any) -> None:
    """Set the source of an input as Dynamo does; None for an input that only this package fills."""
    node._dynamo_source = source


def sources_of_attributes(module: fx.GraphModule) -> dict[str, Source]:
    """{attribute: source} of a graph whose parameters Dynamo made attributes, as for freezing."""
    return getattr(module, "_param_name_to_source", None) or {}


def copy_sources(old: fx.GraphModule, new: fx.GraphModule, nodes: dict[fx.Node, fx.Node]) -> None:
    """Copy the sources that Dynamo stored on a graph and its nodes to a copy of the graph."""
    for node, copied in nodes.items():
        if hasattr(node, "_dynamo_source"):
            set_source(copied, source_of(node))
    if hasattr(old, "_param_name_to_source"):
        new._param_name_to_source = old._param_name_to_source


def symbol_of(size: Any) -> Any:
    """The symbol of a symbolic size; None for a number or an expression of symbols."""
    expression = size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat) else None
    return expression if expression is not None and expression.is_Symbol else None


def size_at(size: Any, values: Mapping[Any, int]) -> Any:
    """The number that a size becomes when its symbols have these values."""
    symbolic = isinstance(size, torch.SymInt | torch.SymFloat)
    return type(hint_of(size))(size.node.expr.xreplace(dict(values))) if symbolic else size


def size_within(size: Any, wanted: int) -> int:
    """The number nearest to `wanted` within the range of a symbolic size."""
    bounds = size.node.shape_env.var_to_range[size.node.expr]
    return int(max(bounds.lower, min(wanted, bounds.upper)))


def hint_of(size: Any) -> Any:
    """The value of a symbolic size in the call being compiled; any other size unchanged."""
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat) else size


def is_erased(node: fx.Node) -> bool:
    """Whether the node was erased from its graph."""
    return bool(node._erased)


def compiled_call(module: nn.Module) -> Any:
    """The compiled function that `module.compile()` installed, or None."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Any) -> None:
    """Install a compiled function as `module.compile()` does; None removes it."""
    module._compiled_call_impl = call


def plain_module(module: Any) -> Any:
    """The module without the wrapper of torch.compile; anything else unchanged."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def not_for_dynamo(code: Any) -> None:
    """Make Dynamo run a code object, and everything it calls, without tracing it."""
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(code, skip)


def traced_modules() -> dict[Any, Any] | None:
    """The modules of the torch.jit.trace that is running in any thread; None if none is."""
    return jit_trace._trace_module_map
