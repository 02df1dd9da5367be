"""Sentences through a small encoder with real weights in fp32, on a CPU, against Inductor.

    python -m bench encoder [--sentences 16] [--threads 2] [--json FILE]

MiniLM of 6 layers, all tokens of all sentences at once: here products are the limit, not memory.
Eager, Inductor and ours with int8 and int4 run in turn: 25 calls, the median, 20th and 80th
percentile. Before a way is timed its embeddings are compared with those of the model, under the
dequantised weights where it has others, eager.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from bench.core.identity import identity
from bench.core.interleaved import Replay, timings
from bench.core.results import Results, Row
from bench.models.rows import clocked, relative_error
from fqcompile.commands.demo_embedding import Embedder, Sentences, load_embedder
from fqcompile.fake_quantize import fake_quantize_
from fqcompile.kernels.tuning.search import WrongResult
from fqcompile.report import clear_reports, reports

PLAIN = "inductor"
WAYS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    PLAIN: {"backend": "inductor"},
    "int8": {"backend": "finequant", "options": {"bits": 8}},
    "int4": {"backend": "finequant", "options": {"bits": 4}},
}
# Sums of at most 1536 products in another order, six layers of them.
_ALLOWED = 1e-4
CPU = torch.device("cpu")


def prepared(
    model: Embedder, sentences: Sentences, compiled: dict[str, Any] | None
) -> tuple[Callable[[], Tensor], Row]:
    """The call, compiled and warm, and what is known of it.

    Raises:
        WrongResult: the embeddings are not those of the weights that it has.
    """
    clear_reports()
    own, oracle = copy.copy(model), copy.deepcopy(model)
    own._modules = dict(model._modules)
    if compiled is not None:
        own.transformer = torch.compile(model.transformer, dynamic=False, **compiled)
    y = own(sentences)
    found = reports()
    for report in found:
        fake_quantize_(oracle.transformer, report)
    error = relative_error(y, oracle(sentences))
    if not error <= _ALLOWED:
        raise WrongResult(f"relative error {error:.2g}, allowed {_ALLOWED}")
    sites = [site for report in found for site in report.plan.quantized]
    before, after = (sum(getattr(s, key) for s in sites) for key in ("bytes_before", "bytes_after"))
    sizes = {"bytes_before": before, "bytes_after": after} if sites else {}
    return partial(own, sentences), {"error": error, "allowed": _ALLOWED, **sizes}


def measured(model: Embedder, sentences: Sentences) -> list[Row]:
    """A row for each way."""
    torch.compiler.reset()
    ready = {way: prepared(model, sentences, options) for way, options in WAYS.items()}
    found = timings({way: _replay(run) for way, (run, _) in ready.items()})
    plain = found[PLAIN].microseconds
    return [
        {"way": way, "ms": t.microseconds / 1e3, "low": t.low / 1e3, "high": t.high / 1e3}
        | {"over_inductor": plain / t.microseconds}
        | ready[way][1]
        for way, t in found.items()
    ]


def _replay(run: Callable[[], Tensor]) -> Replay:
    def replay(warm_ups: int, replays: int) -> list[float]:
        for _ in range(warm_ups):
            run()
        return clocked(run, replays, CPU)

    return replay


def encoder_table(rows: Sequence[Row]) -> str:
    """A line for each way."""
    lines = [
        (
            row["way"],
            f"{row['ms']:.1f} [{row['low']:.1f}, {row['high']:.1f}]",
            f"{row['over_inductor']:.2f}x",
            f"{row['bytes_after'] / row['bytes_before']:.2f}" if "bytes_after" in row else "",
            f"{row['error']:.1e}",
        )
        for row in rows
    ]
    headers = ("way", "ms [p20, p80]", "over inductor", "of the matrices' bytes", "error")
    return tabulate(lines, headers, disable_numparse=True)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sentences", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model, sentences = load_embedder()
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    results = Results(identity(CPU), settings, arguments.json)
    results.add(*measured(model, sentences.first(arguments.sentences)))
    print(", ".join(f"{key} {value}" for key, value in results.identity.items()))
    print(encoder_table(results.rows))


if __name__ == "__main__":
    main()
