"""Constant tensors that are read by calls other than sites: the readers and the skip reasons.

embedding(ids, w)  ->  KeptWeight(w: embedding table)       conv1d(x, w)  ->  KeptWeight(w: conv1d)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fqcompile.distributed.shards import NOT_LOCAL, is_dtensor, local_part
from fqcompile.passes.effects import bodies, has_effects, in_transforms
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.naming import note_table
from fqcompile.passes.products import MOST_PIXELS, OF_LAYERS, PRODUCTS
from fqcompile.passes.state import GraphState, KeptWeight, example, placeholders
from fqcompile.weights.parameter import PackedWeight
from fqcompile.weights.recipe import CASTS, MOVING, target_name

IN_A_BODY = "the bodies of higher-order operators stay as they are"
OUT_OF_THE_BODY = (
    "branch and loop in Python instead (cond, map, ...), or call the model under torch.no_grad() "
    "where this is checkpointing"
)
IN_THE_GRAPH = "it is a constant of the graph, not one of its inputs"
INTO_AN_INPUT = (
    "turn torch._inductor.config.freezing off, or call fqcompile.quantize_(model) before compiling"
)
CONVOLUTION = (
    "of convolutions only those of single pixels are quantized, without groups or stride, and of "
    f"{MOST_PIXELS} pixels at most: for more the dense one is as fast"
)
TABLE = (
    "embedding table: a compiled model keeps it, and fqcompile.quantize_(model, "
    "quantize_embeddings=8) packs it"
)
PACKED_TABLE = "embedding table, packed already: the rows that are read are dequantized"
_ROW_READS = frozenset("embedding embedding_bag index_select index gather take_along_dim".split())
# Calls that read only shape, dtype and device: of every operand, or of those after the first.
_LIKE = frozenset(
    """zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty
    new_full new_tensor size stride dim numel""".split()
)
_LIKE_OTHER = frozenset("to type_as expand_as view_as reshape_as".split())
Edge = tuple[fx.Node, fx.Node]


def note_tables(state: GraphState) -> None:
    """Mark weights whose rows are read; of a sharded weight the DTensor, as a shard multiplies."""
    tables = {name for node, name in state.names.items() if _reads_rows(node)}
    for node, index in state.constants.items():
        if state.names[node] in tables:
            note_table(state.args[index])


def _reads_rows(weight: fx.Node) -> bool:
    """Whether a call picks rows of the matrix by a tensor of indices, also through views."""
    value = example(weight)
    if value is None or value.dim() != 2:
        return False
    for user in weight.users:
        name = target_name(user.target)
        if name in _ROW_READS or (name == "getitem" and _by_tensor(user.args[1])):
            return True
        if name in MOVING | CASTS and _reads_rows(user):
            return True
    return False


def _by_tensor(index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(example(part) is not None for part in parts)


def kept_matrices(state: GraphState) -> list[KeptWeight]:
    """Constant tensors that no site reads, and parameters passed in, of at least `min_elements`.

    This includes tensors that both a site and another call read, except embeddings, which the site
    records. A tensor that the graph only returns is left to its reader, as after a graph break.
    """
    used = {source for site in state.sites for source in site.sources}
    to_sites = _edges_to_sites(state)
    transformed = in_transforms(state.graph)
    kept = []
    given = dict(zip(placeholders(state.graph), state.args, strict=True))
    for node in state.names:
        known, readers = state.known[node], _readers(node, to_sites)
        table = _reads_rows(node) and not (node in used and known.embedded)
        as_table = table or node in used
        if node in used:
            readers = [reader for reader in readers if reads_values(reader, known.embedded)]
        elif all(reader.op == "output" for reader in readers):
            continue
        if node in used and not readers:
            continue
        whole: Any = given[node] if node in given else example(node)
        sharded, weight = is_dtensor(whole), local_part(whole)
        if not _is_matrix(weight, state.config.min_elements):
            continue
        reason = _of_table(weight) if table else _why_not(state, node, readers, transformed)
        reason = NOT_LOCAL if sharded and "embedding" not in reason else reason
        kept.append(
            KeptWeight(
                identity=id(weight),
                input=state.named.get(node),
                name=known.table if as_table else known.name,
                table=as_table,
                kind=_kind(weight, readers),
                shape=tuple(weight.shape),
                nbytes=weight.nbytes,
                reason=reason,
            )
        )
    return kept


def _of_table(weight: Tensor) -> str:
    return PACKED_TABLE if isinstance(weight, PackedWeight) else TABLE


def _is_matrix(weight: Tensor, min_elements: int) -> bool:
    return (
        weight.dim() >= 2
        and (weight.is_floating_point() or weight.is_complex() or weight.is_quantized)
        and weight.numel() >= min_elements
    )


def _why_not(
    state: GraphState, node: fx.Node, readers: list[fx.Node], transformed: dict[fx.Node, str]
) -> str:
    if node in state.written:
        return f"{state.written[node]!r} in the graph may write to it"
    if node.op == "get_attr":
        return IN_THE_GRAPH
    if node not in state.constants:
        return "an argument of the compiled function: what the caller passes in is not a weight"
    names = dict.fromkeys(target_name(reader.target) for reader in readers)
    inside = [transformed[reader] for reader in readers if reader in transformed]
    if inside:
        return (
            f"read inside a torch.func transform ({inside[0]}), where packed weights have no rule"
        )
    if any(map(bodies, readers)):
        return f"read inside {', '.join(names)}: {IN_A_BODY}"
    if any(name.lstrip("_").startswith("conv") for name in names):
        return f"read by {', '.join(names)}: {CONVOLUTION}"
    return f"read by {', '.join(names)}: not a linear or expert form that is quantized"


def _edges_to_sites(state: GraphState) -> dict[Edge, bool]:
    """Edges from weights to sites, as pairs (node, user); True if the user is the product."""
    folder = ConstantFolder(state)
    edges: dict[Edge, bool] = {}
    for site in state.sites:
        gather, waiting = site.contraction.gather, [site.contraction.weight]
        while waiting:
            node = waiting.pop()
            found = [n for n in node.all_input_nodes if n in gather or folder.is_constant(n)]
            waiting += [n for n in found if (n, node) not in edges]
            edges |= {(n, node): False for n in found}
    for site in state.sites:  # the product may read a view of the weight, as bmm(x, w.expand(...))
        others = (site.contraction.x, site.contraction.bias)
        edges |= {(n, site.node): True for n in site.node.all_input_nodes if n not in others}
        edges[site.contraction.weight, site.node] = True
    return edges


def _readers(source: fx.Node, to_sites: Mapping[Edge, bool]) -> list[fx.Node]:
    """The calls other than sites that read the tensor, also through views and casts."""
    found: dict[fx.Node, None] = {}
    waiting, seen = [source], {source}
    while waiting:
        node = waiting.pop(0)
        for user in node.users:
            if to_sites.get((node, user)) or user in seen:
                continue
            if is_like(node, user):
                continue
            seen.add(user)
            if (user.users and target_name(user.target) in MOVING | CASTS) or (
                node,
                user,
            ) in to_sites:
                waiting.append(user)
            else:
                found[user] = None
    return [*found]


def is_like(node: fx.Node, reader: fx.Node) -> bool:
    """Whether the call uses only the node's shape, dtype or device: x.view_as(node)."""
    return target_name(reader.target) in _LIKE_OTHER and node is not reader.args[0]


