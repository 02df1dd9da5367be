"""Models over two ranks compute what one rank computes with the same shards, fake-quantized."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import fqcompile
from tests.dense_models import LAYERS
from tests.distributed.pair import Pair
from tests.distributed.sharded_models import GATHERS_STRIDED, MOE, filled, gathered, sharded, whole
from tests.helpers import assert_close, assert_not_dense, finequant, report
from tests.test_models import CHAIN

TOKENS = 3
NEEDS_EP_SIZE = pytest.mark.skipif(
    not hasattr(hf.distributed.DistributedConfig, "ep_size"),
    reason="DistributedConfig of transformers before 5.23 has no ep_size",
)
EXPERT_PARALLEL = pytest.param("ep", marks=NEEDS_EP_SIZE)
CASES = [
    ("opt", "tp", torch.float32),
    ("llama", "tp", torch.float32),
    ("qwen3", "tp", torch.bfloat16),
    pytest.param("mixtral", "tp", torch.float32, marks=GATHERS_STRIDED),
    pytest.param("mixtral", "ep", torch.bfloat16, marks=NEEDS_EP_SIZE),
    pytest.param("qwen3-moe", "tp", torch.bfloat16, marks=GATHERS_STRIDED),
    pytest.param("qwen3-moe", "ep", torch.float32, marks=NEEDS_EP_SIZE),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "way", "dtype"), CASES, ids=lambda value: str(value))
def test_equals_one_rank(
    pair: Pair, tmp_path: Path, name: str, way: str, dtype: torch.dtype
) -> None:
    first, second = pair.run(compare, name, way, dtype, tmp_path, "grouped_mm")
    assert torch.equal(first, second)


@pytest.mark.few(1)
@pytest.mark.parametrize("way", [pytest.param("tp", marks=GATHERS_STRIDED), EXPERT_PARALLEL])
def test_gathered_experts_equal_one_rank(pair: Pair, tmp_path: Path, way: str) -> None:
    pair.run(compare, "mixtral", way, torch.float32, tmp_path, "batched_mm")


def compare(name: str, way: str, dtype: torch.dtype, folder: Path, experts: str) -> Tensor:
    """On each rank: logits and greedy tokens of the compiled model against the oracle's."""
    model = sharded(name, dtype, folder, way, experts)
    original = whole(name, dtype, experts)
    _assert_equal(gathered(model), dict(original.named_parameters(remove_duplicate=False)))
    ids = torch.randint(1, 100, (2, 7))
    with torch.no_grad():
        compiled = finequant(model, min_elements=0, dynamic=True)
        actual, tokens = _greedy(compiled, ids)
        dense = original(ids, use_cache=False).logits
        _assert_all_quantized(name)
        fqcompile.fake_quantize_(model, fqcompile.reports()[-1])
        faked = filled(whole(name, dtype, experts), gathered(model))
        expected, expected_tokens = _greedy(faked, ids)
    assert_close(actual, expected, depth=CHAIN * LAYERS)
    if dtype == torch.float32:  # of bf16 logits two are often equal within rounding
        assert torch.equal(tokens, expected_tokens)
    assert_not_dense(actual, expected, dense)
    return actual


def _greedy(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the prompt, and the tokens that follow it."""
    first = model(ids, use_cache=False).logits
    for _ in range(TOKENS):
        logits = model(ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return first, ids


def _assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def _assert_all_quantized(name: str) -> None:
    """One graph; every matrix but routers and embeddings, and each as the part that lies here."""
    assert not report().warnings
    for site in report().plan.kept:
        assert site.reason and site.reason.startswith(("router", "embedding")), site
    assert len(report().plan.quantized) == {"opt": 13}.get(name, 13 if name in MOE else 15)
