"""The first start of a model and the second: seconds until its first result, part by part.

    python -m bench startup [--size llama|tiny] [--rounds 3] [--threads 2] [--json FILE]

Each start is a process of its own: 2 layers and the head of a Llama (hidden size 4096, bf16), a
prompt of 16 tokens. "cold" has empty caches, "warm" those that the cold start has left; "warm, no
weights" the same with FQCOMPILE_CACHE_SIZE=0, which quantises again. The ways run in turn, and a
figure is the median of the rounds. The process is timed from its creation to the first result,
without the making of the model, which stands for its loading.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from bench.failures import failure
from bench.fresh_process import in_fresh_process
from bench.identity import identity
from bench.llama_layers import SIZES
from bench.results import Results, Row


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
# Of the first call; the rest of it is Dynamo's, its guards, and ours in between.
PARTS = ("digest", "quantise", "write", "read", "pack", "x86 build", "compile", "run")


def started(start: Start, caches: Path, arguments: argparse.Namespace) -> Row:
    """One start with its caches in `caches`."""
    where = {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "FQCOMPILE_CACHE_DIR": str(caches / "fqcompile"),
    }
    flags = ["--backend", start.backend, "--size", arguments.size]
    flags += ["--threads", str(arguments.threads)]
    return in_fresh_process("bench.one_start", flags, {**where, **start.environment})


def one_round(arguments: argparse.Namespace, results: Results, number: int) -> None:
    """Every start once; those of one backend share their caches."""
    with tempfile.TemporaryDirectory() as folder:
        for start in tqdm(STARTS, f"round {number}", disable=None):
            row: Row = {"backend": start.backend, "caches": start.caches, "round": number}
            try:
                row |= started(start, Path(folder) / start.backend, arguments)
            except Exception as error:
                row["failure"] = failure(error)
            results.add(row)


def medians(rows: Sequence[Row]) -> dict[str, Row]:
    """{"finequant, warm": {part: seconds}} over the rounds; starts that failed are not there."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "failure" not in row:
            found.setdefault(f"{row['backend']}, {row['caches']}", []).append(row["seconds"])
    return {
        name: {part: median(row[part] for row in starts) for part in starts[0]}
        for name, starts in found.items()
    }


def startup_table(rows: Sequence[Row]) -> str:
    """Seconds; "of cold" with the imports and without."""
    found = medians(rows)
    lines = []
    for name, row in found.items():
        cold = found.get(f"{name.partition(',')[0]}, cold", row)
        shares = [f"{row[key] / cold[key]:.2f}" for key in ("total", "first call")]
        seconds = [row[key] for key in ("total", "import", "first call", "dynamo", *PARTS)]
        lines.append([name, *(f"{s:.2f}" for s in seconds), *shares])
    headers = ["start", "total", "import", "first call", "dynamo", *PARTS]
    headers += ["total of cold", "call of cold"]
    return tabulate(lines, [h.replace(" ", "\n") for h in headers], disable_numparse=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench startup", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="llama")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    settings = {"size": arguments.size, "threads": arguments.threads, "rounds": arguments.rounds}
    results = Results(identity(torch.device("cpu")), settings, arguments.json)
    for number in range(arguments.rounds):
        one_round(arguments, results, number)
    print(", ".join(f"{key} {value}" for key, value in results.identity.items()))
    for row in results.rows:
        if "failure" in row:
            print(f"{row['backend']}, {row['caches']}: {row['failure']}")
    print(startup_table(results.rows))


if __name__ == "__main__":
    main()