def reads_values(reader: fx.Node, embedded: bool = False) -> bool:
    """Whether a call uses the values that it reads; row reads of an embedding do not count."""
    name = target_name(reader.target)
    if not reader.users and not has_effects(reader) and reader.op != "output":
        return False
    return not (name in _LIKE or (embedded and name in _ROW_READS))


def _kind(weight: Tensor, readers: list[fx.Node]) -> str:
    """The kind in plans: a stack is "experts" only if a matmul of stacks reads it, else "other"."""
    names = {target_name(reader.target) for reader in readers}
    if weight.dim() == 3 and names & (PRODUCTS - OF_LAYERS):
        return "experts"
    return "linear" if weight.dim() == 2 else "other"


def warnings_of_kept(state: GraphState) -> list[str]:
    """Remedies for weights that are skipped because of how the graph was made."""
    remedies = {IN_A_BODY: OUT_OF_THE_BODY, IN_THE_GRAPH: INTO_AN_INPUT}
    names = {
        end: [kept.name for kept in state.kept if kept.reason.endswith(end)] for end in remedies
    }
    found = [
        f"{len(names[end])} weights ({names[end][0]}, ...) are kept: {end}; {remedy}"
        for end, remedy in remedies.items()
        if names[end]
    ]
    calls = [node for node in state.graph.nodes if node.op in ("call_function", "call_method")]
    if calls and not any("example_value" in node.meta for node in state.graph.nodes):
        found.append(
            "no call of the graph has an example value, so no weight of it is read: it was not "
            f"made by torch.compile, or by a release of torch not known here ({torch.__version__}; "
            "tested: 2.11 to 2.14); call fqcompile.quantize_(model) instead"
        )
    return found
