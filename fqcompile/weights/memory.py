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
from fqcompile.kernels.op import dequantize, rows
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
# The size of the storage in bytes. It is negative so that C code that reads the bytes whatever the
# address is, as torch.jit.save does, raises an error instead of crashing or saving zeros.
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
        weight: codes and scales, in the orientation of the weight that was packed.
        name: the parameter's name, for messages; "" if unknown.
        number: identifies the values: unique among all memories, and new after each write.
    """

    __slots__ = ("name", "number", "weight")

    def __init__(self, weight: QuantizedTensor, name: str = "") -> None:
        self.weight, self.name, self.number = weight, name, next(_numbers)

    @property
    def root(self) -> "Memory":
        return self

    def put(self, new: QuantizedTensor) -> None:
        """Replace the values, in place if they fit, because compiled graphs hold the tensors.

        If they do not fit, the tensors of `new` are used.
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
    """Rows of a matrix or one expert, computed by `take` again after each write to the whole."""

    __slots__ = ("_number", "_take", "_taken", "whole")

    def __init__(
        self, whole: "Memory | MemoryPart", take: Callable[[QuantizedTensor], QuantizedTensor]
    ) -> None:
        # Now, not on first use: while a graph is traced, that would happen outside of the graph.
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
    """ŵ [N, K] or [E, N, K], dequantized by a kernel that knows the layout."""
    f, kernel = weight.format, _reader(weight.format)
    each = weight.unbind() if f.experts else [weight]
    found = [
        dequantize(*one.tensors, f.bits, f.levels, f.group_size, f.rows, f.k, dtype, kernel)
        for one in each
    ]
    return torch.stack(found) if f.experts else found[0]


def some_rows(weight: QuantizedTensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """ŵ[ids], [..., K], of a matrix [N, K] and ids [...] of int32 or int64, none below zero."""
    f, kernel = weight.format, _reader(weight.format)
    form = (f.bits, f.levels, f.group_size, f.rows, f.k)
    found: Tensor = rows(*weight.tensors, ids, *form, dtype, kernel)
    return found


def _reader(format: Format) -> str:
    """The name of a kernel that knows the layout."""
    return next(t.name for t in TEMPLATES.values() if t.layout.name == format.layout)


def values(memory: Memory | MemoryPart, dtype: torch.dtype) -> Tensor:
    """The dequantized weight, contiguous, in the shape of the weight that was packed."""
    w_hat = matrices(memory.weight, dtype)
    return w_hat.transpose(-2, -1).contiguous() if memory.weight.format.transposed else w_hat


class Lifetime:
    """An object that lives as long as the values of a tensor, as a target for weak references.

    `Module.to` cannot swap a tensor that has weak references itself. Pickled, this is an empty
    OrderedDict, which every loader of PyTorch accepts.
    """

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()


def never_compiled(function: Code) -> Code:
    """A decorator: Dynamo runs the function, and everything it calls, without compiling it.

    After a graph break Dynamo also compiles functions that the rest of the frame calls. PyTorch
    calls these ones itself, and Dynamo would see their tensors only in part.
    """
    not_for_dynamo(function.__code__)
    return function


class NoMemory(Tensor):
    """A packed weight, or a view of one.

    Attributes:
        memory: that of the weight; None if it is not known which weight it is.
    """

    memory: Memory | MemoryPart | None
    lifetime: Lifetime

    @classmethod
    def shaped(cls, place: Place, dtype: torch.dtype, device: torch.device) -> Self:
        """A tensor without attributes yet; C code that asks for a mutable address gets an error."""
        if torch.is_inference_mode_enabled():  # its tensors cannot be views of others
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
        """Its place in the weight that was packed."""
        return Place(self.size(), self.stride(), self.storage_offset())

    def untyped_storage(self) -> torch.UntypedStorage:
        """A storage whose address is an error with the remedy, as safetensors asks for it."""
        storage = super().untyped_storage()
        if type(storage) is torch.UntypedStorage:
            storage.__class__ = _Storage
            storage.dense_bytes = self.numel() * self.dtype.itemsize  # type: ignore[attr-defined]
        return storage

    def other_shape(self, values: Tensor) -> FineQuantError:
        """The error for writing values of another shape to it."""
        name = self._weight_name()
        return FineQuantError(
            f"a packed weight of shape {tuple(self.shape)}{f', {name},' if name else ''} got "
            f"values of shape {tuple(values.shape)}; the shapes must be equal: call "
            "fqcompile.restore(model) to give it another shape"
        )

    def _weight_name(self) -> str:
        return self.memory.name if self.memory is not None else ""

    def numpy(self, *, force: bool = False) -> Any:
        raise no_memory(self._weight_name())

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise no_memory(self._weight_name())

    __dlpack__ = apply_ = map_ = map2_ = storage = _typed_storage = _refuse


def lifetime(weight: Tensor) -> Lifetime:
    """The object to reference weakly for this weight; swapping tensors moves it with the values."""
    if isinstance(weight, NoMemory):
        return weight.lifetime
    attributes = vars(weight)
    if type(attributes.get(_LIFETIME)) is not Lifetime:
        attributes.pop(_LIFETIME, None)  # left over from pickling
    found: Lifetime = attributes.setdefault(_LIFETIME, Lifetime())
    return found


class _Storage(torch.UntypedStorage):
    dense_bytes: int

    def data_ptr(self) -> int:
        raise no_memory()

    def nbytes(self) -> int:
        """The bytes that a dense weight would have."""
        return self.dense_bytes


def no_memory(name: str = "") -> FineQuantError:
    """The error for a request of the memory of the parameter `name`, or of a view of it."""
    return FineQuantError(
        f"a packed weight{f', {name},' if name else ''} has no memory of its own that could be "
        "read or written as a dense tensor: save the model with fqcompile.save(model, directory), "
        "or torch.save its state_dict, or make it dense by fqcompile.restore(model); to save an "
        "adapter of peft on it, call save_pretrained(directory, save_embedding_layers=False); to "
        "read a view, copy it by clone()"
    )


def refuse_trace(arguments: object) -> None:
    """Check the arguments of a call while torch.jit.trace is recording modules in any thread.

    Raises:
        FineQuantError: an argument is a packed weight of these modules, or a view of one.
    """
    known = [part for pair in (traced_modules() or {}).items() for part in pair]
    held: list[Any] = [w for m in known if isinstance(m, nn.Module) for w in m._parameters.values()]
    recorded = {w.memory.root for w in held if isinstance(w, NoMemory) and w.memory is not None}
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, NoMemory) and leaf.memory is not None and leaf.memory.root in recorded:
            name = leaf.memory.name
            raise FineQuantError(
                f"torch.jit.trace cannot record a packed weight{f', {name}' if name else ''}: "
                "traced weights are saved and exported as dense memory, and it has none. Make the "
                "model dense by fqcompile.restore(model) first, or use torch.export.export"
            )
