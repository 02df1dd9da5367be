"""The inputs of a probe: random ids, sizes of many short sequences, and copies.

Integer inputs that index a table get random ids from a fixed seed, and symbolic sizes are those of
32 sequences of 16 ids, each of which begins with the begin token of the model. All other inputs are
those of the call, copied if the graph may write to them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from fqcompile.passes.state import GraphState, example, placeholders, same_shape
from fqcompile.quant.calibration import token_generator, token_ids
from fqcompile.torch_compat import hint_of, memory_id, size_at, size_within, symbol_of
from fqcompile.weights.recipe import CASTS, MOVING, target_name

ROWS = 512  # what there may be ids for, all runs together
RUN = 48  # a run costs as much as so many more ids: it reads all weights, and starts every kernel
TOKENS = 16  # per sequence: many short sequences tell more than a long one
_TABLE_READS = frozenset("embedding embedding_bag index_select getitem index".split())
_PICKS = frozenset(
    "gather take take_along_dim one_hot scatter scatter_add scatter_reduce "
    "index_add index_copy index_fill index_put".split()
)
_PLACING = frozenset("from_local to_local redistribute".split())  # DTensors
_ALIGNMENT = 16
_IDS = (torch.int32, torch.int64)
Nodes = Sequence[fx.Node]
Sizes = Mapping[Any, int]  # by symbol
Tables = Mapping[int, int]  # {position of ids: rows of the smallest table that they index}


def tables_of(state: GraphState, last: fx.Node) -> dict[int, int]:
    """{position of an input that is ids: rows of the smallest table that it indexes}.

    Nodes behind `last` are not run, and do not count.
    """
    inputs = placeholders(state.graph)
    rows = {i: _rows_of_table(state, node, last) for i, node in enumerate(inputs)}
    return {index: number for index, number in rows.items() if number}


def _rows_of_table(state: GraphState, node: fx.Node, last: fx.Node) -> int:
    """The rows of the smallest table that this input indexes; 0 if it indexes none.

    Nor are random ids for an input that indexes something else too: how far they may go is not
    known, and a GPU does not survive an index beyond the end.
    """
    ids = example(node)
    if ids is None or node in state.named or node in state.written:
        return 0
    if ids.dtype not in _IDS or not ids.dim():
        return 0
    tables = _tables_read_by(state, node, last)
    return min(shape[0] for shape in tables) if any(len(shape) == 2 for shape in tables) else 0


def _tables_read_by(state: GraphState, ids: fx.Node, last: fx.Node) -> list[tuple[int, ...]]:
    """Shapes of the constants that ids index, directly or through views; (0, 0) for all else."""
    found: list[tuple[int, ...]] = []
    for user in (user for user in ids.users if user < last):
        name = target_name(user.target)
        others = [node for node in user.all_input_nodes if node is not ids]
        tables = [node for node in others if node in state.constants and example(node) is not None]
        if name in _TABLE_READS and len(tables) == 1 and _looks_up(user, ids, name):
            found.append(tuple(map(int, tables[0].meta["example_value"].shape)))
        elif name.removeprefix("prim_") in MOVING | CASTS | _PLACING and [
            n for n in user.all_input_nodes if example(n) is not None
        ] == [ids]:
            found += _tables_read_by(state, user, last)
        elif _picks(user, ids, name.rstrip("_")):
            found.append((0, 0))
    return found


def _picks(read: fx.Node, ids: fx.Node, name: str) -> bool:
    """Whether ids say what is read or written, and are not themselves what is read."""
    is_read = ids in (*read.args[:1], read.kwargs.get("input"))
    return name == "one_hot" or (name in _PICKS | _TABLE_READS and not is_read)


def _looks_up(read: fx.Node, ids: fx.Node, name: str) -> bool:
    """Whether a read takes rows by ids: they are neither what is read nor where bags begin.

    Where bags begin would not fit to ids of another number, so these stay as in the call.
    """
    if name == "embedding":
        return True
    if name == "embedding_bag":
        return [*read.args[2:3], read.kwargs.get("offsets")] in ([None], [None, None])
    if name == "index_select":
        return 0 in (*read.args[1:2], read.kwargs.get("dim"))
    index = read.args[1]
    return (index[0] if isinstance(index, tuple | list) else index) is ids


def sizes_of(inputs: Nodes, args: Sequence[Any]) -> dict[Any, int]:
    """The values that symbolic sizes have in this call."""
    found: dict[Any, int] = {}
    for node, arg in zip(inputs, args, strict=True):
        fake = node.meta.get("example_value")
        pairs: Iterable[tuple[Any, Any]] = [(fake, arg)]
        if isinstance(fake, Tensor) and isinstance(arg, Tensor):
            pairs = zip(fake.shape, arg.shape, strict=True)
        found |= {symbol_of(s): hint_of(size) for s, size in pairs if symbol_of(s)}
    return found


def many_short(inputs: Nodes, own: Sizes, tables: Tables) -> dict[Any, int]:
    """`own` sizes, with those that say how many ids there are changed to many short sequences."""
    found: dict[Any, int] = {}
    for fake in (example(inputs[index]) for index in tables):
        assert fake is not None
        *batch, length = fake.shape
        if symbol_of(length):
            found.setdefault(symbol_of(length), size_within(length, TOKENS))
        sequences = -(-ROWS // max(1, size_at(length, {**own, **found})))
        for size in (size for size in batch if symbol_of(size)):
            found.setdefault(symbol_of(size), size_within(size, min(sequences, ROWS // TOKENS)))
    return {**own, **found}


def has_places(inputs: Nodes, arguments: Iterable[int], tables: Tables) -> bool:
    """Whether an argument may hold places in the ids, which would not fit to ids of other sizes.

    Such as where each sequence begins, or how long it is: integers in one dimension that has not
    the length of the ids.
    """
    lengths = [inputs[index].meta["example_value"].shape[-1:] for index in tables]
    for index in arguments:
        fake = example(inputs[index])
        if index in tables or fake is None or fake.dim() != 1 or not inputs[index].users:
            continue
        if fake.dtype in _IDS and not any(same_shape(fake.shape, length) for length in lengths):
            return True
    return False


def each_run(
    inputs: Nodes,
    args: Sequence[Any],
    sizes: Sizes,
    tables: Tables,
    written: Collection[int],
    begin: int | None,
) -> Iterator[list[Any]]:
    """Yield the inputs of each run: as many as cost no more than one of ROWS ids.

    `written`: positions of inputs that a run may write to. `begin`: the begin token. It is for the
    largest table: smaller ones are of other things than tokens, such as their positions and types.
    """
    generator, shapes = token_generator(), [_shape(node, sizes) for node in inputs]
    count = max((prod(shapes[index]) for index in tables), default=ROWS)
    moved = [i for i in written if i not in tables and isinstance(args[i], Tensor)]
    originals = [_resized(args[i], shapes[i]) for i in moved]
    memory: dict[int, Tensor] = {}
    for _ in range(max(1, (ROWS + RUN) // (count + RUN))):
        given = [
            size_at(node.meta["example_value"], sizes) if _is_symbolic(node) else arg
            for node, arg in zip(inputs, args, strict=True)
        ]
        for index, rows in tables.items():
            first = begin if rows == max(tables.values()) else None
            ids = token_ids(shapes[index], rows, generator, first)
            given[index] = ids.to(args[index].device, args[index].dtype)
        for index, tensor in zip(moved, copied(originals, memory), strict=True):
            given[index] = tensor
        yield given


def _is_symbolic(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymInt | torch.SymFloat)


def _shape(node: fx.Node, sizes: Sizes) -> tuple[int, ...]:
    fake = example(node)
    return () if fake is None else tuple(size_at(size, sizes) for size in fake.shape)


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor cut, or repeated, along each dimension to the given shape."""
    for dim, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if old != new:
            tensor = tensor.index_select(dim, torch.arange(new, device=tensor.device) % old)
    return tensor


