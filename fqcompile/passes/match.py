"""3 match: find every matmul with a constant weight; list other constant matrices and readers.

linear(x, cat([wq, wk]).to(bf16), b)   ->   WeightSite(x, recipe: cat, to; sources: wq, wk; bias: b)
bmm(w[ids], x.unsqueeze(-1))           ->   WeightSite(x, recipe: identity; source: w; ids)
_grouped_mm(x, w.mT, offs=offsets)     ->   WeightSite(x, the same recipe; offsets)

Each is read as a `Contraction`, by the roles of its indices:

bsk, nk -> bsn           rows b s                     a linear layer
nk, bkm -> bnm           rows b m                     its weight on the left
emk, ekn -> emn          batch e, rows m              equally many rows for every expert
pmk, pkn -> pmn          batch p, rows m              w[ids]: rows gathered, one id each
ti, taoi -> tao          batch t a                    w[ids], ids [t, a]; x is repeated along a
b1mk, ekn -> bemn        rows b m                     one x for all: a layer of e * n outputs
bkhw, nk11 -> bnhw       rows b h w                   a convolution of single pixels
mk, Ekn -> mn            rows m                       rows sorted by expert

The weight may be [1, K, N], or [K, N] expanded to a batch. Operations between w[ids] and the
product (transposes, casts, a chunk of its rows) count as part of the stack.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fqcompile.passes.effects import effects_between, in_transforms
from fqcompile.passes.einsum import Names
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.gather import Gathered, gathered
from fqcompile.passes.kept import kept_matrices, note_tables, warnings_of_kept
from fqcompile.passes.naming import is_table, joined_name
from fqcompile.passes.products import STACK, Operand, Product, product, shape_of
from fqcompile.passes.state import (
    Contraction,
    GraphState,
    Kind,
    Step,
    WeightSite,
    example,
    same_shape,
)
from fqcompile.weights.recipe import simplified, target_name

IsConstant = Callable[[object], bool]
Steps = tuple[Step, ...]
_EXPANDS = ("expand", "expand_as", "broadcast_to")


def match(state: GraphState) -> int:
    """Fill `state.sites` and `state.kept`; return the number of sites."""
    folder = ConstantFolder(state)
    note_tables(state)
    transformed = in_transforms(state.graph)  # in these, our operators have no rule
    for node in state.graph.nodes:
        site = None if node in transformed else _find(state, node, folder)
        if site is not None:
            state.sites.append(site)
    state.sites = _without_folded(state.sites)
    _number_equal_names(state.sites)
    state.kept = kept_matrices(state)
    state.warnings += warnings_of_kept(state)
    state.matched = [f"{s.name}: {s.node.format_node()}" for s in state.sites]
    return len(state.sites)


def _find(state: GraphState, node: fx.Node, folder: ConstantFolder) -> WeightSite | None:
    found = contraction(node, folder.is_constant)
    if found is None or not _is_float(node, found.x) or _is_overwritten(state, node, found):
        return None
    return _site(state, node, found, folder)


def _is_overwritten(state: GraphState, node: fx.Node, found: Contraction) -> bool:
    """Whether the stack or the ids may be written to between the gather and the product."""
    if any(part in state.written for part in found.gather):
        return True
    late = bool(found.gather) and found.ids in state.written
    return late and effects_between(found.gather[0], node)


def _without_folded(sites: list[WeightSite]) -> list[WeightSite]:
    """Drop products of constants that are only weights of other sites: their recipes have them."""
    weights = {site.node: site.contraction.weight for site in sites}

    def only_weighs(site: WeightSite) -> bool:
        return bool(site.node.users) and all(
            weights.get(user) is site.node and user.all_input_nodes.count(site.node) == 1
            for user in site.node.users
        )

    return [site for site in sites if not only_weighs(site)]


def _is_float(node: fx.Node, operand: fx.Node) -> bool:
    x, out = example(operand), example(node)
    return x is not None and out is not None and x.is_floating_point() and out.is_floating_point()


def _site(
    state: GraphState, node: fx.Node, found: Contraction, folder: ConstantFolder
) -> WeightSite:
    recipe, sources = folder.recipe(found.stack)
    weight = found.stack.meta["example_value"]
    for method, args in found.weight_steps:
        recipe, weight = recipe.then(method, *args), getattr(weight, method)(*args)
    fakes = tuple(source.meta["example_value"] for source in sources)
    one = [] if found.of_experts else sources
    tables = tuple(node for node in one if is_table(state.args[state.constants[node]]))
    return WeightSite(
        kind=_kind(found, weight.stride()),
        node=node,
        contraction=found,
        recipe=simplified(recipe, fakes),
        sources=sources,
        shape=tuple(map(int, weight.shape)),  # `int` fixes what Dynamo left symbolic
        name=joined_name(state.known, sources),
        head=bool(tables) or any(state.known[source].of_head for source in one),
        tables=tables,
    )


def _kind(found: Contraction, strides: Sequence[int]) -> Kind:
    """The kind in plans: experts are outermost in memory, heads often an inner dimension."""
    if not found.of_experts:
        return "linear"
    outermost = int(strides[0]) == max(map(int, strides))
    return "experts" if found.routing is not None or outermost else "other"


def _number_equal_names(sites: list[WeightSite]) -> None:
    """Different slices of one parameter are different sites: in_proj[0], in_proj[1]."""
    recipes: dict[str, dict[str, None]] = {}
    for site in sites:
        recipes.setdefault(site.name, {})[site.recipe.key] = None
    for site in sites:
        keys = list(recipes[site.name])
        if len(keys) > 1:
            site.part = f"[{keys.index(site.recipe.key)}]"
            site.name += site.part


@dataclass(frozen=True)
class Weight:
    """The operand `node` as `steps` on a constant stack: all of it, or what `ids` pick.

    `dims` and `shape` are those of the stack after the steps; `batch` are its indices that x and
    the result have too, or those of `ids`.
    """

    node: fx.Node
    stack: fx.Node
    dims: Names
    shape: Sequence[int]
    batch: Names
    steps: Steps = ()
    ids: fx.Node | None = None
    gather: tuple[fx.Node, ...] = ()


def contraction(node: fx.Node, is_constant: IsConstant) -> Contraction | None:
    """The node read as a product with a constant weight, or None if it is none."""
    read = product(node)
    if read is None:
        return None
    for weight, x in read.sides:
        if is_constant(x.node) and not read.of_layer:
            continue
        constant, steps = _plain(weight, read)
        if is_constant(constant):
            x = _without_singles(x, weight)
            found = _of_constant(Operand(node, read.out), x, weight.dims, constant, steps)
        elif (picked := gathered(weight.node, is_constant)) is not None:
            x = _without_singles(x, weight)
            found = _of_picked(x, weight, picked)
        else:
            continue
        return None if found is None else _with_roles(read, x, found)
    return None


def _plain(weight: Operand, read: Product) -> tuple[fx.Node, Steps]:
    """The weight without dimensions that have no name, or of equal matrices."""
    if read.broadcasts:
        return _unbatched(weight.node)
    return weight.node, tuple(("squeeze", (dim,)) for dim in reversed(weight.singles))


def _unbatched(operand: fx.Node) -> tuple[fx.Node, Steps]:
    """The matrix under a batch of equal copies: [1, K, N], or [K, N] expanded to [B, K, N]."""
    base = next(iter(operand.args), None) if target_name(operand.target) in _EXPANDS else None
    before, after = shape_of(base), shape_of(operand)
    whole = len(after) == 3 and same_shape(before[-2:], after[-2:])
    if isinstance(base, fx.Node) and whole and (len(before) == 2 or before[0] == 1):
        operand, after = base, before
    return operand, (("squeeze", (0,)),) if len(after) == 3 and after[0] == 1 else ()


def _of_constant(
    out: Operand, x: Operand, dims: Names, constant: fx.Node, steps: Steps
) -> Weight | None:
    """The constant, without those of the leading dimensions that `_unbatched` has dropped."""
    value = constant.meta["example_value"]
    for method, args in steps:
        value = getattr(value, method)(*args)
    shape = tuple(value.shape)
    dropped, dims = dims[: len(dims) - len(shape)], dims[len(dims) - len(shape) :]
    if not all(same_shape([x.sizes.get(i, out.sizes[i])], [out.sizes[i]]) for i in dropped):
        return None  # the batch comes from the weight alone
    batch = [i for i in dims if i in x.dims and i in out.dims]
    if not batch and any(name.startswith("...") for name in dims):
        return None
    return Weight(constant, constant, dims, shape, batch, steps)


def _of_picked(x: Operand, weight: Operand, picked: Gathered) -> Weight | None:
    """What was gathered from a constant stack."""
    original = [weight.dims[picked.dims.index(i)] for i in range(len(weight.dims))]
    batch, dims = original[: picked.num_ids], [STACK, *original[picked.num_ids :]]
    ids = zip(batch, shape_of(picked.ids), strict=True)
    if not all(same_shape([size], [x.sizes.get(i, size)]) for i, size in ids):
        return None  # a single id, broadcast over rows of x
    chosen = (picked.steps, picked.ids, picked.nodes)
    return Weight(weight.node, picked.stack, dims, picked.shape, batch, *chosen)


def _without_singles(x: Operand, weight: Operand) -> Operand:
    """x without the dimensions of size one that broadcast against the weight's."""
    singles = [
        name
        for name, size in x.sizes.items()
        if name in weight.dims
        and same_shape([size], [1])
        and not same_shape([weight.sizes[name]], [1])
    ]
    places = tuple(x.dims.index(name) for name in singles)
    return Operand(x.node, [name for name in x.dims if name not in singles], places)


