"""How long a way of `bench models` takes to its first result, and how much memory.

Each start is a process of its own: "cold" with empty caches, "warm" with those that the cold one
has left. What it computes is compared with what the same way computed where it was timed.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from bench.core.measure import allowed_error, relative_error
from bench.core.processes import in_fresh_process
from bench.core.results import Row, failure
from bench.core.shapes import DTYPES
from fqcompile.kernels.tuning.search import WrongResult

CACHES = ("cold", "warm")


def start_rows(
    work: Row, ways: Mapping[str, Sequence[float]], steps: int, arguments: argparse.Namespace
) -> Iterator[Row]:
    """Both starts of each way.

    work: what is run: model, layers, phase, batch, tokens. ways: the logits of each, as checked.
    """
    for way, expected in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            for caches in CACHES:
                row: Row = {"way": way, "start": caches}
                try:
                    found = _started(work, way, steps, arguments, Path(folder))
                    row |= _checked(found, expected, DTYPES[arguments.dtype], work["layers"])
                except Exception as error:
                    row["failure"] = failure(error)
                yield work | row


def _started(work: Row, way: str, steps: int, arguments: argparse.Namespace, caches: Path) -> Row:
    where = {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "FQCOMPILE_CACHE_DIR": str(caches / "fqcompile"),
    }
    given = {name: work[name] for name in ("model", "layers", "phase", "batch", "tokens")}
    given |= {name: getattr(arguments, name) for name in ("dtype", "device", "inner", "threads")}
    given |= {"way": way, "steps": steps}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return in_fresh_process("bench.models.start", flags, where)


def _checked(row: Row, expected: Sequence[float], dtype: torch.dtype, layers: int) -> Row:
    """The row without its logits.

    Raises:
        WrongResult: they are not those that the way computed before.
    """
    logits = torch.tensor(row.pop("logits"), dtype=torch.float64)
    error = relative_error(logits, torch.tensor(expected, dtype=torch.float64))
    allowed = allowed_error(dtype, layers)
    if not error <= allowed:
        raise WrongResult(f"{error:.2g} from the way as it was timed, allowed {allowed:.2g}")
    return row | {"error": error, "allowed": allowed}
