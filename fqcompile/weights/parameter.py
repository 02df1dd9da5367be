"""PackedWeight: codes and scales that replace a dense weight in a module.

A tensor subclass of the weight's shape and dtype whose storage is two other tensors. Matmuls run on
the codes (see `parameter_matmuls`); operators without a packed form get the dequantized weight.
torch.compile splits it into the two tensors, under every backend.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from multiprocessing.reduction import ForkingPickler
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fqcompile.errors import FineQuantError
from fqcompile.kernels.op import CACHE_TAG
from fqcompile.kernels.registry import in_kernel_layout, in_plain_layout
from fqcompile.tensor.chunks import plain_tensors
from fqcompile.tensor.format import UNIFORM, Format
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.torch_compat import no_torch_function, traced_modules
from fqcompile.weights.memory import (
    Lifetime,
    Memory,
    MemoryPart,
    NoMemory,
    Place,
    matrices,
    never_compiled,
    refuse_trace,
    whole_place,
)

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
# {full name of an operator: its handler}; None: the handler of all others. See `implements`.
HANDLERS: dict[str | None, Handler] = {}


@cache
def handler_of(func: Any) -> Handler:
    """The handler of an operator, cached because building its name takes a microsecond."""
    return HANDLERS.get(str(func)) or HANDLERS[None]


# Compiled code flattens and rebuilds packed weights and views as these files do.
_FILES = map(Path(__file__).with_name, ("parameter.py", "dense_view.py", "memory.py"))
_CODE = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()[:16]
# Added to the address of the codes: a read there is a fault of the processor or the driver.
_NO_ADDRESS = 1 << 63


class PackedWeight(NoMemory):
    """See the module's docstring. Views of one share its memory.

    Attributes:
        memory: codes and scales; for a view of rows or an expert, a part of the whole weight's.
        flipped: its matrices are the transposes of those that `memory.weight` describes.
        ids: the index [P] if experts have been gathered; the shape is then [P, ...].
    """

    memory: Memory | MemoryPart
    flipped: bool
    ids: Tensor | None

    @staticmethod
    def __new__(
        cls: type["PackedWeight"], weight: Tensor, requires_grad: bool = False
    ) -> "PackedWeight":
        """The weight as a parameter, as `nn.Parameter(weight, requires_grad)` makes it.

        Raises:
            FineQuantError: `weight` is not a PackedWeight.
        """
        if not isinstance(weight, PackedWeight):
            raise FineQuantError(
                f"a {type(weight).__name__} {tuple(weight.shape)} cannot replace a packed weight: "
                "it is not known how to quantize it; copy_ it into the packed weight, or call "
                "fqcompile.restore(model) first"
            )
        return nn.Parameter(weight, requires_grad)  # type: ignore[return-value]

    @classmethod
    def showing(
        cls,
        memory: Memory | MemoryPart,
        dtype: torch.dtype,
        place: Place,
        *,
        flipped: bool = False,
        ids: Tensor | None = None,
    ) -> "PackedWeight":
        """A tensor that shows `memory` at `place`."""
        self = cls.shaped(place, dtype, memory.weight.qweight.device)
        self.memory, self.flipped, self.ids, self.lifetime = memory, flipped, ids, Lifetime()
        return self

    @classmethod
    def whole(cls, weight: QuantizedTensor, dtype: torch.dtype, name: str = "") -> "PackedWeight":
        """A packed weight with a memory of its own, in the layout that `weight` has."""
        return cls.showing(Memory(weight, name), dtype, whole_place(weight.format.shape))

    @classmethod
    @plain_tensors()
    def of(cls, weight: QuantizedTensor, dtype: torch.dtype, name: str = "") -> "PackedWeight":
        """A packed weight in the layout of the kernel for its device and dtype.

        Args:
            weight: in the plain layout.
            dtype: dtype of the dense weight, and so of the activations.
            name: name of the parameter, for messages.
        """
        return cls.whole(in_kernel_layout(weight, dtype), dtype, name)

    # attrgetter runs in C; these are read in every call.
    qweight = property(attrgetter("memory.weight.qweight"))
    scale = property(attrgetter("memory.weight.scale"))
    # The version of the values. PyTorch's counter restarts when `Module.to` swaps a parameter, and
    # does not count writes through a view in inference mode.
    _version = property(attrgetter("memory.number"))

    @property
    def format(self) -> Format:
        """The format of this view's codes and scales."""
        form = self.memory.weight.format
        return form.flipped if self.flipped else form

    @property
    def packed(self) -> QuantizedTensor:
        """Codes and scales; those of the whole stack if experts were gathered."""
        weight = self.memory.weight
        return replace(weight, format=weight.format.flipped) if self.flipped else weight

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Format, bool, torch.dtype]]:
        names = ["qweight", "scale"] + (["ids"] if self.ids is not None else [])
        return names, (self.memory.weight.format, self.flipped, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor],
        context: tuple[Format, bool, torch.dtype],
        size: Sequence[int],
        stride: Sequence[int],
    ) -> "PackedWeight":
        form, flipped, dtype = context
        memory = Memory(QuantizedTensor(inner["qweight"], inner["scale"], form))
        place = Place(size, stride)
        return PackedWeight.showing(memory, dtype, place, flipped=flipped, ids=inner.get("ids"))

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @classmethod
    @never_compiled
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if traced_modules() is not None:
            refuse_trace((args, kwargs))
        return handler_of(func)(func, args, kwargs or {})

    def __repr__(  # type: ignore[override]
        self, *, tensor_contents: Any = None
    ) -> str:
        f = self.format
        group = "column" if f.group_size >= f.k else f"groups of {f.group_size}"
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, {f.qtype.name}, {group}, layout={f.layout})"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle codes and scales in the plain layout, which every machine can read."""
        f, tensors = self.format, self.quantized().as_rows()
        parts = (*tensors, f.bits, f.group_size, (f.rows * max(1, f.experts), f.k), self.dtype)
        stack = (f.experts, f.transposed, f.scale_method)
        return rebuild_packed_weight, (*parts, *stack, isinstance(self, nn.Parameter), f.levels)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        if id(self) not in memo:
            copied, parameter = self.clone(), isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, requires_grad=False) if parameter else copied
        return memo[id(self)]  # type: ignore[no-any-return]

    @property
    def data(self) -> "PackedWeight":
        """The same memory. Assigned values are quantized into it, as by copy_.

        Values of another dtype or device give the weight that dtype and device, with new memory;
        another shape is an error, even one that copy_ would broadcast.
        """
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, values: Tensor) -> None:
        if values.shape != self.shape:
            raise self.other_shape(values)
        with torch.no_grad():
            alike = (values.dtype, values.device) == (self.dtype, self.device)
            if alike and isinstance(self, nn.Parameter):  # assigning to an alias must not write
                self.copy_(values)
                return
            moved = self.to(values.device, values.dtype, copy=True)
            moved.copy_(values)
            Tensor.data.__set__(self, moved)  # type: ignore[attr-defined]
        assert isinstance(moved, PackedWeight)
        self.memory, self.flipped, self.lifetime = moved.memory, moved.flipped, moved.lifetime

    def data_ptr(self) -> int:
        """An invalid address, since there are no dense values to read; it identifies the weight."""
        return int(self.qweight.data_ptr()) + (0 if self.is_meta else _NO_ADDRESS)

    def tolist(self) -> Any:
        return self.dequantized().tolist()

    def share_memory_(self) -> "PackedWeight":
        """Move codes and scales to shared memory."""
        self.qweight.share_memory_()
        self.scale.share_memory_()
        return self

    def is_shared(self) -> bool:
        return bool(self.qweight.is_shared())

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.packed_bytes

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes per element on average, so that `numel() * element_size()` is the packed size."""
        return self.packed_bytes / max(1, self.numel())

    def _stable_hash_for_caching(self) -> str:
        """The key in AOTAutograd's cache: everything its compiled code depends on."""
        inner = [(t.shape, t.stride(), t.dtype) for t in (self.qweight, self.scale)]
        outer = (self.shape, self.stride(), self.dtype, self.device, self.requires_grad)
        gathered = None if self.ids is None else self.ids.dtype
        return f"{CACHE_TAG} {_CODE} {outer} {self.__tensor_flatten__()} {inner} {gathered}"

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and scales, with the padding of the kernel's layout."""
        return self.memory.weight.nbytes

    def quantized(self) -> QuantizedTensor:
        """Codes and scales in the plain layout; of the whole stack if experts were gathered."""
        return in_plain_layout(self.packed)

    def dequantized(self) -> Tensor:
        """The dense tensor of this shape, dtype and device."""
        w_hat = matrices(self.memory.weight, self.dtype)
        w_hat = w_hat if self.ids is None else w_hat[self.ids]
        return w_hat.transpose(-2, -1) if self.format.transposed else w_hat


