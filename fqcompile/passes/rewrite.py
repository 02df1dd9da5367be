"""5 rewrite: each quantized matmul becomes one call of the operator on two new inputs.

linear(x, w, b)              ->  matmul(x, qweight_i, scale_i, b, ...)        x [..., K] -> [..., N]
w @ x                        ->  matmul(x.mT, ...).mT
einsum("bsd,dhk->bshk", ..)  ->  matmul(x, ...).unflatten(-1, (h, k))
_grouped_mm(x, w, offs=o)    ->  matmul(x, .., offsets=o)
bmm(x [E, C, K], w)          ->  matmul(x.reshape(-1, K), .., offsets=arange(1, E + 1) * C)
bmm(w[ids], x.unsqueeze(-1)) ->  matmul(x, .., ids=ids).unsqueeze(-1)
einsum("ti,taoi->tao", ..)   ->  matmul(x repeated [t * a, i], .., ids=ids.reshape(-1))

A bias [N] becomes an argument of the operator; any other bias is added to the result.
"""

import torch
from torch import Tensor, fx

from fqcompile.passes.fold import VIEWS, ConstantFolder, Emitter, Size
from fqcompile.passes.op_nodes import MATMUL, OWN, matmul_arguments
from fqcompile.passes.state import (
    Contraction,
    GraphState,
    WeightSite,
    erase_dead,
    erase_unused,
    example,
    part_of,
    placeholders,
    same_shape,
)
from fqcompile.weights.node_weight import NodeWeight
from fqcompile.weights.recipe import target_name

Sizes = dict[str, Size]


def rewrite(state: GraphState) -> int:
    """Replace every site that has a plan; return the number of sites replaced."""
    chosen = [(site, site.plan) for site in state.sites if site.plan is not None]
    folder = ConstantFolder(state)
    folded = [n for n in state.graph.nodes if n.op != "placeholder" and folder.is_constant(n)]
    emit = Emitter(state.graph)
    replaced: dict[fx.Node, fx.Node] = {}
    for index, (site, plan) in enumerate(chosen):
        weight = NodeWeight((part_of(state, site, plan),), plan.group_size)
        inputs = _add_inputs(state, f"fq_{index}")
        state.matched.append(f"{site.name}: {site.node.format_node()}")
        state.packed[_replace(site, weight, inputs, replaced, emit.at(site.node))] = weight
        state.matched[-1] = f"{site.name}: {site.node.name} -> {site.op}"
    erase_unused(state.graph, folded)
    erase_dead(state, [*replaced, *replaced.values(), *emit.made])
    return len(chosen)


def _add_inputs(state: GraphState, prefix: str) -> tuple[fx.Node, ...]:
    """New placeholders after the last one; `lower` gives them their tensors and metadata."""
    nodes = []
    for name in ("qweight", "scale"):
        with state.graph.inserting_after(placeholders(state.graph)[-1]):
            nodes.append(state.graph.placeholder(f"{prefix}_{name}"))
        nodes[-1].meta[OWN] = True
    return tuple(nodes)


def _replace(
    site: WeightSite,
    weight: NodeWeight,
    inputs: tuple[fx.Node, ...],
    replaced: dict[fx.Node, fx.Node],
    emit: Emitter,
) -> fx.Node:
    """Replace one site and return the new op; `replaced` maps replaced nodes to their values.

    `rewrite` erases at the end what only the matmul read, and views that undo the rearrangement.
    """
    roles, out = site.contraction, site.node.meta["example_value"]
    x = replaced.get(roles.x, roles.x)
    bias = roles.bias and replaced.get(roles.bias, roles.bias)
    sizes = sizes_of(emit, roles, x, out)
    x = arranged(emit, roles, x, sizes, site.shape[-1])
    if roles.of_experts:  # autocast casts what matmuls read
        x = emit.cast(x, out)
    row = bias if bias is not None and _is_row(site, bias) else None
    op = _operator(emit, site, weight, (x, *inputs, row), _routing(emit, site, x, sizes))
    rows, y = arranged_back(emit, roles, op, None if row is bias else bias, sizes, out)
    site.op = op
    y.meta = dict(site.node.meta)
    for view, value in [(site.node, y), *((v, rows) for v in _undoing(site.node, rows, y))]:
        view.replace_all_uses_with(value)
        replaced[view] = value
    return op


def _operator(
    emit: Emitter,
    site: WeightSite,
    weight: NodeWeight,
    tensors: tuple[fx.Node | None, ...],
    routing: fx.Node | None,
) -> fx.Node:
    """The call of the op for x [..., K], or for x [rows, K] with a routing to experts."""
    *_, n, k = site.shape
    roles = site.contraction
    form = (weight.bits, weight.levels, weight.group_size, n, k, "none", False, "")
    routed = {} if routing is None else {"ids" if roles.ids else "offsets": routing}
    arguments = matmul_arguments(*tensors, None, *form, **routed, zero_rest=roles.zero_rest)
    with emit.graph.inserting_before(site.node):
        op = emit.graph.call_function(MATMUL, arguments)
    assert tensors[0] is not None
    value, out = tensors[0].meta["example_value"], site.node.meta["example_value"]
    op.meta["example_value"] = value.new_empty((*value.shape[:-1], n), dtype=out.dtype)
    return op


