"""One start of `bench startup`, in the process that it is: prints its seconds as JSON."""

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch._inductor import compile_fx

import fqcompile
from bench.core.shapes import MODELS, STARTED, build, prompt
from fqcompile.kernels.cpu import native_library
from fqcompile.passes import lower
from fqcompile.weights import disk_cache, fingerprint
from fqcompile.weights.disk_cache import DiskCache
from fqcompile.weights.packed import PackedSpec

Seconds = dict[str, float]
_LOGITS = 256  # of the last token, for comparison
# What is timed by its name: (owner, function) -> part. None calls one of another part.
TIMED = {
    (fingerprint, "content_digest"): "digest",
    (disk_cache, "choose_and_quantize"): "quantise",
    (DiskCache, "_keep"): "write",
    (disk_cache, "read_entry"): "read",
    (PackedSpec, "pack"): "pack",
    (native_library, "loaded"): "x86 build",
    (lower, "compile_inner"): "compile",
    (compile_fx, "compile_fx"): "compile",  # as the backend "inductor" finds it
}


def since_creation() -> float:
    """Seconds that this process exists."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begun = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begun


def timed(function: Callable[..., Any], part: str, seconds: Seconds) -> Callable[..., Any]:
    active: list[str] = []

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if active:  # it calls itself
            return function(*args, **kwargs)
        active.append(part)
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[active.pop()] += time.perf_counter() - start

    return run


@torch.no_grad()
def start(backend: str, size: str, imported: float) -> tuple[Seconds, list[float]]:
    """The parts of this start, and logits; "dynamo" is what remains of the first call."""
    seconds: Seconds = defaultdict(float)
    for (owner, name), part in TIMED.items():
        setattr(owner, name, timed(getattr(owner, name), part, seconds))
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


def main() -> None:
    imported = since_creation()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--size", choices=STARTED, default="llama")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds, logits = start(arguments.backend, arguments.size, imported)
    found = {"seconds": seconds, "graphs": len(fqcompile.reports()), "logits": logits}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
