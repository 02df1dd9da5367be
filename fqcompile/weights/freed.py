"""FreedWeight: a parameter without its dense values; what compiled graphs hold packed is left.

    nn.Parameter [N, K] bf16  --free-->  FreedWeight [N, K] bf16, 0 bytes  --refill-->  nn.Parameter

The object stays the same, in its module, with its shape and dtype: compiled graphs take it as the
name of their packed copy. What asks for its values gets an error that says who freed it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fqcompile.errors import FreedWeightError
from fqcompile.quant.chunks import plain_tensors


@dataclass(frozen=True)
class FreedBy:
    """Who freed a weight, and where its value is now.

    `parts` are what is packed of it; `dense` gives ŵ in the weight's shape and dtype; `share` lets
    a copy of it have the same packed tensors. Both take the weight, which a record must not keep
    alive.
    """

    name: str
    graph: str
    dense: Callable[[Tensor], Tensor]
    share: Callable[[Tensor, Tensor], None]
    parts: tuple[Any, ...] = ()

    def error(self, use: str) -> FreedWeightError:
        """The exception for a use that needs the values."""
        return FreedWeightError(
            f"{use} needs the values of {self.name}, which {self.graph} freed after packing them; "
            "fqcompile.restore(model) brings them back dequantised, free_weights=False keeps the "
            "originals from the start, and fqcompile.save(model, directory) saves what is packed"
        )


@torch._dynamo.assume_constant_result
def _for_another_backend() -> bool:
    """Whether Dynamo traces for a backend that would read the memory: eagerly there is an error."""
    compiler = InstructionTranslator.current_tx().output.compiler_fn
    return getattr(compiler, "_compiler_name", None) in _OTHER_BACKENDS


class Refills:
    """How often a freed weight was given values again; compiled graphs look out for a change."""

    count = 0


_OTHER_BACKENDS = ("inductor", "eager", "aot_eager", "aot_eager_decomp_partition", "cudagraphs")
_records: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_freed(value: object) -> bool:
    return type(value) is FreedWeight


def freed_by(weight: Tensor) -> FreedBy:
    """The record of a freed weight."""
    record: FreedBy = _records[weight]
    return record


class FreedWeight(nn.Parameter):
    """What a parameter becomes when it is freed. Copies and pickles hold dequantised values.

    Shape, dtype and the like are there; `to` and `half` work where they change nothing; `copy_`, on
    which load_state_dict relies, and `data =` make it an ordinary parameter again.

    Raises:
        FreedWeightError: in every operation that needs the values.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if torch.compiler.is_dynamo_compiling() and not _for_another_backend():
            # Dynamo records the operation as on any parameter.
            return super().__torch_function__(func, types, args, kwargs or {})
        return _run_eagerly(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]  # torch's stub names an argument Any
        record = freed_by(self)
        shape = "x".join(map(str, self.shape))
        return f"FreedWeight({record.name}, {shape}, {self.dtype}, freed by {record.graph})"

    def __format__(self, form: str) -> str:
        return format(repr(self), form)

    def as_subclass(self, cls: Any) -> Any:
        raise freed_by(self).error("as_subclass")  # does not come to __torch_function__

    # The views that Tensor has written in Python: Dynamo traces those of a subclass in this form.
    def split(self, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(Tensor.split, (), (self, *args), kwargs)

    def unflatten(self, *args: Any, **kwargs: Any) -> Any:
        return torch.unflatten(self, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = copied = self._dense_parameter()
            freed_by(self).share(self, copied)
        found: nn.Parameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._dense_parameter().__reduce_ex__(protocol)

    def _dense_parameter(self) -> nn.Parameter:
        return nn.Parameter(freed_by(self).dense(self), self.requires_grad)


# Dynamo's guards are built when the backend has returned, so they and later graphs see this class.
torch._dynamo.config.traceable_tensor_subclasses.add(FreedWeight)

_PROPERTIES = """shape dtype device layout requires_grad grad grad_fn is_leaf ndim nbytes itemsize
    is_cpu is_cuda is_meta is_sparse is_sparse_csr is_quantized is_nested is_mkldnn is_xpu is_mps
    output_nr retains_grad _version _base _backward_hooks _post_accumulate_grad_hooks"""
_METHODS = """size stride dim ndimension numel nelement element_size storage_offset is_contiguous
    is_floating_point is_complex is_signed is_conj is_neg is_inference get_device requires_grad_
    register_hook register_post_accumulate_grad_hook is_same_size __len__
    empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full
    _has_compatible_shallow_copy_type"""
_CONVERSIONS = "to type half float double bfloat16 cpu cuda"


def _functions(names: str) -> set[Any]:
    """Methods of Tensor and functions of torch with these names."""
    found = [getattr(owner, name, None) for owner in (Tensor, torch) for name in names.split()]
    return {function for function in found if callable(function)}


def _access(names: str, kind: str = "__get__") -> set[Any]:
    """What reading (or with another `kind`, setting) these properties calls."""
    return {getattr(getattr(Tensor, n), kind) for n in names.split() if hasattr(Tensor, n)}


_ABOUT_IT = _functions(_METHODS) | _access(_PROPERTIES)
_ABOUT_IT |= _access("requires_grad grad", "__set__") | _access("grad", "__delete__")
_ITSELF = _functions("detach") | _access("data")
_CONVERTING = _functions(_CONVERSIONS)


@torch.compiler.disable(reason="a weight that fqcompile has freed is read")
def _run_eagerly(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`func` where it needs no values, or brings them; else an error."""
    freed = [value for value in tree_leaves((args, kwargs)) if is_freed(value)]
    if func in _ABOUT_IT or _is_compiling():
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if args and args[0] is freed[0]:
        weight, *others = args
        if func in _ITSELF or _changes_nothing(func, weight, others, kwargs):
            return weight
        if func in _OVERWRITES and all(value is weight for value in freed):
            if len(freed) == 1:
                _OVERWRITES[func](weight, *others, **kwargs)
            return weight
    raise freed_by(freed[0]).error(_name(func))


def _is_compiling() -> bool:
    """Whether a compiler asks, which describes a tensor by whatever means it likes, and reads none.

    The flag alone says so from torch 2.13 on.
    """
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def _name(func: Any) -> str:
    """`half` of a method, `data` of a property."""
    name = str(getattr(func, "__name__", func))
    return str(func.__self__.__name__) if name in ("__get__", "__set__", "__delete__") else name


def _changes_nothing(
    func: Any, weight: Tensor, others: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a conversion asks for the device and dtype that the weight has: ask an empty one."""
    if func not in _CONVERTING:
        return False
    empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return func(empty, *others, **kwargs) is empty


def _copy_(weight: Tensor, *others: Any, **kwargs: Any) -> None:
    """As Tensor.copy_, which under grad mode refuses a parameter that requires grad."""
    dense = empty_for(weight)
    dense.requires_grad_(weight.requires_grad).copy_(*others, **kwargs)
    refill(weight, dense)


def _set_data(weight: Tensor, data: Tensor) -> None:
    refill(weight, data)


_OVERWRITES = {Tensor.copy_: _copy_, **dict.fromkeys(_access("data", "__set__"), _set_data)}


@plain_tensors()
def empty_for(weight: Tensor) -> Tensor:
    """A tensor without values in the form of a weight, freed or not."""
    places = weight.size(), weight.stride()
    return torch.empty_strided(*places, dtype=weight.dtype, device=weight.device)


@plain_tensors()
def free(weight: nn.Parameter, record: FreedBy) -> None:
    """Take the weight's storage away. Other tensors that share it keep it, and stay as they are."""
    hollow = empty_for(weight)
    hollow.untyped_storage().resize_(0)
    # Compiled by another backend, a kernel that takes its address raises instead of crashing.
    torch._C._set_throw_on_mutable_data_ptr(hollow)
    weight.data = hollow
    weight.__class__ = FreedWeight
    _records[weight] = record


@plain_tensors()
def refill(weight: Tensor, data: Tensor) -> None:
    """Make a freed weight an ordinary parameter again, with the storage of `data`."""
    weight.__class__ = nn.Parameter
    weight.data = data.detach()
    del _records[weight]
    Refills.count += 1
