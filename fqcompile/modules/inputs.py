"""WeightInputs: what a model multiplies its weights with, told while it runs eagerly.

linear(x, w), x @ w.t(), addmm, mv       ->   collect(weight, 0, x)
linear(x, w[e]), bmm(x, w)               ->   collect(weight, e, x[e])
_grouped_mm(x, w, offsets), bmm(x, w[ids])   ->   the same, with the rows of x that expert e has

It stands below the modules, at PyTorch's operators: there each of these is one of a few, whatever
the model calls, and a weight is known by where it lies in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fqcompile.distributed.shards import local_part
from fqcompile.modules.weights import ModuleWeight
from fqcompile.torch_compat import TorchDispatchMode, memory_id
from fqcompile.weights.recipe import target_name

Collect = Callable[[ModuleWeight, int, Tensor], None]
Product = tuple[Tensor, Tensor]  # x [..., M, K], w [..., K, N]
_BIASED = frozenset(("addmm", "baddbmm", "addmv"))
_GROUPED = frozenset(("_grouped_mm", "transformers.grouped_mm_fallback"))
_PRODUCTS = _BIASED | _GROUPED | {"mm", "bmm", "mv", "linear"}
_PICKS = frozenset(("index", "index_select"))
_COPIES = frozenset(("_to_copy", "clone"))


@dataclass(frozen=True)
class _Place:
    """Where matrices of a weight lie: the weight itself, a cast of it, or a copy of some experts.

    Attributes:
        memory: alive or not; what lies there later is something else.
        start, strides, shape: of [E, N, K] in the storage, in elements; E = 1 for a matrix.
        experts: which of the weight's each of them is.
    """

    weight: ModuleWeight
    memory: StorageWeakRef
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    experts: Sequence[int]

    @classmethod
    def of(cls, weight: ModuleWeight, tensor: Tensor, experts: Sequence[int]) -> "_Place":
        """A tensor that holds these experts as the parameter does, [N, K] or [K, N] each."""
        matrices = tensor.mT if weight.transposed else tensor
        if matrices.dim() == 2:  # no view of it starts as far as the next matrix would
            span = sum((n - 1) * s for n, s in zip(matrices.shape, matrices.stride(), strict=True))
            strides = (span + 1, *matrices.stride())
        else:
            strides = matrices.stride()
        memory, shape = StorageWeakRef(tensor.untyped_storage()), matrices.shape[-2:]
        return cls(weight, memory, int(tensor.storage_offset()), tuple(shape), strides, experts)

    def is_at(self, tensor: Tensor) -> bool:
        """Whether the tensor begins in this memory."""
        distance = tensor.storage_offset() - self.start
        return 0 <= distance < self.strides[0] * len(self.experts) and not self.memory.expired()

    def read_as(self, w: Tensor) -> Sequence[int] | None:
        """The expert of each matrix in w [..., K, N]; None where its columns are not K's."""
        (n, k), (each, rows, columns) = self.shape, self.strides
        if w.shape[-2] != k or w.stride()[-2:] != (columns, rows) or w.shape[-1] > n:
            return None
        first = (w.storage_offset() - self.start) // each
        if w.dim() == 2 or w.stride(0) == 0:
            return [self.experts[first]] * (1 if w.dim() == 2 else len(w))
        return self.experts[first : first + len(w)] if w.stride(0) == each else None

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether the tensor is all of it, in the order of its parameter."""
        matrices = tensor.mT if self.weight.transposed else tensor
        whole = (*([len(self.experts)] if tensor.dim() == 3 else []), *self.shape)
        strides = self.strides[-matrices.dim() :]
        return tuple(matrices.shape) == whole and matrices.stride() == strides


class WeightInputs(TorchDispatchMode):
    """A context in which `collect(weight, expert, x)` gets the rows that each weight meets.

    x is [..., K], or [K]; of a matrix the expert is 0. Of a sharded weight, all are local parts.
    A product that reads some of the columns of a weight is not told.
    """

    def __init__(self, weights: Iterable[ModuleWeight], collect: Collect) -> None:
        super().__init__()
        self._collect = collect
        self._places: dict[int, list[_Place]] = {}
        for found in weights:
            stack = found.weight.shape[:-2]
            self._add(_Place.of(found, found.weight, range(stack[0] if stack else 1)))

    def _add(self, place: _Place) -> None:
        self._places.setdefault(place.memory.cdata, []).append(place)

    def _find(self, tensor: object) -> _Place | None:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return None
        places = self._places.get(memory_id(tensor), ())
        return next((place for place in places if place.is_at(tensor)), None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out, name = func(*args, **(kwargs or {})), target_name(func)
        if name in _PRODUCTS:
            given = [*args, *(kwargs or {}).values()]
            self._multiplied(name, [local_part(a) if isinstance(a, Tensor) else a for a in given])
        elif name in _PICKS | _COPIES and isinstance(out, Tensor):
            self._copied(name, args, local_part(out))
        return out

    def _multiplied(self, name: str, given: list[Any]) -> None:
        for x, w in _factors(given[name in _BIASED :], name):
            place = self._find(w)
            experts = None if place is None else place.read_as(w)
            if place is None or experts is None:
                continue
            if name in _GROUPED and x.dim() < w.dim():  # else every row meets its whole matrix
                ends = given[2].tolist()
                rows = [x[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            else:
                rows = [x] if len(experts) == 1 else list(x.unbind())
            for expert in dict.fromkeys(experts):
                own = [r for e, r in zip(experts, rows, strict=True) if e == expert]
                joined = own[0] if len(own) == 1 else torch.cat(own)
                if joined.numel():
                    self._collect(place.weight, expert, joined)
            return

    def _copied(self, name: str, args: tuple[Any, ...], out: Tensor) -> None:
        source = local_part(args[0])
        place = self._find(source)
        if place is None or not place.is_whole(source):
            return
        experts = place.experts
        if name in _PICKS:
            ids = args[-1] if isinstance(args[-1], Tensor) else args[1][0]
            if source.dim() < 3 or not _is_ids(ids, args):
                return
            experts = [experts[i] for i in ids.flatten().tolist()]
            out = out.flatten(0, ids.dim() - 1)
        self._add(_Place.of(place.weight, out, experts))


@contextmanager
def without_shortcuts() -> Iterator[None]:
    """Every product is one of an operator that is seen, with a weight that is known.

    PyTorch's transformer layers call their linears, and no operator that has them all inside; and
    autocast casts weights each time, not once for all that runs in a caller's range.
    """
    before = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before[0])
        torch.set_autocast_cache_enabled(before[1])


def _factors(pair: list[Any], name: str) -> Iterator[Product]:
    """The two ways to read a product of two matrices, either of which may be the weight."""
    a, b = pair[:2]
    if name == "linear":
        yield a, b.mT
    elif b.dim() == 1:
        yield b[None], a.mT
    else:
        yield a, b
        yield b.mT, a.mT


def _is_ids(ids: object, args: tuple[Any, ...]) -> bool:
    """Whether these are numbers of experts, along the first dimension alone."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        return False
    return args[1] == 0 if isinstance(args[1], int) else len(args[1]) == 1
