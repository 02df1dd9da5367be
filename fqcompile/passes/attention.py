"""Attention of few rows on a CPU, as composite function or written out, for the rule of fuse.

k', v' = k, v, or each head repeated: k[:, :, None].expand(B, G, n, T, D).reshape(B, H, T, D)
scaled_dot_product_attention(q, k', v', mask, scale=s, ...)                  [B, H, S, E]
dropout(softmax(softcap(q @ k'.transpose(2, 3) * s) + mask), p=0) @ v'       [B, H, S, E]
  ->  fqcompile::attention(q, k, v, mask, s, ...)

attention_forms.py has all that the second form may be. S is 1 to 8, and known.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fqcompile.kernels.cpu.attention import MOST_ROWS, Options, attention
from fqcompile.native import library as native
from fqcompile.native.interface import DTYPES
from fqcompile.passes.attention_forms import Attention, Step, read_attention
from fqcompile.passes.effects import effects_between, in_transforms
from fqcompile.passes.fuse_patterns import is_call
from fqcompile.passes.state import (
    GraphState,
    erase_dead,
    erase_unused,
    example,
    same_layout,
    same_shape,
)
from fqcompile.torch_compat import FakeTensor


def fuse_attention(state: GraphState, node: fx.Node) -> bool:
    """scaled_dot_product_attention, or what it does written out -> fqcompile::attention

    A call that keeps PyTorch's kernel is named in `state.matched`, with the reason.
    """
    call = read_attention(node) if state.config.fuse_attention else None
    if call is None:
        return False
    call = call if isinstance(call, str) else _with_shared_heads(call, node)
    reason = call if isinstance(call, str) else _refusal(state, node, call)
    if isinstance(call, str) or reason is not None:
        line = f"attention: {node.name} stays as it is: {reason}"
        state.matched += [] if line in state.matched else [line]
        return False
    with state.graph.inserting_before(node):
        fused = _emit(state.graph, node, call)
    inside = sorted(call.inside)
    inputs = [source for n in inside for source in n.all_input_nodes]
    node.replace_all_uses_with(fused)
    erase_unused(state.graph, inside)
    erase_dead(state, inputs)
    return True


def _emit(graph: fx.Graph, node: fx.Node, call: Attention) -> fx.Node:
    q, v, out = example(call.q), example(call.v), example(node)
    assert q is not None and v is not None and out is not None
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    options = Options(scale, call.softcap, call.causal, nan_if_hidden=call.written_out)
    mask, found = _mask(graph, call.masks, q.shape[1]), _result(q, v)
    tensors = (call.q, call.k, call.v, mask, call.sinks)
    fused = graph.call_function(attention, (*tensors, *options))
    fused.meta = {**node.meta, "example_value": found}
    if out.dim() == 3 or not same_layout(found, out):
        fused = graph.call_method("contiguous", (fused,))
        fused.meta = {**node.meta, "example_value": q.new_empty(found.shape)}
    if out.dim() == 3:
        fused = graph.call_method("flatten", (fused, 0, 1))
        fused.meta = dict(node.meta)
    return fused


def _result(q: Tensor, v: Tensor) -> Tensor:
    """As the operator lays it out."""
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def _mask(graph: fx.Graph, steps: Iterable[Step], heads: int) -> fx.Node | None:
    """What is done to scores, done to zeros, in fp32; None where nothing is."""
    mask: fx.Node | None = None
    for step in steps:
        tensor = step.tensor
        if step.merged:
            tensor = graph.call_method("unflatten", (tensor, 0, (-1, heads)))
        wide = None if mask is None else graph.call_method("float", (mask,))
        if step.name == "hide":
            fp32: dict[str, Any] = {"dtype": torch.float32}
            wide = wide or graph.call_function(torch.zeros_like, (tensor,), fp32)
            mask = graph.call_function(torch.where, (tensor, step.number, wide))
        elif wide is None:
            mask = tensor
        elif step.name == "add":
            mask = graph.call_function(torch.add, (wide, tensor))
        else:
            mask = graph.call_function(torch.mul, (wide, step.number))
    return mask


def _with_shared_heads(call: Attention, node: fx.Node) -> Attention:
    """The call on k and v as they were before heads were repeated, if that can be seen."""
    (k, repeat_k), (v, repeat_v) = _unrepeated(call.k), _unrepeated(call.v)
    before, after = example(k), example(v)
    if before is None or after is None or not same_shape(before.shape[1:2], after.shape[1:2]):
        return call
    begins = min(n for n in (call.begins, repeat_k, repeat_v) if n is not None)
    if begins is node or effects_between(begins, node, call.inside):
        return call  # what was repeated may have been written to since
    return replace(call, k=k, v=v, begins=begins)


def _unrepeated(node: Any) -> tuple[Any, fx.Node | None]:
    """(x, where repeating begins) of x[:, :, None].expand(...).reshape(...), or (node, None)."""
    if is_call(node, ("repeat_interleave",)):
        x, *rest = node.args
        given = dict(zip(("repeats", "dim"), rest, strict=False)) | dict(node.kwargs)
        same = given.get("dim") in (1, -3) and isinstance(given.get("repeats"), int)
        return (x, node) if same and example(x) is not None else (node, None)
    expand: Any = node.args[0] if is_call(node, ("reshape",)) else None
    inserted: Any = expand.args[0] if is_call(expand, ("expand",)) else None
    x = inserted.args[0] if _inserts_dimension_2(inserted) else None
    source, wide, out = example(x), example(expand), example(node)
    if source is None or wide is None or out is None or source.dim() != 4 or wide.dim() != 5:
        return node, None
    batch, heads, keys, width = source.shape
    repeats = wide.shape[2]
    is_repeat = same_shape(wide.shape, (batch, heads, repeats, keys, width))
    merged = same_shape(out.shape, (batch, heads * repeats, keys, width))
    return (x, inserted) if is_repeat and merged else (node, None)


def _inserts_dimension_2(node: Any) -> bool:
    whole = slice(None)
    if is_call(node, ("unsqueeze",), 2):
        return node.args[1] in (2, -3)
    return is_call(node, ("getitem",), 2) and node.args[1] in (
        (whole, whole, None, whole, whole),
        (whole, whole, None),
    )


def _refusal(state: GraphState, node: fx.Node, call: Attention) -> str | None:
    """Why PyTorch's kernel stays, or None."""
    values, out = [example(n) for n in (call.q, call.k, call.v)], example(node)
    steps = [step for step in call.masks if step.tensor is not None]
    steps += [] if call.sinks is None else [Step("sinks", tensor=call.sinks)]
    masks = [(step, example(step.tensor)) for step in steps]
    q, k, v = values
    if q is None or k is None or v is None or out is None or any(m is None for _, m in masks):
        return "its tensors are not known"
    if not all(t.dim() == 4 and t.device.type == "cpu" for t in (q, k, v)):
        return "it takes [batch, heads, rows, width] on a CPU"
    if not isinstance(q.shape[2], int) or not 1 <= q.shape[2] <= MOST_ROWS:
        return f"{q.shape[2]} rows of q, and the kernel is for 1 to {MOST_ROWS}"
    if q.dtype not in DTYPES or any(t.dtype != q.dtype for t in (k, v, out)):
        return f"q, k, v and the result are {[str(t.dtype) for t in (q, k, v, out)]}"
    if not _fits(q, k, v, call) or not same_shape(out.shape[-2:], (q.shape[2], v.shape[3])):
        return f"shapes {[tuple(t.shape) for t in (q, k, v, out)]} are broadcast or not known"
    for step, mask in masks:
        if mask is not None and (call.causal or not _is_mask(mask, step, call)):
            return f"a mask of {mask.dtype}{' beside is_causal' if call.causal else ''}"
    if call.dropout:
        return "dropout"
    if state.grad_possible:
        return "a gradient may flow through it"
    if not (out.is_contiguous() or (out.dim() == 4 and same_layout(_result(q, v), out))):
        return f"the result has the strides {out.stride()}"
    if call.begins is not node and effects_between(call.begins, node, call.inside):
        return "something between may write to its tensors"
    if node in in_transforms(state.graph):
        return "it is inside of a transform of torch.func"
    tensors = (*values, *(mask for _, mask in masks))
    others = [type(t).__name__ for t in tensors if not isinstance(t, FakeTensor)]
    if others:  # of a subclass, which may know no operator but PyTorch's
        return f"tensors of the type {others[0]}"
    return native.refusal()


def _fits(q: Tensor, k: Tensor, v: Tensor, call: Attention) -> bool:
    batch, heads, _, width = q.shape
    shared = k.shape[1]
    sizes = (heads, shared, width, v.shape[3])
    if not all(isinstance(n, int) and n > 0 for n in sizes) or heads % shared:
        return False
    keys, values = k.shape[2], v.shape[2]
    # A single one may have been broadcast by the mask; of several, PyTorch allows no other number.
    if not (statically_known_true(keys == values) or statically_known_true(keys > 1)):
        return False
    same_keys = same_shape(k.shape, (batch, shared, keys, width))
    found = [value for value in map(example, call.inside) if value is not None]
    whole = all(same_shape(t.shape[:2], (batch, heads)) for t in found if t.dim() == 4)
    return whole and same_keys and same_shape(v.shape[:2], (batch, shared))


def _is_mask(mask: Tensor, step: Step, call: Attention) -> bool:
    if mask.dtype == torch.bool:
        known = step.name == "hide" or not call.written_out
    else:
        known = step.name != "hide" and mask.dtype in DTYPES
    return known and mask.device.type == "cpu" and mask.dim() <= 4
