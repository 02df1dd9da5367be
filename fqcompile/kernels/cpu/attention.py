"""The operator `fqcompile::attention`: softmax(scale q kᵀ + mask) v for few rows of q, on x86.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, E], mask broadcast to [B, H, S, T] -> [B, H, S, E]

Head h of q reads head h // (H / G) of k and v: those that repeat_kv or enable_gqa would repeat are
read once (native/attention.cpp). The result lies in memory as [B, S, H, E]. There is no backward.

    softcap            cap tanh(score / cap) before the mask is added, 0 for none
    causal             row i of q sees keys 0 to i; it takes no mask
    nan_if_hidden      what a row of q becomes from which -inf or False hides every key: NaN, as by
                       softmax written out, or zeros, as by scaled_dot_product_attention
    sinks              broadcast to [B, H, S, 1]: one more score of each row, which takes its share
                       of the softmax and meets no value

Keys that the mask hides from all rows of q that meet them are not read: a static cache costs what
is filled of it. Hidden are False, -inf, and numbers up to -1e30, which leave nothing of a score,
unless some row has nothing else. NaN in keys and values that are not read has no effect, where
PyTorch makes NaN of it.
"""

from collections.abc import Callable, Iterable, Sequence
from struct import Struct
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fqcompile.kernels.cpu.stream import serve
from fqcompile.locks import in_forked_child
from fqcompile.native import library as native
from fqcompile.native.interface import DTYPES, define

_MOST_KEYS = 2**31 - 1  # C++ lists the visible ones in 32 bits each
MOST_ROWS = 8  # rows of q; for more, PyTorch's kernel shares the work on keys better
# The struct that the C++ function reads; all fields have eight bytes.
_CALL = Struct("=35q2d")
_MASK_TYPES = {**DTYPES, torch.bool: 3}
Known = Callable[[Any], bool]


class Options(NamedTuple):
    """What follows the tensors in the schema, in its order."""

    scale: float
    softcap: float
    causal: bool
    nan_if_hidden: bool


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    *,
    known: Known = bool,
) -> None:
    """Whether tensors fit together; `known` tells of a condition on sizes if it is known to hold.

    Raises:
        RuntimeError: they do not, in sizes or types.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise RuntimeError(f"attention takes [batch, heads, rows, width] of each, not {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        kinds = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise RuntimeError(f"attention takes fp32, bf16 or fp16, the same for all, not {kinds}")
    (batch, heads, rows, width), (_, shared, keys, _) = q.shape, k.shape
    expected = (batch, shared, keys, width), (batch, shared, keys)
    given = k.shape, v.shape[:3]
    differ = [
        a != b
        for want, got in zip(expected, given, strict=True)
        for a, b in zip(want, got, strict=True)
    ]
    if any(map(known, differ)) or known(shared == 0) or known(heads % shared != 0):
        raise RuntimeError(
            f"attention of {shapes}: batch, heads of k and v, keys and width must be the same, and "
            "heads of q a multiple of those of k"
        )
    if known(keys > _MOST_KEYS):
        raise RuntimeError(f"attention of {shapes}: it takes at most {_MOST_KEYS} keys")
    if causal and mask is not None:
        raise RuntimeError(f"attention takes a mask, here {tuple(mask.shape)}, or causal, not both")
    full = (batch, heads, rows)
    _check_broadcast("mask", mask, (*full, keys), _MASK_TYPES, known)
    _check_broadcast("sinks", sinks, (*full, 1), DTYPES, known)


def _check_broadcast(
    name: str, given: Tensor | None, full: Sequence[Any], kinds: Iterable[torch.dtype], known: Known
) -> None:
    if given is None:
        return
    sizes = list(zip(given.shape[::-1], full[::-1], strict=False))
    if given.dim() > 4 or any(known(m != n) and known(m != 1) for m, n in sizes):
        raise RuntimeError(
            f"{name} has the shape {tuple(given.shape)}; attention takes one that broadcasts to "
            f"{tuple(full)}"
        )
    if given.dtype not in kinds:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise RuntimeError(f"{name} is {given.dtype}; attention takes one of {names}")


def _impl(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, *given: Any
) -> Tensor:
    options = Options(*given)
    _check(q, k, v, mask, sinks, options.causal)
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, v_width = v.shape
    out = q.new_empty((batch, queries, heads, v_width))
    if not out.numel():
        return out.transpose(1, 2)
    if native.refusal() is not None:
        return out.transpose(1, 2).copy_(plain_attention(q, k, v, mask, sinks, options))
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    size = q.element_size()
    (qb, qh, qs, _), (kb, kh, ks, _), (vb, vh, vs, _) = q.stride(), k.stride(), v.stride()
    full = (batch, heads, queries)
    *mask_rows, mask_key, mask_type = _broadcast(mask, (*full, keys))
    *sink_rows, _, sinks_type = _broadcast(sinks, (*full, 1))
    fields = _CALL.pack(
        q.data_ptr(), size * qb, size * qh, size * qs,
        k.data_ptr(), size * kb, size * kh, size * ks,
        v.data_ptr(), size * vb, size * vh, size * vs,
        *mask_rows, mask_key, mask_type, *sink_rows, sinks_type,
        out.data_ptr(), DTYPES[q.dtype],
        batch, heads, kv_heads, queries, keys, width, v_width,
        options.causal, options.nan_if_hidden, in_forked_child(), options.scale, options.softcap,
    )  # fmt: skip
    library = native.native_library()
    serve(library)
    library.attention(fields)
    return out.transpose(1, 2)


def _broadcast(given: Tensor | None, shape: tuple[int, ...]) -> list[int]:
    """Where it lies, its strides in bytes, and its type."""
    if given is None:
        return [0] * 6
    strides = [given.element_size() * stride for stride in given.expand(shape).stride()]
    return [given.data_ptr(), *strides, _MASK_TYPES[given.dtype]]


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, options: Options
) -> Tensor:
    """The same by PyTorch's operations, which repeat heads and read what is hidden."""
    scale, softcap, causal, nan_if_hidden = options
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    if not softcap and not nan_if_hidden and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    scores = (q.float() @ k.float().transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    if sinks is not None:
        ends = sinks.float().expand(*scores.shape[:-1], 1)
        scores, hidden = torch.cat([scores, ends], -1), hidden & (ends == -torch.inf)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    if not nan_if_hidden:
        weights = weights.masked_fill(hidden, 0)
    return (weights @ v.float()).to(q.dtype)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, *given: Any
) -> Tensor:
    _check(q, k, v, mask, sinks, Options(*given).causal, known=statically_known_true)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


_library = torch.library.Library("fqcompile", "FRAGMENT")
define(_library, "attention")
_library.impl("attention", _impl, "CPU")
torch.library.register_fake("fqcompile::attention", _fake, lib=_library)
attention = torch.ops.fqcompile.attention.default
