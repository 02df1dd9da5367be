"""Share of fqcompile's passes in the whole compilation: a 2-layer Llama of hidden size 1024.

    python -m bench.overhead [--dtype bf16] [--runs 3]

Each first call runs in a process of its own with empty caches, as a user meets it; the same model
with Inductor alone beside it. Prints the seconds of each pass, of the whole first call, and the
share of the seven passes before Inductor, quantisation included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import fqcompile

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@torch.no_grad()
def first_call(backend: str, dtype: str) -> dict[str, Any]:
    """Seconds of the first call of the compiled model, and of each pass."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(DTYPES[dtype]).eval()
    compiled = torch.compile(model, backend=backend)
    start = time.perf_counter()
    compiled(torch.arange(16)[None], use_cache=False)
    total = time.perf_counter() - start
    passes = {p.name: p.seconds for r in fqcompile.reports() for p in r.passes}
    return {"total": total, "passes": passes}


def in_new_process(backend: str, dtype: str) -> dict[str, Any]:
    """`first_call` where nothing is imported, compiled or cached yet."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "bench.overhead", "--backend", backend, "--dtype", dtype]
        empty = {"TORCHINDUCTOR_CACHE_DIR": cache, "FQCOMPILE_CACHE_SIZE": "0"}
        environment = {**os.environ, **empty}
        result = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--backend", help="measure this one here and print JSON")
    arguments = parser.parse_args()
    if arguments.backend:
        print(json.dumps(first_call(arguments.backend, arguments.dtype)))
        return
    rows, passes = [], {}
    for run in range(arguments.runs):
        inductor = in_new_process("inductor", arguments.dtype)["total"]
        measured = in_new_process("finequant", arguments.dtype)
        total, passes = measured["total"], measured["passes"]
        ours = sum(seconds for name, seconds in passes.items() if name != "lower")
        rows.append((run, inductor, total, ours, 100 * ours / total))
    print(tabulate(passes.items(), ("pass, last run", "seconds"), floatfmt=".3f"))
    headers = ("run", "inductor, s", "finequant, s", "passes, s", "share, %")
    print("\n" + tabulate(rows, headers, floatfmt=".2f"))
    print(f"median share {median(row[-1] for row in rows):.1f} %")


if __name__ == "__main__":
    main()