def rebuild_packed_weight(
    qweight: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    experts: int,
    transposed: bool,
    scale_method: str,
    is_parameter: bool,
    levels: str = UNIFORM,  # the only ones in files of earlier versions
) -> Tensor:
    """Called by `torch.load` and unpickling."""
    rows, k = shape[0] // max(1, experts), shape[1]
    form = Format(bits, group_size, rows, k, experts, transposed, scale_method, levels=levels)
    weight = PackedWeight.of(QuantizedTensor.of_rows(qweight, scale, form), dtype)
    return nn.Parameter(weight, requires_grad=False) if is_parameter else weight


torch.serialization.add_safe_globals([rebuild_packed_weight])


def _to_process(w: PackedWeight) -> tuple[Any, ...]:
    """Pickle a weight for another process, which shares the memory as it does for dense weights.

    Codes that were created only for the pickle would be freed before a spawned process opens them.
    """
    if w.memory is not w.memory.root or w.flipped or w.ids is not None:
        return w.__reduce_ex__(2)
    shown = (w.dtype, w.memory.root.name, isinstance(w, nn.Parameter))
    return _from_process, (*w.memory.weight.tensors, w.memory.weight.format, *shown)


def _from_process(
    qweight: Tensor, scale: Tensor, form: Format, dtype: torch.dtype, name: str, is_parameter: bool
) -> Tensor:
    w = PackedWeight.whole(QuantizedTensor(qweight, scale, form), dtype, name)
    return nn.Parameter(w, requires_grad=False) if is_parameter else w


ForkingPickler.register(PackedWeight, _to_process)
