"""w[ids]: recognize experts gathered from a constant stack, also through later views and casts.

w[ids].transpose(1, 2)        Gathered(w, ids, dims (0, 2, 1))
w[ids].chunk(2, dim=1)[0]     Gathered(w, ids, steps: narrow(1, 0, N/2))       w [E, N, K]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from fqcompile.passes.effects import has_effects
from fqcompile.passes.state import Step, example, same_shape
from fqcompile.weights.recipe import target_name

IsConstant = Callable[[object], bool]


@dataclass(frozen=True)
class Gathered:
    """Experts picked from `stack`, after `steps` on the stack itself.

    Attributes:
        num_ids: dimensions of ids; the gathered tensor has these and then the stack's others.
        dims: for each dimension of the node, which of those it is.
        shape: of the stack after `steps`.
        nodes: the gather, and what follows it.
    """

    stack: fx.Node
    ids: fx.Node
    num_ids: int
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    nodes: tuple[fx.Node, ...]
    steps: tuple[Step, ...] = ()

    def on_stack(self, dim: int) -> int | None:
        """The stack's dimension for the node's `dim`; None if it is a dimension of ids."""
        original = self.dims[dim] - self.num_ids
        return None if original < 0 else original + 1


def gathered(node: object, is_constant: IsConstant) -> Gathered | None:
    """The node read as experts picked from a constant stack, or None."""
    if not isinstance(node, fx.Node) or has_effects(node) or example(node) is None:
        return None
    found = _read(node, is_constant)
    return found and replace(found, nodes=(*found.nodes, node))


def _read(node: fx.Node, is_constant: IsConstant) -> Gathered | None:
    name = target_name(node.target)
    source = node.args[0] if node.args else None
    if name in ("getitem", "index_select"):
        return _gather(node, is_constant) or _part(node, is_constant)
    if name in ("contiguous", "clone", "alias") or _is_same_view(node, name, source):
        return gathered(source, is_constant)
    if name in ("to", "type", "float", "half", "bfloat16", "type_as"):
        found, value, before = gathered(source, is_constant), example(node), example(source)
        assert value is not None
        if before is None or before.device != value.device:
            return None  # offloaded: the packed stack and the op would be on different devices
        return found and replace(found, steps=(*found.steps, ("to", (value.dtype,))))
    if name in ("transpose", "mT", "permute", "getattr", "narrow"):
        found = gathered(source, is_constant)
        return None if found is None else _moved(node, name, found)
    return None


def _is_same_view(node: fx.Node, name: str, source: object) -> bool:
    """Whether the node is a view to the same shape, as the decomposition of matmul inserts."""
    before, after = example(source), example(node)
    if name not in ("view", "reshape", "expand") or before is None or after is None:
        return False
    return before.dtype == after.dtype and same_shape(before.shape, after.shape)


def _gather(node: fx.Node, is_constant: IsConstant) -> Gathered | None:
    """The gather w[ids] itself, by any call that expresses it."""
    match node.args:
        case (fx.Node() as stack, 0, ids) | (fx.Node() as stack, ids):
            ids = whole_rows(ids)
        case _:
            return None
    index, value = example(ids), example(stack)
    if index is None or value is None or not is_constant(stack) or is_constant(ids):
        return None
    if index.is_floating_point() or index.dtype.itemsize < 4 or index.dim() < 1 or value.dim() < 3:
        return None  # a mask: how many experts it picks depends on its values
    dims = tuple(range(index.dim() + value.dim() - 1))
    return Gathered(stack, ids, index.dim(), dims, tuple(map(int, value.shape)), ())


def whole_rows(index: Any) -> Any:
    """The ids of x[ids], x[ids, :] and x[ids, ...]; any other index unchanged."""
    if not isinstance(index, tuple) or not index:
        return index
    whole = all(part is Ellipsis or part == slice(None) for part in index[1:])
    return index[0] if whole else index


def _moved(node: fx.Node, name: str, found: Gathered) -> Gathered | None:
    """`found` after a call that moves dimensions, or narrows one."""
    rank = len(found.dims)
    args: list[Any] = list(node.args[1:])
    if node.kwargs or (name == "getattr" and args != ["mT"]):
        return None
    if name == "narrow":
        return _narrowed(found, *args)
    if name in ("mT", "getattr"):
        args = [-2, -1]
    if name == "permute":
        order = args[0] if len(args) == 1 else args
    else:
        order = list(range(rank))
        a, b = (int(dim) % rank for dim in args)
        order[a], order[b] = b, a
    return replace(found, dims=tuple(found.dims[int(dim) % rank] for dim in order))


def _narrowed(found: Gathered, dim: Any, start: Any, length: Any) -> Gathered | None:
    on_stack = found.on_stack(dim % len(found.dims))
    if on_stack is None or not all(isinstance(n, int) for n in (start, length)):
        return None
    shape = (*found.shape[:on_stack], length, *found.shape[on_stack + 1 :])
    if start == 0 and shape == found.shape:
        return found
    step = ("narrow", (on_stack, start, length))
    return replace(found, shape=shape, steps=(*found.steps, step))


def _part(node: fx.Node, is_constant: IsConstant) -> Gathered | None:
    """A chunk of the gathered rows, or a slice of them."""
    if len(node.args) != 2:
        return None
    source, index = node.args
    if isinstance(source, fx.Node) and target_name(source.target) in ("chunk", "split"):
        pieces = source.meta.get("example_value")
        if not isinstance(index, int):
            return None
        return _piece(gathered(source.args[0], is_constant), pieces, index)
    found = gathered(source, is_constant)
    if found is None or not isinstance(index, tuple):
        return None
    return _sliced(found, index)


def _piece(found: Gathered | None, pieces: Sequence[Tensor] | None, index: int) -> Gathered | None:
    if found is None or pieces is None or not isinstance(pieces, list | tuple):
        return None
    index %= len(pieces)
    dim = next((d for d in range(pieces[0].dim()) if _varies(found, pieces, d)), None)
    if dim is None:
        return None
    start = sum(int(piece.shape[dim]) for piece in pieces[:index])
    return _narrowed(found, dim, start, int(pieces[index].shape[dim]))


def _varies(found: Gathered, pieces: Sequence[Tensor], dim: int) -> bool:
    """Whether the pieces are adjacent along a dimension of the stack."""
    on_stack = found.on_stack(dim)
    if on_stack is None or len(pieces) < 2:
        return False
    return sum(int(piece.shape[dim]) for piece in pieces) == found.shape[on_stack]


def _sliced(found: Gathered, index: tuple[Any, ...]) -> Gathered | None:
    if not all(item is Ellipsis or isinstance(item, slice) for item in index):
        return None
    rank = len(found.dims)
    dots = index.index(Ellipsis) if Ellipsis in index else len(index)
    tail = index[dots + 1 :]
    dims = [*range(dots), *range(rank - len(tail), rank)]
    result: Gathered | None = found
    for dim, part in zip(dims, (*index[:dots], *tail), strict=True):
        if part == slice(None):
            continue
        on_stack = found.on_stack(dim)
        if on_stack is None or result is None or part.step not in (None, 1):
            return None
        if not all(end is None or isinstance(end, int) for end in (part.start, part.stop)):
            return None
        start, stop, _ = part.indices(found.shape[on_stack])
        result = _narrowed(result, dim, start, max(0, stop - start))
    return result
