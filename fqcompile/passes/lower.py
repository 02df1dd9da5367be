"""9 lower: hand the rewritten graph, without the weights it no longer reads, to the inner compiler.

(x, w_0, b_0, w_1, ...)  ->  inner(x, b_0, ..., qweight_0, scale_0, ...)
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fqcompile.config import FineQuantConfig
from fqcompile.kernels.op import CACHE_TAG
from fqcompile.passes.base import GraphState, PackedPair, placeholders
from fqcompile.torch_compat import (
    STATIC_INPUT,
    compile_fx,
    detect_fake_mode,
    list_mode_options,
    lookup_backend,
    set_source,
)
from fqcompile.weights.dispatch import Inner, Variant
from fqcompile.weights.store import STORE

# What AOTAutograd requires of an input that Dynamo did not make, and what makes CUDA graphs treat
# it as a parameter instead of copying it on every call.
_STATIC_INPUT = {STATIC_INPUT: "unguarded"}


def lower(state: GraphState, args: Sequence[Any]) -> Variant:
    """Compile the graph; the variant says which outer arguments it takes, and packs the rest."""
    pairs = _pairs_in_input_order(state)
    inputs = placeholders(state.graph)[: len(state.args)]
    # A graph without packed weights keeps the arguments that it is called with.
    dead = {node for node in inputs if not node.users and node in state.constants and pairs}
    kept = [i for i, node in enumerate(inputs) if node not in dead]
    for node in dead:
        state.graph.erase_node(node)
    pack = _packer(pairs)
    packed = pack(args)
    _describe_inputs(state, pairs, packed)
    state.graph.lint()
    state.module.recompile()
    inner = compile_inner(state.module, [*(args[i] for i in kept), *packed], state.config)
    return Variant(inner, tuple(kept), pack)


def compile_inner(module: fx.GraphModule, args: Sequence[Any], config: FineQuantConfig) -> Inner:
    """Compile with `inner_backend`; Inductor gets the patches of `mode` and `inductor`."""
    tag = f"{torch.compiler.config.cache_key_tag}{CACHE_TAG}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        if config.inner_backend != "inductor":
            compiled: Inner = lookup_backend(config.inner_backend)(module, list(args))
            return compiled
        patches: dict[str, Any] = dict(config.inductor)
        if config.mode not in (None, "default"):
            patches = {**list_mode_options(config.mode), **patches}
        return cast(Inner, compile_fx(module, list(args), config_patches=patches))


def _pairs_in_input_order(state: GraphState) -> list[PackedPair]:
    order = {node: i for i, node in enumerate(placeholders(state.graph))}
    return sorted(state.packed.values(), key=lambda pair: order[pair.qweight])


def _packer(pairs: list[PackedPair]) -> Callable[[Sequence[Any]], tuple[Tensor, ...]]:
    """Packed tensors for any instance's arguments, in the order of the new inputs."""
    specs = [pair.spec for pair in pairs]

    def pack(args: Sequence[Any]) -> tuple[Tensor, ...]:
        sources = [tuple(args[i] for i in spec.inputs) for spec in specs]
        packed = map(STORE.packed, specs, sources)
        return tuple(tensor for weight in packed for tensor in weight.tensors)

    return pack


def _describe_inputs(
    state: GraphState, pairs: list[PackedPair], packed: tuple[Tensor, ...]
) -> None:
    fakes = [node.meta.get("example_value") for node in placeholders(state.graph)]
    fake_mode = detect_fake_mode([fake for fake in fakes if fake is not None])
    nodes = [node for pair in pairs for node in (pair.qweight, pair.scale)]
    for node, tensor in zip(nodes, packed, strict=True):
        set_source(node, None)
        fake = fake_mode.from_tensor(tensor, static_shapes=True) if fake_mode else tensor
        node.meta = {"example_value": fake, "tensor_dict": dict(_STATIC_INPUT)}
