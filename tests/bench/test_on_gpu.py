"""What only a GPU can show of the benchmarks: graphs are captured, and times are believable."""

import pytest
import torch

from bench.core.measure import recorded_on_gpu
from bench.experts import run as experts
from bench.kernels import run as kernels
from bench.models import run as models
from fqcompile.kernels.spec import gpu_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="times on a GPU"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("bits", ["4", "8"])
def test_every_contender_that_is_there_is_right_and_no_faster_than_memory(bits: str) -> None:
    group = "128" if bits == "4" else "column"
    options = ["--shapes", "4096x4096", "--m", "1,16", "--bits", bits, "--group", group]
    arguments = kernels.parse(options)
    results = kernels.run(arguments, DEVICE, gpu_of(DEVICE), recorded_on_gpu)
    timed = {row["contender"] for row in results.rows if "us" in row}
    assert {"fqcompile closed form", "fqcompile dense", "cuBLAS", "torch.compile"} <= timed
    wrong = [row for row in results.rows if "wrong" in row.get("failure", "")]
    assert not wrong, wrong
    for row in results.rows:
        if "us" in row:
            assert row["ideal_us"] < row["us"] < 100 * row["ideal_us"], row


def test_models_run_as_cuda_graphs() -> None:
    options = ["--model", "tiny", "--layers", "1", "--batch", "2"]
    rows = models.run(models.parse(options)).rows
    assert {"inductor", "int8", "int4", "int4 head"} <= {row["way"] for row in rows}
    for row in rows:
        assert "failure" not in row, row
        assert row["cudagraph_skips"] == 0, row
        assert row["ideal_ms"] < row["ms"], row


@pytest.mark.parametrize("bits", ["4", "8"])
def test_every_way_to_run_experts_is_right_and_no_faster_than_memory(bits: str) -> None:
    options = ["--models", "qwen3-30b-a3b", "--tokens", "1,16", "--bits", bits]
    results = experts.run(experts.parse(options), DEVICE, gpu_of(DEVICE), recorded_on_gpu)
    assert not results.left_out
    assert not [row for row in results.rows if "failure" in row]
    assert {"fqcompile gathered", "fqcompile grouped"} < {r["contender"] for r in results.rows}
    for row in results.rows:
        assert row["ideal_us"] < row["us"] < 100 * row["ideal_us"], row
