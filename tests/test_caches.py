"""A second process finds the compiled code of the first in AOTAutograd's and Inductor's caches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from fqcompile import fake_quantize_, reports

results = {}
# Without calibration: reports()[0] is of the first model, and each model has its own.
OPTIONS = {"granularity": 64, "calibration": None}
for seed in sys.argv[1:]:
    torch.manual_seed(int(seed))
    model = torch.nn.Sequential(
        torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 128)
    ).requires_grad_(False)
    compiled = torch.compile(model, backend="finequant", options=OPTIONS)
    x = torch.linspace(-1, 1, 4 * 128).view(4, 128)
    with torch.no_grad():
        y = compiled(x)
    x.requires_grad_()
    compiled(x).sum().backward()
    expected = fake_quantize_(model, reports()[0])(x.detach())
    error = ((y - expected).norm() / expected.norm()).item()
    results[seed] = {"error": error, "y": y.flatten().tolist(), "grad": x.grad.flatten().tolist()}
kinds = ("hit", "miss", "bypass")
results["aot"] = {kind: counters["aot_autograd"][f"autograd_cache_{kind}"] for kind in kinds}
results["fx"] = {kind: counters["inductor"][f"fxgraph_cache_{kind}"] for kind in kinds}
results["quantized"] = [len(report.plan.quantized) for report in reports()]
print(json.dumps(results))
"""


def _run(directory: Path, *seeds: str, before: str = "") -> dict[str, Any]:
    """The script's results with the models of these seeds, one after the other."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(directory)}
    command = [sys.executable, "-c", before + SCRIPT, *seeds]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["quantized"] == [2, 2]  # without and with a gradient
    for seed in seeds:
        # Dot products of at most 256 terms, two after each other, summed in another order.
        assert result[seed]["error"] < 2 * 256 * 2.0**-24
    return result


@pytest.mark.slow
def test_a_second_process_hits_both_caches(tmp_path: Path) -> None:
    first = _run(tmp_path, "0")
    second = _run(tmp_path, "1", "0")
    assert first["aot"] == {"hit": 0, "miss": 2, "bypass": 0}
    assert second["aot"] == {"hit": 2, "miss": 0, "bypass": 0}
    assert first["fx"]["hit"] == 0
    assert second["fx"]["hit"] > 0
    assert second["fx"]["miss"] == second["fx"]["bypass"] == 0
    # The code is shared; the weights are not in it.
    assert second["0"] == first["0"]
    assert second["1"]["y"] != first["0"]["y"]
    # An upgrade may change what the operators take; the graphs themselves look the same.
    upgrade = "import fqcompile.passes.lower as lower; lower.CACHE_TAG = 'another version'"
    assert _run(tmp_path, "0", before=upgrade)["aot"] == {"hit": 0, "miss": 2, "bypass": 0}
