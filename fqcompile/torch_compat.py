"""Every name of PyTorch without a promise that this package builds on; no other file uses one.

All were seen to work in PyTorch 2.11.0, 2.13.0 and 2.14.1. Where a release has lost one, importing
this fails and names it; `tests/test_torch_compat.py` tries what each is used for.
"""

from collections.abc import Mapping
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
optimize = torch._dynamo.optimize

# Of tensors.
count_of_writes = attrgetter("_version")
is_expired = torch.UntypedStorage._expired
make_wrapper_subclass = Tensor._make_wrapper_subclass
refuse_mutable_address = torch._C._set_throw_on_mutable_data_ptr
no_torch_function = _disabled_torch_function_impl
held_here = attrgetter("_local_tensor")  # of a DTensor

# Of operators.
schema_of = attrgetter("_schema")
grouped_mm = torch._grouped_mm
int8pack_mm = torch.ops.aten._weight_int8pack_mm
int4pack_mm = torch.ops.aten._weight_int4pack_mm_for_cpu
pack_int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
without_keys = torch._C._ExcludeDispatchKeyGuard  # a context

# Of the machine.
has_amx = torch.cpu._is_amx_tile_supported
library_path: str = torch._C.__file__

# How Inductor asks Dynamo to trace again or to give up on a frame: not failures.
DYNAMO_REQUESTS = (RestartAnalysis, SkipFrame, Unsupported)
# Of an input, in `meta["tensor_dict"]`: CUDA graphs need not copy it.
STATIC_INPUT = "_dynamo_static_input_type"


def memory_id(tensor: Tensor) -> int:
    """What views of one memory share, and nothing else at that time."""
    return int(tensor.untyped_storage()._cdata)


def count_write(tensor: Tensor) -> None:
    """Count a write to the tensor that PyTorch did not see."""
    _unsafe_set_version_counter((tensor,), (tensor._version + 1,))


def has_feature(name: str) -> bool:
    """Whether this processor has it, as "avx512_bf16"."""
    return bool(getattr(torch.cpu, f"_is_{name}_supported")())


def cpp_compiler() -> str:
    """The one that Inductor takes for CPU graphs; to ask for it takes half a second."""
    return str(import_module("torch._inductor.cpp_builder").get_cpp_compiler())


def key_set(name: str) -> Any:
    """Of one dispatch key, as `without_keys` takes it."""
    return torch._C.DispatchKeySet(getattr(DispatchKey, name))


def source_of(node: fx.Node) -> Any:
    """Where Dynamo found an input's value; None for what Dynamo did not make an input."""
    return getattr(node, "_dynamo_source", None)


def set_source(node: fx.Node, source: Any) -> None:
    """As Dynamo sets it; None for an input that only this package fills."""
    node._dynamo_source = source


def sources_of_attributes(module: fx.GraphModule) -> dict[str, Source]:
    """By the graph's attribute, where Dynamo made parameters attributes, as for freezing."""
    return getattr(module, "_param_name_to_source", None) or {}


def copy_sources(old: fx.GraphModule, new: fx.GraphModule, nodes: dict[fx.Node, fx.Node]) -> None:
    """Metadata that Dynamo stored at a graph and its nodes, for a copy of it."""
    for node, copied in nodes.items():
        if hasattr(node, "_dynamo_source"):
            set_source(copied, source_of(node))
    if hasattr(old, "_param_name_to_source"):
        new._param_name_to_source = old._param_name_to_source


def symbol_of(size: Any) -> Any:
    """The symbol that a size is; None for a number, and for what is computed of symbols."""
    expression = size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat) else None
    return expression if expression is not None and expression.is_Symbol else None


def size_at(size: Any, values: Mapping[Any, int]) -> Any:
    """A size as a number, where its symbols have these values."""
    symbolic = isinstance(size, torch.SymInt | torch.SymFloat)
    return type(hint_of(size))(size.node.expr.xreplace(dict(values))) if symbolic else size


def size_within(size: Any, wanted: int) -> int:
    """The number nearest to `wanted` that a symbol may be."""
    bounds = size.node.shape_env.var_to_range[size.node.expr]
    return int(max(bounds.lower, min(wanted, bounds.upper)))


def hint_of(size: Any) -> Any:
    """The number that a symbolic size has in the call that is compiled; any other as it is."""
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat) else size


def is_erased(node: fx.Node) -> bool:
    """Whether the node has left its graph."""
    return bool(node._erased)


def compiled_call(module: nn.Module) -> Any:
    """What `module.compile()` has put before its calls, or None."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Any) -> None:
    """As `module.compile()` does; None takes it away."""
    module._compiled_call_impl = call


def plain_module(module: Any) -> Any:
    """Without the wrapper that torch.compile puts around a module."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def not_for_dynamo(code: Any) -> None:
    """Have Dynamo run a function, and all that it calls, as it is."""
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(code, skip)


def traced_modules() -> dict[Any, Any] | None:
    """Of the torch.jit.trace that some thread runs; None where none does."""
    return jit_trace._trace_module_map
