"""The first start of a model and the second: seconds until its first result, part by part.

    python -m bench startup [--size llama|tiny] [--rounds 3] [--threads 2] [--json FILE]

Each start is a process of its own: 2 layers and the head of a Llama (hidden size 4096, bf16), a
prompt of 16 tokens. "cold" has empty caches, "warm" those that the cold start has left; "warm, no
weights" the same with FQCOMPILE_CACHE_SIZE=0, which quantizes again. The ways run in turn, and a
figure is the median of the rounds. The process is timed from its creation to the first result,
without the making of the model, which stands for its loading. The logits of all are compared: ours
to rounding, with Inductor's to what 4 bits allow.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._inductor import compile_fx
from tqdm import tqdm

import fqcompile
from bench.core.measure import same_logits
from bench.core.processes import caches_in, in_fresh_process
from bench.core.results import Results, Row, failure
from bench.core.section import show
from bench.core.shapes import MODELS, STARTED, build, prompt
from bench.start.section import startup as section
from fqcompile.native import library as native_library
from fqcompile.passes import lower
from fqcompile.weights import disk_cache, fingerprint
from fqcompile.weights.disk_cache import DiskCache
from fqcompile.weights.store import WeightStore

Seconds = dict[str, float]
_LOGITS = 256  # of the last token, for comparison
# What is timed by its name: (owner, function) -> part. A part within another is taken off that one.
TIMED = {
    (fingerprint, "content_digest"): "digest",
    (disk_cache, "choose_and_quantize"): "quantize",
    (DiskCache, "_keep"): "write",
    (disk_cache, "read_entry"): "read",
    (WeightStore, "_pack"): "pack",
    (native_library, "loaded"): "x86 build",
    (lower, "compile_inner"): "compile",
    (compile_fx, "compile_fx"): "compile",  # as the backend "inductor" finds it
}


def since_creation() -> float:
    """Seconds that this process exists."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begun = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begun


def timed(
    function: Callable[..., Any], part: str, seconds: Seconds, active: list[str]
) -> Callable[..., Any]:
    """The function, whose time is added to its part; `active`: the parts that run now."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if part in active:  # it calls itself
            return function(*args, **kwargs)
        active.append(part)
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent = time.perf_counter() - start
            seconds[active.pop()] += spent
            if active:
                seconds[active[-1]] -= spent

    return run


@torch.no_grad()
def start(backend: str, size: str, imported: float) -> tuple[Seconds, list[float]]:
    """The parts of this start, and logits; "dynamo" is what remains of the first call."""
    seconds: Seconds = defaultdict(float)
    active: list[str] = []
    for (owner, name), part in TIMED.items():
        setattr(owner, name, timed(getattr(owner, name), part, seconds, active))
    model, ids = build(size, MODELS[size].timed), prompt(size)
    logits: list[float] = []
    compiled: Any = torch.compile(model, backend=backend, dynamic=False)

    def call() -> float:
        begin = time.perf_counter()
        output = compiled(ids, use_cache=False)
        spent = time.perf_counter() - begin
        logits[:] = output.logits[0, -1, :_LOGITS].tolist()
        return spent

    first = call()
    parts = dict(seconds)
    parts["run"] = call()
    known = {part: parts.get(part, 0.0) for part in (*TIMED.values(), "run")}
    whole = {"total": imported + first, "import": imported, "first call": first}
    return {**whole, "dynamo": first - sum(known.values()), **known}, logits


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
    flags = ["--here", start.backend, "--size", arguments.size]
    flags += ["--threads", str(arguments.threads)]
    environment = {**caches_in(caches), **start.environment}
    return in_fresh_process("bench.start.startup", flags, environment)


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
    parser.add_argument("--here", metavar="BACKEND", help="start with it here, print the row")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    imported = since_creation()
    arguments = parse(argv)
    if arguments.here:
        torch.set_num_threads(arguments.threads)
        seconds, logits = start(arguments.here, arguments.size, imported)
        found = {"seconds": seconds, "graphs": len(fqcompile.reports()), "logits": logits}
        print(json.dumps(found))
        return
    results = Results.of(arguments, torch.device("cpu"))
    for number in range(arguments.rounds):
        one_round(arguments, results, number)
    show(results, section)


if __name__ == "__main__":
    main()
