"""The operator with a routing in a site's place, with x and the result arranged around it.

bmm(w[ids], x.unsqueeze(-1))     ->  matmul(x, qweight, scale, .., ids=ids).unsqueeze(-1)
einsum("ti,taoi->tao", x, w[ids])->  matmul(x repeated [t * a, i], .., ids=ids.reshape(-1))
bmm(x [E, C, K], w)              ->  matmul(x.reshape(-1, K), .., offsets=arange(1, E + 1) * C)
_grouped_mm(x, w, offs=o)        ->  matmul(x, .., offsets=o)
"""

from itertools import permutations

import torch
from torch import Tensor, fx

from fqcompile.passes.base import PackedPair, example, same_layout, same_shape
from fqcompile.passes.emit import VIEWS, Emitter, Size
from fqcompile.passes.expert_einsum import ExpertEinsum
from fqcompile.passes.op_nodes import MATMUL, matmul_arguments
from fqcompile.passes.sites import ExpertSite
from fqcompile.weights.recipe import target_name


def emit_experts(
    emit: Emitter, site: ExpertSite, x: fx.Node, bias: fx.Node | None, pair: PackedPair
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The operator's node, its rows with the bias, and the node with the site's value."""
    out = site.node.meta["example_value"]
    sizes = {} if site.indices is None else _sizes(emit, site, x, site.indices)
    if site.indices is not None:
        x = _rows_of_x(emit, x, site.indices, sizes, site.shape[-1])
    if x.meta["example_value"].dtype != out.dtype:  # autocast casts what matmuls read
        x = emit("to", x, out.dtype)
    op = _operator(emit, site, x, pair, sizes)
    if site.indices is None:
        return op, op, op
    rows, order = op, _order(site.indices, sizes)
    in_order = order == site.indices.out
    if bias is not None and in_order:  # ahead of the reshaping, where fuse finds it
        if bias.meta["example_value"].dtype != out.dtype:
            bias = emit("to", bias, out.dtype)
        every = emit("expand", bias, tuple(sizes[name] for name in order))
        rows = emit(torch.add, op, emit("reshape", every, (-1, site.shape[1])))
    y = _arranged(emit, rows, order, site.indices.out, sizes, out)
    if bias is not None and not in_order:
        y = emit(torch.add, y, emit("to", bias, out.dtype))
    return op, rows, y


def _operator(
    emit: Emitter, site: ExpertSite, x: fx.Node, pair: PackedPair, sizes: dict[str, Size]
) -> fx.Node:
    _, n, k = site.shape
    told = "ids" if site.form == "gathered" else "offsets"
    routed = {told: _routing(emit, site, x, sizes), "zero_rest": site.zero_rest}
    weight = (pair.qweight, pair.scale, None, None, pair.spec.bits, pair.spec.group_size, n, k)
    arguments = matmul_arguments(x, *weight, "none", False, "", **routed)
    with emit.graph.inserting_before(site.node):
        op = emit.graph.call_function(MATMUL, arguments)
    rows = x.meta["example_value"]
    op.meta["example_value"] = rows.new_empty((rows.shape[0], n))
    return op


def _sizes(emit: Emitter, site: ExpertSite, x: fx.Node, indices: ExpertEinsum) -> dict[str, Size]:
    """Of every index but the contracted ones."""
    dims = [d for d in range(len(indices.x) + len(indices.x_singles)) if d not in indices.x_singles]
    sizes = {
        name: emit.size(x, dim)
        for name, dim in zip(indices.x, dims, strict=True)
        if name not in indices.contracted
    }
    for dim, name in enumerate(indices.batch):
        if name not in sizes:
            assert site.routing is not None, "every expert has rows of x"
            sizes[name] = emit.size(site.routing, dim)
    shape = site.node.meta["example_value"].shape
    return sizes | {name: int(shape[indices.out.index(name)]) for name in indices.free}


def _rows_of_x(
    emit: Emitter, x: fx.Node, indices: ExpertEinsum, sizes: dict[str, Size], k: int
) -> fx.Node:
    """[batch * rows, K]; x is repeated along those of the batch's indices that it lacks."""
    for dim in sorted(indices.x_singles, reverse=True):
        x = emit("squeeze", x, dim)
    present = [i for i in indices.batch if i in indices.x]
    order = [*present, *indices.rows, *indices.contracted]
    if order != list(indices.x):
        x = emit("permute", x, tuple(indices.x.index(i) for i in order))
    if len(present) < len(indices.batch):
        for dim, name in enumerate(indices.batch):
            if name not in present:
                x = emit("unsqueeze", x, dim)
        repeats = [sizes[name] for name in indices.batch]
        x = emit("expand", x, (*repeats, *(-1,) * (len(order) - len(present))))
    return emit("reshape", x, (-1, k))


def _routing(emit: Emitter, site: ExpertSite, x: fx.Node, sizes: dict[str, Size]) -> fx.Node:
    """One id for each row of the op, or the ends of the experts' rows."""
    per_id = emit.product([sizes[name] for name in site.indices.rows] if site.indices else [])
    if site.routing is None:
        fake = x.meta["example_value"]
        with fake.fake_mode:
            counted = {"dtype": torch.int32, "device": fake.device}
            numbers = emit(torch.arange, 1, site.shape[0] + 1, **counted)
            return emit(torch.mul, numbers, per_id)
    if site.form == "grouped":
        return site.routing
    ids = emit("reshape", site.routing, (-1,))
    if per_id == 1:
        return ids
    return emit("reshape", emit("expand", emit("unsqueeze", ids, 1), (-1, per_id)), (-1,))


def _order(indices: ExpertEinsum, sizes: dict[str, Size]) -> tuple[str, ...]:
    """The op's rows and columns as indices; those of size one are where the result has them."""
    natural = (*indices.batch, *indices.rows, *indices.free)
    real, wanted = ([i for i in order if sizes[i] != 1] for order in (natural, indices.out))
    return indices.out if real == wanted else natural


def _arranged(
    emit: Emitter,
    y: fx.Node,
    order: tuple[str, ...],
    out: tuple[str, ...],
    sizes: dict[str, Size],
    like: Tensor,
) -> fx.Node:
    """The op's rows [batch * rows, N] in the order of the site's value, and in its layout."""
    y = emit("reshape", y, tuple(sizes[name] for name in order))
    if order != out:
        y = emit("permute", y, tuple(order.index(name) for name in out))
    layout = None if same_layout(y.meta["example_value"], like) else _layout(like)
    if layout is not None:  # a view of the result that eager allows must still be possible
        y = emit("contiguous", emit("permute", y, layout))
        y = emit("permute", y, tuple(layout.index(dim) for dim in range(len(layout))))
    return y


def _layout(value: Tensor) -> tuple[int, ...] | None:
    """The dimensions as they follow each other in memory; None where that has gaps."""
    for dims in permutations(range(value.dim())):
        moved = value.permute(dims)
        if same_layout(moved, moved.new_empty(moved.shape)):
            return dims
    return None


def views_of_result(rows: fx.Node, y: fx.Node) -> list[fx.Node]:
    """Users of the site's value that undo its arrangement: they are the op's rows themselves."""
    if y.target != "reshape" or y.args[0] is not rows:
        return []
    result = rows.meta["example_value"]

    def undoes(user: fx.Node) -> bool:
        value = example(user)
        return (
            target_name(user.target) in VIEWS - {"transpose", "permute", "t", "mT", "expand"}
            and value is not None
            and value.dtype == result.dtype
            and same_shape(value.shape, result.shape)
        )

    return [user for user in y.users if undoes(user)]
