"""The rule that fuses attention of few rows: its drawing, each form, and near misses that stay."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.testing._internal.two_tensor import TwoTensor

from fqcompile.kernels.cpu.attention import attention
from fqcompile.native import library as native_library
from tests.passes.graphs import Run, assert_same, run_passes

sdpa = F.scaled_dot_product_attention
Q, K, V = torch.randn(2, 8, 1, 32), torch.randn(2, 2, 40, 32), torch.randn(2, 2, 40, 24)
SEEN = torch.rand(2, 1, 1, 40) < 0.5
NUMBERS = torch.where(SEEN, 0.0, torch.finfo(torch.float32).min)


def repeated(t: Tensor, n: int = 4) -> Tensor:
    """As Hugging Face's repeat_kv."""
    b, g, s, d = t.shape
    return t[:, :, None, :, :].expand(b, g, n, s, d).reshape(b, g * n, s, d)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As eager_attention_forward of Hugging Face's models."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As Gemma 2's."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    scores = torch.tanh(scores / 5.0) * 5.0 + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """As T5's."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 1.0
    scores = scores + bias
    scores = scores + mask
    return torch.matmul(F.dropout(F.softmax(scores, dim=-1), 0.1, False), v)


def filled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    """As MPT's."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.3 + bias
    scores = scores.masked_fill(hidden, torch.finfo(q.dtype).min)
    return torch.matmul(F.softmax(scores.float(), dim=-1).to(v.dtype), v)


def in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As Falcon's with rotary embedding; k and v have one head for all."""
    scores = q @ k.transpose(-1, -2)
    scores /= math.sqrt(32)
    return F.softmax(scores + mask, dim=-1, dtype=q.dtype) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, mask: Tensor) -> Tensor:
    """As Falcon's with alibi, which is scaled as the scores are."""
    scores = (q @ k.transpose(-1, -2)).view(2, 8, -1, 40).to(torch.float32)
    logits = scores + slopes.view(2, 8, 1, -1)
    logits *= 0.3
    weights = F.softmax(logits + mask, dim=-1, dtype=q.dtype)
    return (weights.view(2, 8, -1, 40) @ v).flatten(0, 1)


def merged(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, mask: Tensor) -> Tensor:
    """As Bloom's: batch and heads are one dimension of the products."""
    q, keys = q.reshape(16, -1, 32), k.reshape(16, -1, 32).transpose(-1, -2)
    scores = slopes.baddbmm(batch1=q, batch2=keys, beta=1.0, alpha=0.3)
    scores = scores.view(2, 8, -1, 40) + mask
    weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), 0.1, False)
    out = torch.bmm(weights.view(16, -1, 40), v.reshape(16, -1, 24))
    return out.view(2, 8, -1, 24).permute(0, 2, 1, 3).reshape(2, -1, 192)


