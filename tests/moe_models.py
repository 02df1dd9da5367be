"""Small Mixture-of-Experts models: Hugging Face classes, and some written as papers write them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

VOCAB, WIDTH, HIDDEN, EXPERTS, TOP_K, LAYERS = 128, 64, 96, 8, 2, 2
COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "initializer_range": WIDTH**-0.5,  # a projection keeps the size of its input
    "pad_token_id": 0,
    "eos_token_id": None,
}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
FULL_ATTENTION = {"layer_types": ["full_attention"] * LAYERS}


def _deepseek() -> nn.Module:
    config = hf.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        intermediate_size=HIDDEN,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    return hf.DeepseekV3ForCausalLM(config)


def _qwen3() -> nn.Module:
    sizes = {"intermediate_size": HIDDEN, "moe_intermediate_size": HIDDEN, "head_dim": 16}
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**COMMON, **sizes, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
    )


def _olmoe() -> nn.Module:
    sizes = {"intermediate_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**COMMON, **sizes))


def _gpt_oss() -> nn.Module:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    sizes = {"intermediate_size": HIDDEN, "head_dim": 16}
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(**COMMON, **sizes, **LOCAL, **FULL_ATTENTION, **rope)
    )


def _llama4() -> nn.Module:
    sizes = {"intermediate_size": HIDDEN, "intermediate_size_mlp": HIDDEN, "head_dim": 16}
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": 1}
    return hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **COMMON, **sizes, **experts, **FULL_ATTENTION, moe_layers=list(range(LAYERS))
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**COMMON, **LOCAL, intermediate_size=HIDDEN)
    ),
    "qwen3-moe": _qwen3,
    "olmoe": _olmoe,
    "deepseek-v3": _deepseek,
    "gpt-oss": _gpt_oss,
    "granite-moe": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(**COMMON, **LOCAL, intermediate_size=HIDDEN)
    ),
    "llama4": _llama4,
}


def build(name: str, dtype: torch.dtype, implementation: str) -> nn.Module:
    """A frozen model with biases that somebody would miss; Llama 4 knows one implementation."""
    torch.manual_seed(0)
    model = MODELS[name]().eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.normal_(std=0.1)
        elif parameter.dim() == 3:  # some classes leave these as memory gave them
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    if name != "llama4":
        model.set_experts_implementation(implementation)
    return model.to(dtype)


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    """The stacks [E, ., .] of a model, without biases [E, 1, N]."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 3 and 1 not in p.shape}


def logits(model: Any, ids: Tensor) -> Tensor:
    """Of the prompt, without a cache of keys."""
    with torch.no_grad():
        found: Tensor = model(ids, use_cache=False).logits
    return found


class GatheredMoe(nn.Module):
    """Experts picked with w[ids] for each token, three projections apart, by einsum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w1, self.w3 = (nn.Parameter(_stack(HIDDEN, WIDTH)) for _ in range(2))
        self.w2 = nn.Parameter(_stack(WIDTH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, ids = self.router(tokens).softmax(-1).topk(TOP_K, dim=-1)
        gate = F.silu(torch.einsum("ti,taoi->tao", tokens, self.w1[ids]))
        up = torch.einsum("ti,taoi->tao", tokens, self.w3[ids])
        out = torch.einsum("tao,taio->tai", gate * up, self.w2[ids])
        return torch.einsum("tai,ta->ti", out, weights).view(x.shape)


class TutelMoe(nn.Module):
    """Tutel's and DeepSpeed-MoE's dispatch: [E, C, K] by a batched matmul with a bias each."""

    def __init__(self, capacity: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.capacity = capacity
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.fc1, self.fc2 = (
            nn.Parameter(_stack(HIDDEN, WIDTH)),
            nn.Parameter(_stack(HIDDEN, WIDTH)),
        )
        self.bias1 = nn.Parameter(torch.randn(EXPERTS, 1, HIDDEN) / 10)
        self.bias2 = nn.Parameter(torch.randn(EXPERTS, 1, WIDTH) / 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        mask = F.one_hot(chosen, EXPERTS)
        place = ((mask.cumsum(0) - 1) * mask).sum(-1)
        slots = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity)
        fits = (place < self.capacity)[:, None, None]
        dispatch = (mask[..., None] * slots[:, None] * fits).to(x.dtype)
        y = torch.einsum("sec,sm->ecm", dispatch, tokens)
        y = F.gelu(torch.add(torch.matmul(y, self.fc1.permute(0, 2, 1)), self.bias1))
        y = torch.add(torch.matmul(y, self.fc2), self.bias2)
        return torch.einsum("sec,ecm,s->sm", dispatch, y, weights).view(x.shape)


def _stack(n: int, k: int) -> Tensor:
    return torch.randn(EXPERTS, n, k) / k**0.5


class ModuleListMoe(nn.Module):
    """Every expert runs on every token and is weighted, so the loop needs no data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        shares = torch.zeros(*x.shape[:-1], EXPERTS, dtype=x.dtype).scatter(-1, chosen, weights)
        return sum(expert(x) * shares[..., i, None] for i, expert in enumerate(self.experts))


class GShardMoe(nn.Module):
    """GShard, Algorithm 1 (arXiv 2006.16668), in groups of tokens with a capacity per expert."""

    def __init__(self, capacity: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.capacity = capacity
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.wi = nn.Parameter(_stack(WIDTH, HIDDEN))
        self.wo = nn.Parameter(_stack(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)  # [groups, tokens, experts]
        weights, chosen = gates.topk(TOP_K, dim=-1)
        mask = F.one_hot(chosen, EXPERTS).flatten(1, 2)
        place = ((mask.cumsum(1) - 1) * mask).sum(-1)
        slots = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity)
        fits = (place < self.capacity)[..., None, None]
        one = (mask[..., None] * slots[..., None, :] * fits).to(x.dtype)
        one = one.unflatten(1, (-1, TOP_K))
        dispatch = one.sum(2)
        combine = (one * weights[..., None, None]).sum(2)
        expert_in = torch.einsum("gsec,gsm->egcm", dispatch, x)
        h = torch.relu(torch.einsum("egcm,emh->egch", expert_in, self.wi))
        expert_out = torch.einsum("egch,ehm->egcm", h, self.wo)
        return torch.einsum("gsec,egcm->gsm", combine, expert_out)


LAYERS_OF_OUR_OWN: dict[str, type[nn.Module]] = {
    "w[ids] by einsum": GatheredMoe,
    "GShard": GShardMoe,
    "Tutel": TutelMoe,
    "ModuleList": ModuleListMoe,
}
