"""8 lower: hand the rewritten graph, without the weights it no longer reads, to the inner compiler.

(x, w_0, b_0, w_1, ...)  ->  inner(x, b_0, ..., qweight_0, scale_0, ...)
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fqcompile.config import FineQuantConfig
from fqcompile.kernels.op import CACHE_TAG
from fqcompile.passes.op_nodes import argument
from fqcompile.passes.state import GraphState, placeholders
from fqcompile.torch_compat import (
    STATIC_INPUT,
    compile_fx,
    detect_fake_mode,
    list_mode_options,
    lookup_backend,
    set_source,
)
from fqcompile.weights.dispatch import Inner, Variant
from fqcompile.weights.node_weight import NodeWeight
from fqcompile.weights.store import STORE

# What AOTAutograd requires of an input that Dynamo did not make, and what makes CUDA graphs treat
# it as a parameter instead of copying it on every call.
_STATIC_INPUT = {STATIC_INPUT: "unguarded"}


def lower(state: GraphState, args: Sequence[Any]) -> Variant:
    """Compile the graph; the variant knows which outer arguments it takes, and packs the rest."""
    inputs, given = placeholders(state.graph), len(state.args)
    inputs, packed_inputs = inputs[:given], inputs[given:]
    # A graph without packed weights keeps the arguments that it is called with.
    dead = {n for n in inputs if not n.users and n in state.constants and packed_inputs}
    kept = [i for i, node in enumerate(inputs) if node not in dead]
    for node in dead:
        state.graph.erase_node(node)
    weight_at = {argument(op, "qweight"): weight for op, weight in state.packed.items()}
    pack = _packer([weight_at[node] for node in packed_inputs[::2]])
    packed = pack(args)
    _describe_inputs(inputs, packed_inputs, packed)
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


def _packer(weights: Sequence[NodeWeight]) -> Callable[[Sequence[Any]], tuple[Tensor, ...]]:
    """A function that makes the packed tensors of an instance's arguments, in input order."""

    def pack(args: Sequence[Any]) -> tuple[Tensor, ...]:
        sources = [tuple(args[i] for i in weight.inputs) for weight in weights]
        packed = map(STORE.packed, weights, sources)
        return tuple(tensor for weight in packed for tensor in weight.tensors)

    return pack


def _describe_inputs(
    known: Sequence[fx.Node], new: Sequence[fx.Node], packed: tuple[Tensor, ...]
) -> None:
    fakes = [node.meta.get("example_value") for node in known]
    fake_mode = detect_fake_mode([fake for fake in fakes if fake is not None])
    for node, tensor in zip(new, packed, strict=True):
        set_source(node, None)
        fake = fake_mode.from_tensor(tensor, static_shapes=True) if fake_mode else tensor
        node.meta |= {"example_value": fake, "tensor_dict": dict(_STATIC_INPUT)}