def sinking(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """As GPT-OSS's."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    ends = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    logits = torch.cat([scores, ends], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    weights = F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    return torch.matmul(F.dropout(weights, 0.1, training=False).to(v.dtype), v)


def ops(run: Run) -> list[fx.Node]:
    return [node for node in run.state.graph.nodes if node.target is attention]


def shapes(run: Run) -> list[tuple[int, ...]]:
    """Of k and v, as the operator reads them."""
    (op,) = ops(run)
    return [tuple(a.meta["example_value"].shape) for a in op.args[1:3]]


def test_the_drawing() -> None:
    run = run_passes(
        lambda q, k, v, m: sdpa(q, repeated(k), repeated(v), m, scale=0.3), Q, K, V, SEEN
    )
    assert run.state.matched == ["attention: scaled_dot_product_attention"]
    assert run.ops == {"fqcompile.attention.default": 1}
    assert shapes(run) == [(2, 2, 40, 32), (2, 2, 40, 24)]
    assert ops(run)[0].args[4:] == (None, 0.3, 0.0, False, False)
    assert_same(run)


WIDE_K, WIDE_V = K.repeat(1, 4, 1, 1), V.repeat(1, 4, 1, 1)
BIAS, SLOPES = torch.randn(1, 8, 1, 40), torch.randn(16, 1, 40)
HIDDEN = ~SEEN | (torch.arange(40) < 3)
FORMS: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "no mask": (lambda q, k, v: sdpa(q, repeated(k), repeated(v)), (Q, K, V)),
    "enable_gqa": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), (Q, K, V)),
    "repeat_interleave": (
        lambda q, k, v: sdpa(q, k.repeat_interleave(4, dim=1), v.repeat_interleave(4, 1)),
        (Q, K, V),
    ),
    "unsqueeze": (
        lambda q, k, v, m: sdpa(
            q,
            k.unsqueeze(2).expand(-1, -1, 4, -1, -1).reshape(2, 8, 40, 32),
            repeated(v),
            attn_mask=m,
        ),
        (Q, K, V, SEEN),
    ),
    "causal": (
        lambda q, k, v: sdpa(q, repeated(k), repeated(v), is_causal=True),
        (Q.expand(2, 8, 5, 32), K, V),
    ),
    "operator": (
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(
            q, repeated(k), repeated(v)
        ),
        (Q, K, V),
    ),
    "written out": (lambda q, k, v: written_out(q, repeated(k), repeated(v)), (Q, K, V)),
    "written out, mask": (
        lambda q, k, v, m: written_out(q, repeated(k), repeated(v), m),
        (Q, K, V, NUMBERS),
    ),
    "softcap": (lambda q, k, v, m: capped(q, repeated(k), repeated(v), m), (Q, K, V, NUMBERS)),
    "BERT's": (
        lambda q, k, v, m: (
            F.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(32) + m, dim=-1) @ v
        ),
        (Q, K.repeat(1, 4, 1, 1), V.repeat(1, 4, 1, 1), NUMBERS),
    ),
    "no scale": (
        lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1), -1) @ v,
        (Q, K.repeat(1, 4, 1, 1), V.repeat(1, 4, 1, 1)),
    ),
    "mT, and the number first": (
        lambda q, k, v, m: torch.softmax(0.3 * (q @ repeated(k).mT) + m, -1) @ repeated(v),
        (Q, K, V, NUMBERS),
    ),
    "softcap, the number first": (
        lambda q, k, v: torch.softmax(5.0 * torch.tanh(q @ repeated(k).mT / 5), -1) @ repeated(v),
        (Q, K, V),
    ),
    "tanh alone": (
        lambda q, k, v: torch.softmax(torch.tanh(0.3 * (q @ repeated(k).mT)), -1) @ repeated(v),
        (Q, K, V),
    ),
    "four rows": (
        lambda q, k, v, m: (
            written_out(q, repeated(k), repeated(v), m).transpose(1, 2).reshape(2, 4, -1)
        ),
        (torch.randn(2, 8, 4, 32), K, V, torch.randn(4, 40)),
    ),
    "position bias": (biased, (Q, WIDE_K, WIDE_V, BIAS, NUMBERS)),
    "bias, and numbers in place of scores": (filled, (Q, WIDE_K, WIDE_V, BIAS[0], HIDDEN)),
    "-inf in place of scores": (
        lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, -math.inf), -1) @ v,
        (Q, WIDE_K, WIDE_V, HIDDEN),
    ),
    "in place": (in_place, (Q, K[:, :1], V[:, :1], NUMBERS)),
    "alibi": (alibi, (Q, WIDE_K, WIDE_V, SLOPES, NUMBERS)),
    "merged": (merged, (Q, WIDE_K, WIDE_V, SLOPES, NUMBERS)),
    "merged, four rows": (merged, (Q.repeat(1, 1, 4, 1), WIDE_K, WIDE_V, SLOPES, NUMBERS)),
    "sinks": (
        lambda q, k, v, m, s: sinking(q, repeated(k), repeated(v), m, s),
        (Q, K, V, NUMBERS, torch.randn(8)),
    ),
    "sinks alone": (
        lambda q, k, v, s: torch.softmax(torch.cat([q @ k.mT, s], -1), -1)[..., :-1] @ v,
        (Q, WIDE_K, WIDE_V, torch.randn(2, 8, 1, 1)),
    ),
    "a product as mask": (
        lambda q, k, v, far: torch.softmax(q @ k.mT * 0.3 + q @ far.mT, -1) @ v,
        (Q, WIDE_K, WIDE_V, torch.randn(8, 40, 32)),
    ),
}
HEADS = {
    **dict.fromkeys(("BERT's", "no scale", "position bias", "-inf in place of scores"), 8),
    **dict.fromkeys(("bias, and numbers in place of scores", "alibi", "a product as mask"), 8),
    **dict.fromkeys(("merged", "merged, four rows", "sinks alone"), 8),
    "in place": 1,
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str) -> None:
    function, arguments = FORMS[name]
    run = run_passes(function, *arguments)
    heads = HEADS.get(name, 2)
    assert shapes(run) == [(2, heads, 40, 32), (2, heads, 40, 24)], run.state.matched
    assert_same(run)
    assert all("softmax" not in op and "dot_product" not in op for op in run.ops)
    assert run.ops["matmul"] == (name == "a product as mask") and not run.ops["bmm"]


def test_masks_of_16_bits_are_summed_up_in_32() -> None:
    """200 has the unit 1 in bf16: added or scaled there, weights would be off by e^.5."""
    slopes = torch.arange(40.0) + 200 - torch.rand(16, 1, 40)
    low = [t.bfloat16() for t in (Q, WIDE_K, WIDE_V, slopes, torch.randn(2, 1, 1, 40))]
    for function in (alibi, merged):
        run = run_passes(function, *low)
        assert len(ops(run)) == 1
        (got,), want = run.outputs(), function(*(t.double() for t in low))
        assert (got - want).abs().max() <= 2**-8 * WIDE_V.abs().max() * 1.1


def test_bf16_and_symbolic_lengths() -> None:
    low = [t.bfloat16() for t in (Q, K, V, NUMBERS)]
    run = run_passes(lambda q, k, v, m: written_out(q, repeated(k), repeated(v), m), *low)
    assert len(ops(run)) == 1
    (got,) = run.outputs()
    q, k, v, m = (t.double() for t in low)
    # 2^-9 by rounding the result, and 2^-9 Σ p|v| by rounding each p: p sums to 1
    bound = 2**-8 * v.abs().max() * 1.1
    assert got.dtype == torch.bfloat16
    assert (got - written_out(q, repeated(k), repeated(v), m)).abs().max() <= bound
    run = run_passes(lambda q, k, v: sdpa(q, repeated(k), repeated(v)), Q, K, V, dynamic=True)
    assert not ops(run)  # heads and width are symbolic, too


def test_a_cache_that_grows() -> None:
    """Its keys and values have a symbol each: PyTorch compares them only as it runs."""

    def attend(q: Tensor, new: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = torch.cat([k, new], 2), torch.cat([v, new], 2)
        return sdpa(q, repeated(keys), repeated(values))

    k, v = K.clone(), K.flip(2)
    for t in (k, v):
        torch._dynamo.mark_dynamic(t, 2)
    run = run_passes(attend, Q, torch.randn(2, 2, 1, 32), k, v, dynamic=None)
    lengths = [n for _, _, n, _ in shapes(run)]
    assert all(isinstance(n, torch.SymInt) for n in lengths) and str(lengths[0]) != str(lengths[1])


def static_cache(q: Tensor, new: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    k.index_copy_(2, at, new)
    return sdpa(q, repeated(k), repeated(v))


def test_a_cache_is_written_before_it_is_read() -> None:
    run = run_passes(static_cache, Q, torch.randn(2, 2, 1, 32), K, V, torch.tensor([3]))
    assert shapes(run)[0] == (2, 2, 40, 32)
    assert_same(run)


def written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = repeated(k)
    k.zero_()
    return sdpa(q, wide, repeated(v))


def test_a_write_after_repeating_leaves_the_repeated_heads() -> None:
    run = run_passes(written_between, Q, K, V)
    assert shapes(run)[0] == (2, 8, 40, 32)
    assert_same(run)


def other_user(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v, weights


def write_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    v.add_(1)
    return torch.softmax(scores, -1) @ v


def read_after(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(2, 3)
    scores.mul_(0.3)
    return torch.softmax(scores, -1) @ v, scores


def into_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    mask = mask.expand(2, 8, 1, 40).clone()
    mask += q @ k.transpose(2, 3)
    return torch.softmax(mask, -1) @ v, mask


OF_NO_FORM = "its scores are not a product"
NEAR_MISSES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "weights are returned": (other_user, (Q, WIDE_K, WIDE_V), "have other readers"),
    "scores are read after a write": (read_after, (Q, WIDE_K, WIDE_V), "have other readers"),
    "scores are added to the mask": (into_the_mask, (Q, WIDE_K, WIDE_V, NUMBERS), OF_NO_FORM),
    "a number that leaves something of a score": (
        lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(m, -1e9), -1) @ v,
        (Q, WIDE_K, WIDE_V, HIDDEN),
        OF_NO_FORM,
    ),
    "keys that are no transpose": (
        lambda q, k, v: torch.softmax(q @ k, -1) @ v,
        (Q, WIDE_K.mT.contiguous(), WIDE_V),
        "not q @ k.transpose(-2, -1)",
    ),
    "a cap between two scales": (
        lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT * 0.3) * 4, -1) @ v,
        (Q, WIDE_K, WIDE_V),
        "in another order: times, cap, times",
    ),
    "a cap of what is masked": (
        lambda q, k, v, m: torch.softmax(torch.tanh(q @ k.mT + m), -1) @ v,
        (Q, WIDE_K, WIDE_V, NUMBERS),
        "in another order: add, cap",
    ),
    "heads in another order": (
        lambda q, k, v, m: (
            torch.softmax(((q @ k.mT).view(8, 2, 1, 40) + m).view(2, 8, 1, 40), -1) @ v
        ),
        (Q, WIDE_K, WIDE_V, torch.randn(8, 1, 1, 40)),
        OF_NO_FORM,
    ),
    "sinks that meet a value": (
        lambda q, k, v, s: torch.softmax(torch.cat([q @ k.mT, s], -1), -1) @ v,
        (Q, WIDE_K[:, :, 1:], WIDE_V, torch.randn(2, 8, 1, 1)),
        "what is dropped after its softmax",
    ),
    "a key without a value": (
        lambda q, k, v: torch.softmax(q @ k.mT, -1)[..., :-1] @ v,
        (Q, WIDE_K, WIDE_V[:, :, 1:]),
        "what is dropped after its softmax",
    ),
    "sinks before the mask": (
        lambda q, k, v, s, m: torch.softmax(torch.cat([q @ k.mT, s], -1) + m, -1)[..., :-1] @ v,
        (Q, WIDE_K, WIDE_V, torch.randn(2, 8, 1, 1), torch.randn(41)),
        "in another order: sinks, add",
    ),
    "less than the largest score of another row": (
        lambda q, k, v: torch.softmax((s := q @ k.mT) - s.max(dim=-2, keepdim=True).values, -1) @ v,
        (Q.repeat(1, 1, 2, 1), WIDE_K, WIDE_V),
        OF_NO_FORM,
    ),
    "one value for each key": (
        lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v,
        (Q, WIDE_K, V[0, 0, :, 0]),
        "takes [batch, heads, rows, width]",
    ),
    "a write inside": (write_inside, (Q, WIDE_K, WIDE_V), "may write"),
    "nine rows": (
        lambda q, k, v: sdpa(q, k, v),
        (Q.repeat(1, 1, 9, 1), WIDE_K, WIDE_V),
        "9 rows of q",
    ),
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), (Q, WIDE_K, WIDE_V), "dropout"),
    "dropout written out": (
        lambda q, k, v: F.dropout(torch.softmax(q @ k.transpose(2, 3), -1), 0.5, True) @ v,
        (Q, WIDE_K, WIDE_V),
        "dropout",
    ),
    "three dimensions": (
        lambda q, k, v: sdpa(q, k, v),
        (Q[0], WIDE_K[0], WIDE_V[0]),
        "takes [batch, heads, rows, width]",
    ),
    "broadcast batch": (lambda q, k, v: sdpa(q, k, v), (Q, WIDE_K[:1], WIDE_V[:1]), "broadcast"),
    "one key for all numbers of a mask": (
        lambda q, k, v, m: torch.softmax(q @ k.transpose(2, 3) + m, -1) @ v,
        (Q, WIDE_K[:, :, :1], WIDE_V, NUMBERS),
        "broadcast",
    ),
    "float64": (
        lambda q, k, v: sdpa(q, k, v),
        (Q.double(), WIDE_K.double(), WIDE_V.double()),
        "float64",
    ),
    "softmax over rows": (
        lambda q, k, v: torch.softmax(q @ k.transpose(2, 3), 2) @ v,
        (Q, WIDE_K, WIDE_V),
        "softmax is over dimension 2",
    ),
    "another function between": (
        lambda q, k, v: torch.softmax((q @ k.transpose(2, 3)).abs(), -1) @ v,
        (Q, WIDE_K, WIDE_V),
        OF_NO_FORM,
    ),
    "another cap": (
        lambda q, k, v: torch.softmax(torch.tanh(q @ k.transpose(2, 3) / 3) * 4, -1) @ v,
        (Q, WIDE_K, WIDE_V),
        OF_NO_FORM,
    ),
    "a mask that is true or false, added": (
        lambda q, k, v, m: torch.softmax(q @ k.transpose(2, 3) + m, -1) @ v,
        (Q, WIDE_K, WIDE_V, SEEN),
        "a mask of torch.bool",
    ),
    "vmap": (
        lambda q, k, v: torch.vmap(lambda a, b, c: sdpa(a, b, c))(q[None], k[None], v[None]),
        (Q, WIDE_K, WIDE_V),
        "transform",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    function, arguments, reason = NEAR_MISSES[name]
    run = run_passes(function, *arguments)
    assert not ops(run)
    lines = [line for line in run.state.matched if line.startswith("attention:")]
    assert len(lines) == bool(reason) and reason in "".join(lines), lines


def test_tensors_of_a_subclass_keep_it() -> None:
    """A cache in another form, say in 8 bits, may know no operator but PyTorch's."""
    k, v = TwoTensor(WIDE_K, WIDE_K), TwoTensor(WIDE_V, WIDE_V)
    for arguments in ((Q, k, v), (Q, WIDE_K, WIDE_V, TwoTensor(NUMBERS, NUMBERS))):
        run = run_passes(lambda *given: sdpa(*given), *arguments)
        assert not ops(run) and "tensors of the type TwoTensor" in run.state.matched[0]


def test_gradients_and_the_option_keep_it() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)

    run = run_passes(function, Q, WIDE_K, WIDE_V, grad=True)
    assert not ops(run) and "a gradient may flow" in run.state.matched[0]
    assert not ops(run_passes(function, Q, WIDE_K, WIDE_V, fuse_attention=False))
    assert ops(run_passes(function, Q, WIDE_K, WIDE_V))


def test_without_a_compiler_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "refusal", lambda: "no C++ compiler")
    run = run_passes(lambda q, k, v: sdpa(q, k, v), Q, WIDE_K, WIDE_V)
    assert not ops(run) and "no C++ compiler" in run.state.matched[0]
