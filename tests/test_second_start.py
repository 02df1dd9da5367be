"""The second start of a model finds its quantized weights on disk; nothing else changes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, logging, sys
import torch
from torch import nn
import fqcompile.weights.disk_cache as found
from fqcompile import reports

seed, bits, on_disk, dtype = sys.argv[1:]
if on_disk == "damaged":
    for path in found.disk_cache().directory.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
logging.getLogger("fqcompile").setLevel(logging.INFO)
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("fqcompile").addHandler(handler)

made = []
choose_and_quantize = found.choose_and_quantize
def counted(w, *rest):
    made.append(tuple(w.shape))
    return choose_and_quantize(w, *rest)
found.choose_and_quantize = counted

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)
        self.conv1d = nn.Parameter(torch.randn(256, 512) / 16)
        self.experts = nn.Parameter(torch.randn(4, 256, 256) / 16)
        self.small = nn.Linear(256, 64)

    def forward(self, x):
        x = self.down(torch.relu(self.up(x))) @ self.conv1d
        x = torch.bmm(x.view(4, 2, 256), self.experts.mT)
        return self.small(x)

torch.manual_seed(int(seed))
model = Stack().requires_grad_(False).to(getattr(torch, dtype))
options = {"bits": int(bits), "inner_backend": "eager"}
compiled = torch.compile(model, backend="finequant", options=options, fullgraph=True)
y = compiled(torch.linspace(-1, 1, 4 * 256).view(4, 256).to(model.up.weight.dtype))
sites = [(s.name, s.bits, s.group_size, s.relative_error) for s in reports()[0].sites]
print(json.dumps({"y": y.double().flatten().tolist(), "sites": sites, "made": made,
                  "said": [line for line in lines if "found quantized" in line]}))
"""


def start(
    directory: Path,
    seed: int = 0,
    bits: int = 4,
    on_disk: str = "whole",
    dtype: str = "bfloat16",
    size: str = "1",
) -> dict[str, Any]:
    """What a fresh process computes, and which weights it quantized."""
    kept = {"FQCOMPILE_CACHE_DIR": str(directory), "FQCOMPILE_CACHE_SIZE": size}
    command = [sys.executable, "-c", SCRIPT, str(seed), str(bits), on_disk, dtype]
    environment = {**os.environ, **kept, "FQCOMPILE_CPU_ISA": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


SMALL = [[64, 256]]


@pytest.mark.slow
def test_a_second_process_quantizes_nothing_and_computes_the_same(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert len(first["made"]) == 5
    assert first["said"] == [f"0 of 4 weights were found quantized in {tmp_path / 'weights'}"]
    second = start(tmp_path)
    assert second["made"] == SMALL  # which no file is worth
    assert second["said"] == [f"4 of 4 weights were found quantized in {tmp_path / 'weights'}"]
    assert (second["y"], second["sites"]) == (first["y"], first["sites"])
    without = start(tmp_path, size="0")
    assert len(without["made"]) == 5
    assert without["said"] == []
    assert without["y"] == first["y"]


@pytest.mark.slow
def test_other_weights_options_and_damaged_files_are_not_taken_for_these(tmp_path: Path) -> None:
    first = start(tmp_path)
    for change in ({"seed": 1}, {"bits": 8}, {"dtype": "float32"}):
        changed = start(tmp_path, **change)  # type: ignore[arg-type]
        assert len(changed["made"]) == 5, change
        assert changed["y"] != first["y"]
    damaged = start(tmp_path, on_disk="damaged")
    assert len(damaged["made"]) == 5
    assert damaged["y"] == first["y"]
    assert start(tmp_path)["made"] == SMALL