def copied(tensors: Sequence[Tensor], memory: dict[int, Tensor]) -> list[Tensor]:
    """Copies of the tensors, which share memory with each other as the tensors do.

    `memory`: that of the copies, by storage; copies of the same tensors that lie there go.
    """
    spans: dict[int, tuple[int, int]] = {}
    for tensor in filter(_is_plain, tensors):
        start, stop = _span(tensor)
        low, high = spans.get(memory_id(tensor), (start, stop))
        spans[memory_id(tensor)] = (min(low, start), max(high, stop))
    own = {memory_id(tensor): tensor for tensor in filter(_is_plain, tensors)}
    starts = {key: low - low % _ALIGNMENT for key, (low, _) in spans.items()}
    for key, (_, high) in spans.items():
        whole = torch.empty(0, dtype=torch.uint8, device=own[key].device)
        part = whole.set_(own[key].untyped_storage())[starts[key] : high]
        memory[key] = memory[key].copy_(part) if key in memory else part.clone()

    def copy(tensor: Tensor) -> Tensor:
        if not _is_plain(tensor):
            return tensor.detach().clone()
        key = memory_id(tensor)
        offset = tensor.storage_offset() - starts[key] // tensor.dtype.itemsize
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return view.set_(memory[key].untyped_storage(), offset, tensor.size(), tensor.stride())

    return [copy(tensor) for tensor in tensors]


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is an ordinary strided view of its storage."""
    known = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return known and bool(tensor.numel()) and not (tensor.is_conj() or tensor.is_neg())


def _span(tensor: Tensor) -> tuple[int, int]:
    """The range of bytes in its storage that the tensor spans: (start, stop)."""
    size = tensor.dtype.itemsize
    last = int(sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))
    start = int(tensor.storage_offset())
    return start * size, (start + last + 1) * size
