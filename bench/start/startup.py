"""The first start of a model and the second: seconds until its first result, part by part.

    python -m bench startup [--size llama|tiny] [--rounds 3] [--threads 2] [--json FILE]

Each start is a process of its own: 2 layers and the head of a Llama (hidden size 4096, bf16), a
prompt of 16 tokens. "cold" has empty caches, "warm" those that the cold start has left; "warm, no
weights" the same with FQCOMPILE_CACHE_SIZE=0, which quantises again. The ways run in turn, and a
figure is the median of the rounds. The process is timed from its creation to the first result,
without the making of the model, which stands for its loading. The logits of all are compared: ours
to rounding, with Inductor's to what 4 bits allow.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from bench.core.measure import same_logits
from bench.core.processes import caches_in, in_fresh_process
from bench.core.results import Results, Row, failure
from bench.core.section import show
from bench.core.shapes import MODELS, STARTED
from bench.start.section import startup as section


class Start(NamedTuple):
    """One kind of start: the backend, what the caches hold, and what else the process is told."""

    backend: str
    caches: str
    environment: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.backend}, {self.caches}"


NO_WEIGHTS = {"FQCOMPILE_CACHE_SIZE": "0"}
STARTS = (
    Start("inductor", "cold", {}),
    Start("inductor", "warm", {}),
    Start("finequant", "cold", {}),
    Start("finequant", "warm", {}),
    Start("finequant", "warm, no weights", NO_WEIGHTS),
)


def started(start: Start, caches: Path, arguments: argparse.Namespace) -> Row:
    """One start with its caches in `caches`."""
    flags = ["--backend", start.backend, "--size", arguments.size]
    flags += ["--threads", str(arguments.threads)]
    return in_fresh_process(
        "bench.start.one_start", flags, {**caches_in(caches), **start.environment}
    )


def one_round(arguments: argparse.Namespace, results: Results, number: int) -> None:
    """Every start once; those of one backend share their caches. All must compute the same."""
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for start in tqdm(STARTS, f"round {number}", disable=None):
            row: Row = {"backend": start.backend, "caches": start.caches, "round": number}
            try:
                ours = start.backend != STARTS[0].backend
                row |= {"way": start.name, "ours": ours}
                row |= started(start, Path(folder) / start.backend, arguments)
                found.append(same_logits(row, found, MODELS[arguments.size].timed))
            except Exception as error:
                row = {key: row[key] for key in ("backend", "caches", "round")}
                row["failure"] = failure(error)
            results.add({key: value for key, value in row.items() if key != "logits"})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench startup", description=__doc__)
    parser.add_argument("--size", choices=STARTED, default="llama")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    results = Results.of(arguments, torch.device("cpu"))
    for number in range(arguments.rounds):
        one_round(arguments, results, number)
    show(results, section)


if __name__ == "__main__":
    main()
