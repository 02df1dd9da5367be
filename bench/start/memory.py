"""Memory of a model from loading to its first result: peak and resident, way by way.

    python -m bench memory [--size llama|tiny] [--layers 2] [--way NAME ...] [--json FILE]

A Llama of hidden size 4096 with random bf16 weights, 1.4 GB with 2 layers and its head, and a
prompt of 16 tokens. Each way is a process of its own, in which the model is made first, as a
checkpoint would be loaded; "load" has no such model, it reads a directory that another process has
saved. What is added by importing is taken off. Inductor's caches are filled by a first process that
is not measured, for what its compilation takes depends on the machine; weights are quantised anew.

    loaded     bytes resident when the model is there
    peak       the most that was resident from then on to the first result; of "load" from its start
    after      resident when garbage is gone; "own" is that without pages that are a file's
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench.core.measure import same_logits
from bench.core.processes import in_fresh_process
from bench.core.results import Results, Row, failure
from bench.core.section import show
from bench.core.shapes import STARTED
from bench.start.memory_ways import SAVE, SAVED, WAYS
from bench.start.section import memory as section


def measured(way: str, arguments: argparse.Namespace, folder: Path) -> Row:
    """The way's row, from its second process; both write their caches below `folder`."""
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "FQCOMPILE_CACHE_SIZE": "0",
    }
    flags = ["--size", arguments.size, "--threads", str(arguments.threads)]
    flags += ["--layers", str(arguments.layers), "--saved", str(folder / "saved")]
    ways = [SAVE, way, way] if way in SAVED else [way, way]
    rows = [
        in_fresh_process("bench.start.memory_ways", [*flags, name], environment) for name in ways
    ]
    return rows[-1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--size", choices=STARTED, default="llama")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> Results:
    results = Results.of(arguments, torch.device("cpu"))
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for way in tqdm(arguments.way, "ways", disable=None):
            row: Row = {"way": way}
            try:
                row |= measured(way, arguments, Path(folder))
                found.append(same_logits(row, found, arguments.layers))
            except Exception as error:
                row = {"way": way, "failure": failure(error)}
            results.add({key: value for key, value in row.items() if key != "logits"})
    return results


def main(argv: Sequence[str] | None = None) -> None:
    results = run(parse(argv))
    show(results, section)


if __name__ == "__main__":
    main()
