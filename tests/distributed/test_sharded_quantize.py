"""quantize_ over two ranks: eagerly and compiled, the model computes what the packed parts say."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.distributed.shards import is_dtensor, local_part, with_part
from fqcompile.weights.parameter import PackedWeight
from tests.dense_models import LAYERS
from tests.distributed.pair import Pair
from tests.distributed.sharded_models import GATHERS_STRIDED, filled, sharded, whole
from tests.helpers import assert_close, finequant
from tests.test_models import CHAIN

CASES = [
    ("opt", "tp"),
    ("llama", "tp"),
    pytest.param("mixtral", "tp", marks=GATHERS_STRIDED),
    ("qwen3-moe", "ep"),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "way"), CASES)
def test_packed_parts_run(pair: Pair, tmp_path: Path, name: str, way: str) -> None:
    pair.run(run_packed, name, way, tmp_path)


def run_packed(name: str, way: str, folder: Path) -> None:
    model = sharded(name, torch.float32, folder, way)
    plan = fqcompile.quantize_(model, min_elements=0)
    assert len(plan.quantized) >= 12
    expected = filled(whole(name, torch.float32), dense_values(model))
    ids = torch.randint(1, 100, (2, 7))
    with torch.no_grad():
        wanted = expected(ids, use_cache=False).logits
        for run in (model, finequant(model, min_elements=0)):
            actual = run(ids, use_cache=False).logits
            assert_close(actual, wanted, depth=CHAIN * LAYERS)
    sites = [site for site in fqcompile.reports()[-1].plan.sites if "proj" in site.name]
    assert {site.status for site in sites} == {"quantized"}


def dense_values(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole and dequantized."""
    values = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = local_part(parameter)
        if isinstance(part, PackedWeight):
            parameter = with_part(parameter, part.dequantized())
        values[name] = parameter.full_tensor() if is_dtensor(parameter) else parameter
    return values