def _with_roles(read: Product, x: Operand, weight: Weight) -> Contraction | None:
    """The roles of all indices, or None where it is no product of rows and matrices.

    Nor where an index has one size in x and another in the weight, which broadcasts.
    """
    out, batch = read.out, weight.batch
    own = [i for i in weight.dims if i != STACK and i not in batch]
    contracted = [i for i in own if i in x.dims and i not in out]
    free = [i for i in own if i in out and i not in x.dims]
    rows = [i for i in x.dims if i in out and i not in batch]
    complete = (
        bool(contracted and free)
        and len(contracted) + len(free) == len(own)
        and sorted(out) == sorted([*batch, *rows, *free])
        and set(x.dims) <= {*batch, *rows, *contracted}
        and all(len(set(names)) == len(names) for names in (x.dims, weight.dims, out))
    )
    if not complete:
        return None
    # `int` fixes what Dynamo left symbolic
    sizes = dict(zip(weight.dims, map(int, weight.shape), strict=True))
    if not all(same_shape([n], [sizes.get(i, n)]) for i, n in x.sizes.items()):
        return None
    experts = [STACK] if STACK in weight.dims else batch
    groups = [experts, free, contracted] if experts else [free, contracted]
    return Contraction(
        x=x.node,
        weight=weight.node,
        stack=weight.stack,
        weight_steps=(*weight.steps, *_to_matrices(weight.dims, groups, sizes)),
        x_dims=tuple(x.dims),
        x_singles=x.singles,
        out_dims=tuple(out),
        batch=tuple(batch),
        rows=tuple(rows),
        contracted=tuple(contracted),
        free=tuple(free),
        bias=read.bias,
        ids=weight.ids,
        of_layer=read.of_layer,
        offsets=read.offsets,
        gather=weight.gather,
        zero_rest=read.zero_rest,
    )


def _to_matrices(dims: Names, groups: Sequence[Names], sizes: Mapping[str, int]) -> Steps:
    """Tensor methods that make [N, K] or [E, N, K], each a group of dimensions, of any order."""
    order = [dims.index(i) for group in groups for i in group]
    steps: Steps = () if order == sorted(order) else (("permute", tuple(order)),)
    if len(order) == len(groups):
        return steps
    return (*steps, ("reshape", tuple(math.prod(sizes[i] for i in group) for group in groups)))
