"""Share of fqcompile's passes in the whole compilation: a 2-layer Llama of hidden size 1024.

    python -m bench overhead [--dtype bf16] [--runs 3] [--json FILE]

Each first call runs in a process of its own with empty caches, as a user meets it; the same model
with Inductor alone beside it; the logits are compared with the eager model's. Prints the seconds of
each pass, of the whole first call, and the share of the seven passes before Inductor, quantisation
included.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import fqcompile
from bench.core.measure import allowed_error, relative_error
from bench.core.processes import in_fresh_process
from bench.core.results import Results, Row, identity
from bench.core.section import show as show_section
from bench.costs import section
from fqcompile.kernels.tuning.search import WrongResult

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
def first_call(backend: str, dtype: str) -> Row:
    """Seconds of the first call of the compiled model, and of each pass.

    Raises:
        WrongResult: it does not compute what the dequantised weights do, eagerly.
    """
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(DTYPES[dtype]).eval()
    compiled = torch.compile(model, backend=backend)
    tokens = torch.arange(16)[None]
    start = time.perf_counter()
    logits = compiled(tokens, use_cache=False).logits
    total = time.perf_counter() - start
    passes = {p.name: p.seconds for r in fqcompile.reports() for p in r.passes}
    for report in fqcompile.reports():
        fqcompile.fake_quantize_(model, report)
    error = relative_error(logits, model(tokens, use_cache=False).logits)
    allowed = allowed_error(DTYPES[dtype], SHAPE["num_hidden_layers"])
    if not error <= allowed:
        raise WrongResult(f"relative error {error:.2g}, allowed {allowed:.2g}")
    return {"total": total, "passes": passes, "error": error, "allowed": allowed}


def in_new_process(backend: str, dtype: str) -> Row:
    """`first_call` where nothing is imported, compiled or cached yet."""
    with tempfile.TemporaryDirectory() as cache:
        empty = {"TORCHINDUCTOR_CACHE_DIR": cache, "FQCOMPILE_CACHE_SIZE": "0"}
        return in_fresh_process(
            "bench.costs.overhead", ["--backend", backend, "--dtype", dtype], empty
        )


def measured(run: int, dtype: str) -> Row:
    """Both backends once."""
    inductor, ours = in_new_process("inductor", dtype), in_new_process("finequant", dtype)
    spent = sum(seconds for name, seconds in ours["passes"].items() if name != "lower")
    row: Row = {"run": run, "inductor": inductor["total"], "finequant": ours["total"]}
    return row | {"ours": spent, "share": spent / ours["total"], "passes": ours["passes"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--backend", help="measure this one here and print JSON")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.backend:
        print(json.dumps(first_call(arguments.backend, arguments.dtype)))
        return
    settings = {"dtype": arguments.dtype, "runs": arguments.runs, **SHAPE}
    results = Results(identity(torch.device("cpu")), settings, arguments.json)
    for run in range(arguments.runs):
        results.add(measured(run, arguments.dtype))
    show(results)


def show(results: Results) -> None:
    """The passes of the last run, then all runs."""
    passes = results.rows[-1]["passes"].items()
    print(tabulate(passes, ("pass, last run", "seconds"), floatfmt=".3f"))
    show_section(results, section.overhead)


if __name__ == "__main__":
    main()
