"""PyTorch's calls that read several weights, or scale a product, written as calls that read one.

addmm(b, x, w, beta=β, alpha=α)      ->  β b + α (x w)
lstm_cell(x, (h, c), w_ih, w_hh)     ->  the gates of linear(x, w_ih) + linear(h, w_hh)
bilinear(x1, x2, w)                  ->  einsum("...i,nij->...nj", x1, w) x2
multi_head_attention_forward(...)    ->  linear, attention, linear
_transformer_encoder_layer_fwd(...)  ->  the same, layer_norm, linear, linear

`normalize` inserts these calls into graphs, and a packed weight answers by them. Each function has
the arguments of the call it stands for, reads no sizes, and returns NotImplemented where the call
does more than is written here.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """addmm, addmv, baddbmm, scaled. With beta = 0 the bias counts for nothing, even NaN."""
    if (beta, alpha) == (1, 1):
        return NotImplemented
    y = torch.matmul(left, right)
    if beta == 0:
        return y * alpha
    return torch.add(bias if beta == 1 else bias * beta, y, alpha=alpha)


def lstm_cell(
    x: Tensor,
    hx: Pair,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Pair:
    """x [B, K], h and c [B, H], w_ih [4H, K], w_hh [4H, H]; the new h and c."""
    h, c = hx
    gates = F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """x [B, K], h [B, H], w_ih [3H, K], w_hh [3H, H]; the new h."""
    of_x, of_h = F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)
    (r, z, n), (r_h, z_h, n_h) = of_x.chunk(3, 1), of_h.chunk(3, 1)
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (h - n) * (z + z_h).sigmoid() + n


def rnn_cell_of(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The RNN cell whose new h the activation gives: rnn_tanh_cell, rnn_relu_cell."""

    def rnn_cell(
        x: Tensor,
        h: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        """x [B, K], h [B, H], w_ih [H, K], w_hh [H, H]; the new h."""
        return activation(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))

    return rnn_cell


def bilinear(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x1 [..., I], x2 [..., J], weight [N, I, J], bias [N]; [..., N]."""
    y = (torch.einsum("...i,nij->...nj", x1, weight) * x2.unsqueeze(-2)).sum(-1)
    return y if bias is None else y + bias


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """torch.nn.functional's; query [L, B, E] or [L, E]. Not for keys and values added to those."""
    added = (bias_k, bias_v, static_k, static_v)
    if add_zero_attn or any(one is not None for one in added):
        return NotImplemented
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    weights = separate if use_separate_proj_weight else in_proj_weight
    parts = _projected((query, key, value), weights, in_proj_bias)
    q, k, v = (part.unflatten(-1, (num_heads, -1)).movedim(0, -2) for part in parts)
    batched = query.dim() == 3
    hint = is_causal and key_padding_mask is None and not need_weights
    mask = None if hint else _added(attn_mask, query.dtype)
    if mask is not None and mask.dim() == 3 and batched:
        mask = mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, query.dtype)
        padding = padding[:, None, None] if batched else padding
        mask = padding if mask is None else mask + padding
    drop = dropout_p if training else 0.0
    y, seen = _attention(
        q, k, v, mask, embed_dim // num_heads, need_weights, is_causal=hint, dropout_p=drop
    )
    y = F.linear(y.movedim(-2, 0).flatten(-2), out_proj_weight, out_proj_bias)
    return y, seen.mean(-3) if need_weights and average_attn_weights else seen


def native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """What nn.MultiheadAttention calls in inference; query [B, L, E]. Where the mask is not zero,
    nothing is seen: it is [L, L] (type 0), [B, L] (1) or [B, H, L, L] (2)."""
    if query.is_nested:
        return NotImplemented
    parts = _projected((query, key, value), qkv_weight, qkv_bias)
    q, k, v = (part.unflatten(-1, (num_head, -1)).transpose(1, 2) for part in parts)
    if mask is not None:
        mask = _added(mask.to(torch.bool), query.dtype)
        mask = mask[:, None, None] if mask_type == 1 else mask
    y, seen = _attention(q, k, v, mask, embed_dim // num_head, need_weights)
    y = F.linear(y.transpose(1, 2).flatten(-2), proj_weight, proj_bias)
    return y, seen.mean(-3) if need_weights and average_attn_weights else seen


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Any:
    """What nn.TransformerEncoderLayer calls in inference; src [B, L, E]."""
    if src.is_nested:
        return NotImplemented
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias, mask, False, False, mask_type)

    def attend(x: Tensor) -> Tensor:
        y: Tensor = native_multi_head_attention(x, x, x, embed_dim, num_heads, *weights)[0]
        return y

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(first(src))
        return x + feed(second(x))
    x = first(src + attend(src))
    return second(x + feed(x))


def _projected(tensors: tuple[Tensor, ...], weights: Any, bias: Tensor | None) -> Any:
    """Query, key and value times their weights, three or one [3E, E] above each other."""
    query, key, value = tensors
    together = isinstance(weights, Tensor)
    if together and query is key and key is value:
        return F.linear(query, weights, bias).chunk(3, -1)
    parts = weights.chunk(3) if together else weights
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [F.linear(*one) for one in zip(tensors, parts, biases, strict=True)]


def _added(mask: Any, dtype: torch.dtype) -> Any:
    """The mask as what is added to scores: -inf where one of bool is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    head_dim: int,
    need_weights: bool,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Any:
    """The result and, if needed, what each query saw; q, k, v [..., H, L, D]."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal), None
    scores = torch.matmul(q * head_dim**-0.5, k.transpose(-2, -1))
    seen = (scores if mask is None else scores + mask).softmax(-1)
    if dropout_p > 0:
        seen = F.dropout(seen, dropout_p)
    return torch.matmul(seen, v), seen


COMPOSITES: dict[str, Callable[..., Any]] = {
    "addmm": addmm,
    "addmv": addmm,
    "baddbmm": addmm,
    "lstm_cell": lstm_cell,
    "gru_cell": gru_cell,
    "rnn_tanh_cell": rnn_cell_of(torch.tanh),
    "rnn_relu_cell": rnn_cell_of(torch.relu),
    "bilinear": bilinear,
    "multi_head_attention_forward": multi_head_attention_forward,
    "_native_multi_head_attention": native_multi_head_attention,
    "_transformer_encoder_layer_fwd": transformer_encoder_layer,
}
