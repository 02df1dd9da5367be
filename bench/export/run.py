"""Speed and memory of exporting to compressed-tensors, of the checker, and of opening the result.

    python -m bench export [--size llama|tiny] [--layers 6] [--way NAME ...] [--json FILE]

A checkpoint in the shape of Llama 3 8B with 6 layers has 1.6 billion weights, 3.1 GB in bf16; it
and the same model quantised are made first. Each way is a process of its own. Then every exported
layer's codes and scales are compared with the quantised model's: a row whose layers differ fails.

    read, written    bytes of safetensors files
    peak             the most that was resident, mapped files included, beyond what imports took
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench.core.processes import in_fresh_process
from bench.core.results import Results, Row, failure
from bench.core.section import show
from bench.core.shapes import STARTED
from bench.export import section
from bench.export.ways import WAYS
from fqcompile.kernels.tuning.search import WrongResult

_SPACE = 4  # times the model in bf16: itself, quantised twice, exported twice
_BYTES_PER_LAYER = 440_000_000


def measured(way: str, folder: Path, flags: Sequence[str]) -> Row:
    """The way's row.

    Raises:
        WrongResult: an exported layer is not the quantised one.
    """
    own = [*flags, "--folder", str(folder), "--way", way]
    row = in_fresh_process("bench.export.ways", ["took", *own])
    if row["written"]:
        row |= in_fresh_process("bench.export.ways", ["compared", *own])
        if row["different"] or not row["equal"]:
            raise WrongResult(f"{row['different']} of {row['equal'] + row['different']} layers")
    return row


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench export", description=__doc__)
    parser.add_argument("--size", choices=STARTED, default="llama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--way", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to work, on a disk with room")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> Results:
    results = Results.of(arguments, torch.device("cpu"))
    flags = ["--size", arguments.size, "--layers", str(arguments.layers)]
    flags += ["--threads", str(arguments.threads)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        _check_space(folder, arguments)
        in_fresh_process("bench.export.ways", ["make", *flags, "--folder", name])
        for way in tqdm(arguments.way, "ways", disable=None):
            row: Row = {"way": way}
            try:
                row |= measured(way, folder, flags)
            except Exception as error:
                row["failure"] = failure(error)
            results.add(row)
    return results


def _check_space(folder: Path, arguments: argparse.Namespace) -> None:
    needed = _SPACE * arguments.layers * _BYTES_PER_LAYER
    free = shutil.disk_usage(folder).free
    if arguments.size == "llama" and free < needed:
        raise SystemExit(f"{folder} has {free / 1e9:.0f} GB free; {needed / 1e9:.0f} are needed")


def main(argv: Sequence[str] | None = None) -> None:
    results = run(parse(argv))
    show(results, section.export)


if __name__ == "__main__":
    main()
