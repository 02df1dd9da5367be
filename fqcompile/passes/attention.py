"""Attention of few rows on a CPU, as composite function or written out, for the rule of fuse.

k', v' = k, v, or each head repeated: k[:, :, None].expand(B, G, n, T, D).reshape(B, H, T, D)
scaled_dot_product_attention(q, k', v', mask, scale=s, ...)                  [B, H, S, E]
dropout(softmax(softcap(q @ k'.transpose(2, 3) * s) + mask), p=0) @ v'       [B, H, S, E]
  ->  fqcompile::attention(q, k, v, mask, s, ...)

Casts, scale, softcap, mask and dropout of the second form may be missing. S is 1 to 8, and known.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fqcompile.kernels.cpu.attention import MOST_ROWS, Options, attention
from fqcompile.native import library as native
from fqcompile.native.library import DTYPES
from fqcompile.passes.effects import effects_between, in_transforms
from fqcompile.passes.fuse_patterns import MULTIPLIES, is_call
from fqcompile.passes.op_nodes import ADDS, sole_user
from fqcompile.passes.state import GraphState, erase_dead, example, same_layout, same_shape
from fqcompile.torch_compat import FakeTensor
from fqcompile.weights.recipe import target_name

_DIVIDES = ("truediv", "div", "divide")
_CASTS = ("to", "type", "type_as", "float")


@dataclass(frozen=True)
class _Call:
    """What is computed; `begins`: the first node that would not run any more."""

    q: Any
    k: Any
    v: Any
    mask: Any
    scale: float | None
    begins: fx.Node
    softcap: float = 0.0
    causal: bool = False
    written_out: bool = False
    dropout: bool = False


def fuse_attention(state: GraphState, node: fx.Node) -> bool:
    """scaled_dot_product_attention, or what it does written out -> fqcompile::attention

    A call that keeps PyTorch's kernel is named in `state.matched`, with the reason.
    """
    call = _composite(node) or _written_out(node)
    if call is None or not state.config.fuse_attention:
        return False
    call = _with_shared_heads(call, node)
    reason = _refusal(state, node, call)
    if reason is not None:
        line = f"attention: {node.name} stays as it is: {reason}"
        state.matched += [] if line in state.matched else [line]
        return False
    q, out = example(call.q), example(node)
    assert q is not None and out is not None
    scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
    options = Options(scale, call.softcap, call.causal, nan_if_hidden=call.written_out)
    with state.graph.inserting_before(node):
        arguments = (call.q, call.k, call.v, call.mask, *options)
        fused = state.graph.call_function(attention, arguments)
        fused.meta = dict(node.meta)
        if not same_layout(_laid_out(out), out):
            fused.meta["example_value"] = _laid_out(out)
            fused = state.graph.call_method("contiguous", (fused,))
            fused.meta = dict(node.meta)
    inputs = node.all_input_nodes
    node.replace_all_uses_with(fused)
    state.graph.erase_node(node)
    erase_dead(state, inputs)
    return True


def _laid_out(out: Tensor) -> Tensor:
    """As the operator lays it out."""
    return out.new_empty([out.shape[i] for i in (0, 2, 1, 3)]).transpose(1, 2)


def _composite(node: fx.Node) -> _Call | None:
    if target_name(node.target) != "scaled_dot_product_attention" or len(node.args) != 6:
        return None
    q, k, v, mask, dropout, causal = node.args
    if not isinstance(causal, bool):
        return None
    scale = node.kwargs.get("scale")
    return _Call(q, k, v, mask, scale, node, causal=causal, dropout=dropout != 0)  # type: ignore[arg-type]


def _written_out(node: fx.Node) -> _Call | None:
    """softmax(...) @ v, read from its end to the product q @ kᵀ."""
    if not is_call(node, ("matmul",), 2):
        return None
    weights, v = node.args
    inner, dropout = _undropped(weights)
    softmax = _uncast(inner)
    if not _is_softmax(softmax):
        return None
    scores, mask = _unmasked(_uncast(softmax.args[0]))
    for scaled, softcap in _uncapped(scores):
        product, scale = _unscaled(scaled)
        keys: Any = product.args[1] if is_call(product, ("matmul",), 2) else None
        if not _closed(product, node) or not _is_transpose(keys):
            continue
        q, k = product.args[0], keys.args[0]
        return _Call(q, k, v, mask, scale, product, softcap, False, True, dropout)
    return None


def _undropped(node: Any) -> tuple[Any, bool]:
    """What a dropout reads, and whether it drops anything."""
    if not is_call(node, ("dropout",)):
        return node, False
    x, *rest = node.args
    given = dict(zip(("p", "training"), rest, strict=False)) | dict(node.kwargs)
    return x, given.get("training", True) is not False and given.get("p", 0.5) != 0


def _uncast(node: Any) -> Any:
    """What a cast reads: sums are fp32 anyhow."""
    value = example(node)
    source = node.args[0] if is_call(node, _CASTS) and node.args else None
    before = example(source)
    if value is None or before is None or before.device != value.device:
        return node
    return source if before.dtype in DTYPES and value.dtype in DTYPES else node


def _is_softmax(node: Any) -> bool:
    if not is_call(node, ("softmax",)) or not node.args:
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dim in (-1, 3)


def _unmasked(node: Any) -> tuple[Any, Any]:
    """(scores, mask) of a sum; scores are the product, or what is computed from one."""
    if not is_call(node, ADDS[:2], 2):
        return node, None
    for scores, mask in (node.args, node.args[::-1]):
        names = ("matmul", *MULTIPLIES, *_DIVIDES)
        if is_call(scores, names) and sole_user(scores, node) and isinstance(mask, fx.Node):
            return scores, mask
    return node, None


def _uncapped(node: Any) -> Iterator[tuple[Any, float]]:
    """cap * tanh(x / cap) -> (x, cap); what may be no softcap also as it is, (x, 0)."""
    tanh, factor = _parted(node, MULTIPLIES)
    if is_call(tanh, ("tanh",), 1):
        x, divisor = _parted(tanh.args[0], _DIVIDES)
        if factor == divisor != 0:
            yield x, factor
    yield node, 0.0


def _unscaled(node: Any) -> tuple[Any, float]:
    x, divisor = _parted(node, _DIVIDES)
    return (x, 1 / divisor) if x is not node and divisor else _parted(node, MULTIPLIES)


def _parted(node: Any, names: tuple[str, ...]) -> tuple[Any, float]:
    """(x, c) of x * c, c * x or x / c; else the node itself, and 1."""
    if is_call(node, names, 2):
        x, number = node.args
        if isinstance(x, int | float) and names is MULTIPLIES:
            x, number = number, x
        if isinstance(number, int | float):
            return x, float(number)
    return node, 1.0


def _is_transpose(node: Any) -> bool:
    if is_call(node, ("getattr",), 2):
        return bool(node.args[1] == "mT")
    return is_call(node, ("transpose",), 3) and sorted(d % 4 for d in node.args[1:]) == [2, 3]


def _closed(product: Any, end: fx.Node) -> bool:
    """Whether each value from the product on is read by the next alone, up to `end`."""
    node = product
    while node is not end:
        if not isinstance(node, fx.Node) or len(node.users) != 1:
            return False
        (node,) = node.users
    return True


def _with_shared_heads(call: _Call, node: fx.Node) -> _Call:
    """The call on k and v as they were before heads were repeated, if that can be seen."""
    (k, repeat_k), (v, repeat_v) = _unrepeated(call.k), _unrepeated(call.v)
    before, after = example(k), example(v)
    if before is None or after is None or before.shape[1] != after.shape[1]:
        return call
    begins = min(n for n in (call.begins, repeat_k, repeat_v) if n is not None)
    if begins is node or effects_between(begins, node):
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


def _refusal(state: GraphState, node: fx.Node, call: _Call) -> str | None:
    """Why PyTorch's kernel stays, or None."""
    values = [example(n) for n in (call.q, call.k, call.v)]
    q, k, v = values
    out, mask = example(node), example(call.mask)
    if (
        q is None
        or k is None
        or v is None
        or out is None
        or (call.mask is not None) != (mask is not None)
    ):
        return "its tensors are not known"
    if not all(t.dim() == 4 and t.device.type == "cpu" for t in (q, k, v, out)):
        return "it takes [batch, heads, rows, width] on a CPU"
    if not isinstance(q.shape[2], int) or not 1 <= q.shape[2] <= MOST_ROWS:
        return f"{q.shape[2]} rows of q, and the kernel is for 1 to {MOST_ROWS}"
    if q.dtype not in DTYPES or any(t.dtype != q.dtype for t in (k, v, out)):
        return f"q, k, v and the result are {[str(t.dtype) for t in (q, k, v, out)]}"
    if not _fits(q, k, v, out):
        return f"shapes {[tuple(t.shape) for t in (q, k, v, out)]} are broadcast or not known"
    if mask is not None and (call.causal or not _is_mask(mask, call)):
        return f"a mask of {mask.dtype}{' beside is_causal' if call.causal else ''}"
    if call.dropout:
        return "dropout"
    if state.grad_possible:
        return "a gradient may flow through it"
    if not (out.is_contiguous() or same_layout(_laid_out(out), out)):
        return f"the result has the strides {out.stride()}"
    if call.begins is not node and effects_between(call.begins, node):
        return "something between may write to its tensors"
    if node in in_transforms(state.graph):
        return "it is inside of a transform of torch.func"
    others = [type(t).__name__ for t in (*values, mask) if not isinstance(t, FakeTensor | None)]
    if others:  # of a subclass, which may know no operator but PyTorch's
        return f"tensors of the type {others[0]}"
    return native.refusal()


def _fits(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> bool:
    batch, heads, rows, width = q.shape
    shared = k.shape[1]
    sizes = (heads, shared, width, v.shape[3])
    if not all(isinstance(n, int) and n > 0 for n in sizes) or heads % shared:
        return False
    keys, values = k.shape[2], v.shape[2]
    # A single one may have been broadcast by the mask; of several, PyTorch allows no other number.
    if not (statically_known_true(keys == values) or statically_known_true(keys > 1)):
        return False
    same_keys = same_shape(k.shape, (batch, shared, keys, width))
    same_values = same_shape(v.shape[:2], (batch, shared))
    return same_keys and same_values and same_shape(out.shape, (batch, heads, rows, v.shape[3]))


def _is_mask(mask: Tensor, call: _Call) -> bool:
    boolean = mask.dtype == torch.bool and not call.written_out
    return mask.device.type == "cpu" and mask.dim() <= 4 and (boolean or mask.dtype in DTYPES)
