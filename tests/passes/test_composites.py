"""Calls that read several weights are written out where a weight is constant, and compute the same.

The oracle is the call itself: Dynamo's graph has PyTorch's own, on dequantized weights.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import frozen
from tests.passes.graphs import Run, assert_same, run_passes

E, L, B = 64, 5, 3
X = torch.randn(B, L, E, generator=torch.Generator().manual_seed(3))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
PADDED = torch.arange(L).expand(B, L) >= torch.tensor([[5], [3], [1]])
HALVES = {"kdim": E // 2, "vdim": E // 2}
ATTENTION = ["in_proj_weight", "out_proj.weight"]
PARTS = ["in_proj_weight[0]", "in_proj_weight[1]", "in_proj_weight[2]", "out_proj.weight"]
ENCODER = [f"self_attn.{name}" for name in ATTENTION] + ["linear1.weight", "linear2.weight"]
CELL = ["weight_ih", "weight_hh"]


def mha(heads: int = 4, **options: Any) -> nn.Module:
    module = nn.MultiheadAttention(E, heads, **options)
    nn.init.normal_(module.in_proj_bias)
    return module


def encoder(**options: Any) -> nn.Module:
    options = {"batch_first": True, **options}
    return nn.TransformerEncoderLayer(E, 4, 2 * E, **options)


def own(layer: nn.Module, x: Tensor, **options: Any) -> Any:
    return layer(x, x, x, **options)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], list[str]]] = {
    "fast": (
        lambda: mha(batch_first=True), lambda m, x: own(m, x, need_weights=False)[0], ATTENTION,
    ),
    "fast, what was seen": (lambda: mha(batch_first=True), own, ATTENTION),
    "fast, of each head": (
        lambda: mha(batch_first=True),
        lambda m, x: own(m, x, average_attn_weights=False), ATTENTION,
    ),
    "fast, causal": (
        lambda: mha(batch_first=True), lambda m, x: own(m, x, attn_mask=CAUSAL < 0)[0], ATTENTION,
    ),
    "fast, padded": (
        lambda: mha(batch_first=True), lambda m, x: own(m, x, key_padding_mask=PADDED)[0],
        ATTENTION,
    ),
    "fast, both": (
        lambda: mha(batch_first=True),
        lambda m, x: own(m, x, key_padding_mask=PADDED, attn_mask=CAUSAL < 0)[0],
        ATTENTION,
    ),
    "odd heads": (lambda: mha(1), lambda m, x: own(m, x), ATTENTION),
    "sequence first": (mha, lambda m, x: own(m, x, need_weights=False)[0], ATTENTION),
    "of each head": (mha, lambda m, x: own(m, x, average_attn_weights=False), ATTENTION),
    "no batch": (mha, lambda m, x: own(m, x[0]), ATTENTION),
    "no bias": (
        lambda: nn.MultiheadAttention(E, 4, bias=False),
        lambda m, x: own(m, x, need_weights=False)[0], ATTENTION,
    ),
    "a mask that adds": (
        mha, lambda m, x: own(m, x, attn_mask=torch.full((B, B), 0.5).triu(1))[0], ATTENTION,
    ),
    "a mask of each head": (
        mha, lambda m, x: own(m, x, attn_mask=CAUSAL[:B, :B].expand(L * 4, B, B).contiguous())[0],
        ATTENTION,
    ),
    "padded": (
        mha, lambda m, x: own(m, x.transpose(0, 1), key_padding_mask=PADDED)[0], ATTENTION,
    ),
    "causal by a hint": (
        mha,
        lambda m, x: own(m, x, attn_mask=CAUSAL[:B, :B], is_causal=True, need_weights=False)[0],
        ATTENTION,
    ),
    "other keys": (mha, lambda m, x: m(x, 2 * x, x + 1, need_weights=False)[0], PARTS),
    "other widths": (
        lambda: mha_of_halves(),
        lambda m, x: m(x, x[..., : E // 2], x[..., E // 2 :], need_weights=False)[0],
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "encoder": (
        encoder, lambda m, x: m(x),
        ENCODER,
    ),
    "encoder, norm first, padded": (
        lambda: encoder(norm_first=True, activation="gelu"),
        lambda m, x: m(x, src_key_padding_mask=PADDED),
        ENCODER,
    ),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(E, 4, 2 * E, batch_first=True),
        lambda m, x: m(x, x + 1, tgt_mask=CAUSAL, tgt_is_causal=True),
        [*ENCODER[:2], *(f"multihead_attn.{name}" for name in PARTS), *ENCODER[2:]],
    ),
    "LSTMCell": (lambda: nn.LSTMCell(E, 48), lambda m, x: m(x[0], m(x[1])), CELL * 2),
    "GRUCell": (lambda: nn.GRUCell(E, 48), lambda m, x: m(x[0], m(x[1])), CELL * 2),
    "RNNCell": (lambda: nn.RNNCell(E, 48), lambda m, x: m(x[0], m(x[1])), CELL * 2),
    "RNNCell of relu": (
        lambda: nn.RNNCell(E, 48, nonlinearity="relu", bias=False),
        lambda m, x: m(x[0], m(x[1])), CELL * 2,
    ),
    "Bilinear": (
        lambda: nn.Bilinear(E, E // 2, 12), lambda m, x: m(x, x[..., : E // 2]), ["weight"],
    ),
}  # fmt: skip


def mha_of_halves() -> nn.Module:
    return nn.MultiheadAttention(E, 4, **HALVES)


def ran(
    make: Callable[[], nn.Module], call: Callable[..., Any], x: Tensor = X, **options: Any
) -> Run:
    torch.manual_seed(0)
    module = frozen(make()).eval()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Any:
            return call(self.inner, x)

    return run_passes(Whole(), x, **options)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_of_the_call_is_a_site(name: str) -> None:
    make, call, names = CASES[name]
    run = ran(make, call)
    found = [site.name.removeprefix("inner.") for site in run.state.sites if site.plan]
    assert found == names
    assert_same(run)


@pytest.mark.parametrize("name", ["fast", "sequence first", "encoder", "Bilinear"])
def test_open_sizes(name: str) -> None:
    make, call, names = CASES[name]
    x = X.clone()
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    run = ran(make, call, x, dynamic=None)
    assert len([site for site in run.state.sites if site.plan]) == len(names)
    assert_same(run)


@pytest.mark.parametrize("seen", [False, True])
def test_weights_of_attention_that_drops_in_training_are_sites(seen: bool) -> None:
    """The same seed drops the same."""
    torch.manual_seed(0)
    module = frozen(mha(dropout=0.5)).train()
    run = run_passes(lambda x: own(module, x, need_weights=seen), X)
    assert len([site for site in run.state.sites if site.plan]) == len(ATTENTION)
    both = []
    for outputs in (run.outputs, run.expected):
        torch.manual_seed(1)
        both.append(outputs())
    for got, want in zip(*both, strict=True):
        if isinstance(want, Tensor):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.manual_seed(2)
    assert not torch.allclose(run.outputs()[0], both[0][0]), "it drops"


KEPT: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "added keys": (lambda: mha(add_bias_kv=True), own),
    "a key of zeros": (lambda: mha(add_zero_attn=True), own),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_call_that_does_more_stays_with_its_reason(name: str) -> None:
    run = ran(*KEPT[name])
    assert not run.state.sites and run.ops["multi_head_attention_forward"] == 1
    assert {kept.reason.partition(":")[0] for kept in run.state.kept} == {
        "read by multi_head_attention_forward"
    }
    assert_same(run)