def _is_row(site: WeightSite, bias: fx.Node) -> bool:
    """Whether the bias is one value per output column, which the op itself adds."""
    roles = site.contraction
    natural = not roles.of_experts and roles.out_dims == (*roles.rows, *roles.free[:1])
    return (natural or roles.of_layer) and tuple(bias.meta["example_value"].shape) == site.shape[:1]


def sizes_of(emit: Emitter, roles: Contraction, x: fx.Node, out: Tensor) -> Sizes:
    """The sizes of the free indices; with a batch, of all indices but the contracted ones."""
    free: Sizes = {i: int(out.shape[roles.out_dims.index(i)]) for i in roles.free}
    if not roles.batch:
        return free
    ndim = len(roles.x_dims) + len(roles.x_singles)
    dims = [d for d in range(ndim) if d not in roles.x_singles]
    sizes = {
        name: emit.size(x, dim)
        for name, dim in zip(roles.x_dims, dims, strict=True)
        if name not in roles.contracted
    }
    for dim, name in enumerate(roles.batch):
        if name not in sizes:
            assert roles.ids is not None, "every expert has rows of x"
            sizes[name] = emit.size(roles.ids, dim)
    return sizes | free


def arranged(emit: Emitter, roles: Contraction, x: fx.Node, sizes: Sizes, k: int) -> fx.Node:
    """x as [batch * rows, K], repeated along the batch indices that it lacks.

    Without a batch the rows keep their dimensions.
    """
    for dim in sorted(roles.x_singles, reverse=True):
        x = emit("squeeze", x, dim)
    present = [i for i in roles.batch if i in roles.x_dims]
    order = (*present, *roles.rows, *roles.contracted)
    x = _permuted(emit, x, roles.x_dims, order)
    if not roles.batch:
        return x if len(roles.contracted) == 1 else emit("flatten", x, -len(roles.contracted), -1)
    if len(present) < len(roles.batch):
        for dim, name in enumerate(roles.batch):
            if name not in present:
                x = emit("unsqueeze", x, dim)
        repeats = [sizes[name] for name in roles.batch]
        x = emit("expand", x, (*repeats, *(-1,) * (len(order) - len(present))))
    return emit("reshape", x, (-1, k))


def _permuted(
    emit: Emitter, value: fx.Node, have: tuple[str, ...], want: tuple[str, ...]
) -> fx.Node:
    return value if have == want else emit("permute", value, tuple(map(have.index, want)))


def _routing(emit: Emitter, site: WeightSite, x: fx.Node, sizes: Sizes) -> fx.Node | None:
    """The routing: one id per row of the op, or the end of each expert's rows; None: one matrix."""
    roles = site.contraction
    if not roles.batch:
        return roles.offsets
    per_id = emit.product([sizes[name] for name in roles.rows])
    if roles.ids is None:
        fake = x.meta["example_value"]
        with fake.fake_mode:
            counted = {"dtype": torch.int32, "device": fake.device}
            numbers = emit(torch.arange, 1, site.shape[0] + 1, **counted)
            return emit(torch.mul, numbers, per_id)
    ids = emit("reshape", roles.ids, (-1,))
    if per_id == 1:
        return ids
    return emit("reshape", emit("expand", emit("unsqueeze", ids, 1), (-1, per_id)), (-1,))


def arranged_back(
    emit: Emitter,
    roles: Contraction,
    op: fx.Node,
    bias: fx.Node | None,
    sizes: Sizes,
    out: Tensor,
) -> tuple[fx.Node, fx.Node]:
    """(the op's rows, with the bias if it can be added there, and the value of the matmul)."""
    order = _order(roles, sizes)
    rows = op
    if bias is not None and roles.batch and order == roles.out_dims:
        # before the reshape, where `fuse` finds it
        every = emit("expand", emit.cast(bias, out), tuple(sizes[name] for name in order))
        rows = emit(torch.add, op, emit("reshape", every, (-1, op.meta["example_value"].shape[-1])))
        bias = None
    y = rows
    if roles.batch:
        y = emit("reshape", rows, tuple(sizes[name] for name in order))
    elif len(roles.free) > 1:
        y = emit("unflatten", rows, -1, tuple(sizes[name] for name in roles.free))
    y = _permuted(emit, y, order, roles.out_dims)
    y = y if y is op else emit.laid_out(y, out)
    if bias is not None:
        y = emit(torch.add, y, emit.cast(bias, out))
    return rows, y


def _order(roles: Contraction, sizes: Sizes) -> tuple[str, ...]:
    """The order of indices in the op's result; those of size one are placed as in the matmul's."""
    natural = (*roles.batch, *roles.rows, *roles.free)
    if not roles.batch:
        return natural
    real, wanted = ([i for i in order if sizes[i] != 1] for order in (natural, roles.out_dims))
    return roles.out_dims if real == wanted else natural


def _undoing(node: fx.Node, rows: fx.Node, y: fx.Node) -> list[fx.Node]:
    """Users of the site's value that reshape it back to the op's rows."""
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

    return [user for user in node.users if undoes(user)]
