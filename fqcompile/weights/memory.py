"""Memory: the codes and scales that a packed weight and its views share; NoMemory: such tensors.

A write replaces or overwrites the codes and scales here, so every view sees it, even if the format
changes. The tensors themselves have no storage to read or write; requests for an address raise.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate, count
from operator import mul
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import SymInt, Tensor, nn

from fqcompile.errors import FineQuantError
from fqcompile.kernels.op import dequantize
from fqcompile.kernels.registry import TEMPLATES
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.torch_compat import (
    make_wrapper_subclass,
    not_for_dynamo,
    refuse_mutable_address,
    traced_modules,
    tree_leaves,
)

Code = TypeVar("Code", bound=Callable[..., Any])
_LIFETIME = "_fqcompile_lifetime"  # attribute of a dense tensor
# Bytes of the storage: no number to C, so that what would read them there, as torch.jit.save does
# whatever the address is, raises, and neither crashes nor writes zeros.
_NO_SIZE = -(1 << 63)
_numbers = count(1)


class Place(NamedTuple):
    """Size, stride and offset of a view in the packed weight, as `torch.as_strided` takes them."""

    size: Sequence[int]
    stride: Sequence[int]
    offset: int | SymInt = 0


def whole_place(size: Sequence[int]) -> Place:
    """The place of a contiguous weight."""
    lengths = [max(length, 1) for length in size[:0:-1]]
    return Place(size, tuple(accumulate(lengths, mul, initial=1))[::-1])


class Memory:
    """The codes and scales of a whole weight.

    Attributes:
        weight: as the weight that was packed shows its matrices.
        name: of the parameter, for messages; "" where it is not known.
        number: of the values. No two memories have the same, and a write gives a new one.
    """

    __slots__ = ("name", "number", "weight")

    def __init__(self, weight: QuantizedTensor, name: str = "") -> None:
        self.weight, self.name, self.number = weight, name, next(_numbers)

    @property
    def root(self) -> "Memory":
        return self

    def put(self, new: QuantizedTensor) -> None:
        """Other values: in the same memory where they fit, as compiled graphs hold it.

        Else the tensors given become the memory.
        """
        old = self.weight
        fit = (new.format, new.scale.dtype, new.scale.device) == (
            old.format,
            old.scale.dtype,
            old.scale.device,
        )
        self.number = next(_numbers)  # a concurrent reader that compares numbers sees the change
        if fit:
            old.qweight.copy_(new.qweight)
            old.scale.copy_(new.scale)
        else:
            self.weight = new
        self.number = next(_numbers)


class MemoryPart:
    """Rows of a matrix or one expert: `take` makes them, again after each write to the whole."""

    __slots__ = ("_number", "_take", "_taken", "whole")

    def __init__(
        self, whole: "Memory | MemoryPart", take: Callable[[QuantizedTensor], QuantizedTensor]
    ) -> None:
        # At once: where a graph is traced, what is made later would be made outside of it.
        self.whole, self._take = whole, take
        self._taken, self._number = take(whole.weight), whole.number

    @property
    def weight(self) -> QuantizedTensor:
        number = self.whole.number
        if number != self._number:
            self._taken, self._number = self._take(self.whole.weight), number
        return self._taken

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def number(self) -> int:
        return self.whole.number

    @property
    def root(self) -> Memory:
        return self.whole.root


def matrices(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """ŵ [N, K] or [E, N, K], by the operator that knows the layout."""
    f, kernel = weight.format, _reader(weight.format)
    each = weight.unbind() if f.experts else [weight]
    found = [
        dequantize(*one.tensors, f.bits, f.levels, f.group_size, f.rows, f.k, dtype, kernel)
        for one in each
    ]
    return torch.stack(found) if f.experts else found[0]


def _reader(format: Format) -> str:
    """A kernel that knows the layout."""
    return next(t.name for t in TEMPLATES.values() if t.layout.name == format.layout)


def values(memory: Memory | MemoryPart, dtype: torch.dtype) -> Tensor:
    """The dense weight in the shape of the one that was packed, contiguous as that was."""
    w_hat = matrices(memory.weight, dtype)
    return w_hat.transpose(-2, -1).contiguous() if memory.weight.format.transposed else w_hat


class Lifetime:
    """What lives as long as the values of a tensor, for weak references.

    A tensor that itself is referred to weakly cannot be exchanged, as `Module.to` does. Pickled,
    it is an empty container that every loader of PyTorch takes.
    """

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()


def never_compiled(function: Code) -> Code:
    """Runs as it is, with all that it calls, where Dynamo hands a frame back to Python.

    What follows in such a frame is compiled, called functions too; these are called by PyTorch, and
    make tensors of which Dynamo would see half.
    """
    not_for_dynamo(function.__code__)
    return function


class NoMemory(Tensor):
    """A packed weight, or a view of one.

    Attributes:
        memory: of the weight; None where it is not known of which.
    """

    memory: Memory | MemoryPart | None
    lifetime: Lifetime

    @classmethod
    def shaped(cls, place: Place, dtype: torch.dtype, device: torch.device) -> Self:
        """One without attributes; what asks in C for its address, to write there, is told."""
        if torch.is_inference_mode_enabled():  # what it makes could be no view of what it did not
            with torch.inference_mode(False):
                return cls.shaped(place, dtype, device)
        size, stride, offset = place
        self = make_wrapper_subclass(
            cls,
            size,
            strides=stride,
            storage_offset=offset,
            dtype=dtype,
            device=device,
            storage_size=_NO_SIZE,
        )
        refuse_mutable_address(self)
        return self

    @property
    def place(self) -> Place:
        """In the weight that was packed."""
        return Place(self.size(), self.stride(), self.storage_offset())

    def untyped_storage(self) -> torch.UntypedStorage:
        """Whoever asks it for an address, as safetensors does, is told what to do."""
        storage = super().untyped_storage()
        if type(storage) is torch.UntypedStorage:
            storage.__class__ = _Storage
            storage.dense_bytes = self.numel() * self.dtype.itemsize  # type: ignore[attr-defined]
        return storage

    def other_shape(self, values: Tensor) -> FineQuantError:
        """The error for writing values of another shape to it."""
        name = self._weight_name()
        return FineQuantError(
            f"a packed weight of shape {tuple(self.shape)}{f', {name},' if name else ''} got one "
            f"of {tuple(values.shape)}; they must be equal: call fqcompile.restore(model) to give "
            "it another shape"
        )

    def _weight_name(self) -> str:
        return self.memory.name if self.memory is not None else ""

    def numpy(self, *, force: bool = False) -> Any:
        raise no_memory(self._weight_name())

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise no_memory(self._weight_name())

    __dlpack__ = apply_ = map_ = map2_ = storage = _typed_storage = _refuse


def lifetime(weight: Tensor) -> Lifetime:
    """What to refer to weakly for this weight: it goes with the values when they are exchanged."""
    if isinstance(weight, NoMemory):
        return weight.lifetime
    attributes = vars(weight)
    if type(attributes.get(_LIFETIME)) is not Lifetime:
        attributes.pop(_LIFETIME, None)  # of a pickled tensor
    found: Lifetime = attributes.setdefault(_LIFETIME, Lifetime())
    return found


class _Storage(torch.UntypedStorage):
    dense_bytes: int

    def data_ptr(self) -> int:
        raise no_memory()

    def nbytes(self) -> int:
        """Bytes that a dense weight would take."""
        return self.dense_bytes


def no_memory(name: str = "") -> FineQuantError:
    """The error for a request of the memory of the parameter `name`, or of a view of it."""
    return FineQuantError(
        f"a packed weight{f', {name},' if name else ''} has no memory of its own to be read or "
        "written as a dense one: save the model with fqcompile.save(model, directory), or "
        "torch.save its state_dict, or make it dense again by fqcompile.restore(model); of a view "
        "that is only read, take a copy by clone()"
    )


def refuse_trace(arguments: object) -> None:
    """For calls while some thread's torch.jit.trace, or what exports by it, records modules.

    Raises:
        FineQuantError: one of the arguments is a packed weight of those, or a view of one.
    """
    known = [part for pair in (traced_modules() or {}).items() for part in pair]
    held: list[Any] = [w for m in known if isinstance(m, nn.Module) for w in m._parameters.values()]
    recorded = {w.memory.root for w in held if isinstance(w, NoMemory) and w.memory is not None}
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, NoMemory) and leaf.memory is not None and leaf.memory.root in recorded:
            name = leaf.memory.name
            raise FineQuantError(
                f"torch.jit.trace was to record a packed weight{f', {name}' if name else ''}: what "
                "is traced is saved and exported as dense memory, and it has none. Make the model "
                "dense by fqcompile.restore(model) first, or use torch.export.export"
            )
