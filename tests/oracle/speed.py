"""Times of two checkouts, taken in turn: for changes that must cost nothing.

    git worktree add --detach ../before 1035faf
    python -m tests.oracle.speed ../before . --rounds 5      # a quiet machine; half a minute each

Each round runs every checkout in a process of its own, the first one first in every other round.
Rows are medians over the rounds, with the least and the most, of one thread's work: calls are the
median of many within a process; `first call` and `quantize_` are taken once, without kept results.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.backend import finequant

Times = dict[str, float]


class _Experts(nn.Module):
    """Two of eight matrices are read, by gathering."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(8, 256, 256, dtype=torch.bfloat16), False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(self.up[ids], x.unsqueeze(-1)).squeeze(-1)


def _layers(width: int, count: int) -> nn.Sequential:
    pairs = [layer for _ in range(count) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*pairs).to(torch.bfloat16).requires_grad_(False)


def _median(call: Callable[[], object], rounds: int, calls: int) -> float:
    """Microseconds of one call."""
    for _ in range(20):
        call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(found)


def _compiled(times: Times) -> None:
    for width, count, inner, calls in (
        (128, 2, "inductor", 100),
        (128, 64, "eager", 5),
        (1024, 4, "inductor", 20),
    ):
        model, x = _layers(width, count), torch.randn(1, width, dtype=torch.bfloat16)
        options = {"min_elements": 0, "inner_backend": inner}
        compiled = torch.compile(model, backend=finequant, options=options, dynamic=False)
        start = time.perf_counter()
        compiled(x)
        title = f"{count} layers of {width}, {inner}"
        times[f"first call, {title}"] = (time.perf_counter() - start) * 1e6
        times[f"call, {title}"] = _median(lambda f=compiled, x=x: f(x), 40, calls)  # type: ignore[misc]
        torch._dynamo.reset()


def _packed(times: Times) -> None:
    for width in (128, 1024):
        layer = nn.Linear(width, width).to(torch.bfloat16).requires_grad_(False)
        fqcompile.quantize_(layer, min_elements=0)
        for shape in ((1, width), (2, 4, width)):
            x = torch.randn(shape, dtype=torch.bfloat16)
            name = f"eager packed linear of {width}, x {shape}"
            times[name] = _median(lambda f=layer, x=x: f(x), 40, 50)  # type: ignore[misc]
    experts = _Experts()
    fqcompile.quantize_(experts, min_elements=0)
    x, ids = torch.randn(2, 256, dtype=torch.bfloat16), torch.tensor([1, 5])
    times["eager packed experts, gathered"] = _median(lambda: experts(x, ids), 40, 50)
    model = _layers(2048, 4)
    start = time.perf_counter()
    fqcompile.quantize_(model)
    times["quantize_, 16.8 M weights"] = (time.perf_counter() - start) * 1e6


def measure() -> Times:
    """Microseconds by what is timed, in this process and with the package that it imports."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    fqcompile.quantize_(_layers(128, 1), min_elements=0)  # builds the kernel, and starts threads
    times: Times = {}
    _compiled(times)
    _packed(times)
    return times


def _in_checkout(root: Path, folder: str) -> Times:
    """`measure` with the package of that checkout, and nothing kept of quantized weights."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "FQCOMPILE_CACHE_SIZE": "0",
        "FQCOMPILE_CACHE_DIR": f"{folder}/{root.name}",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{root.name}-inductor",
    }
    command = [sys.executable, __file__, "--measure"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{root}: {done.stderr}")
    times: Times = json.loads(done.stdout.splitlines()[-1])
    return times


def compare(before: Path, after: Path, rounds: int) -> None:
    """Print a row for each time: both, and their ratio."""
    found: dict[Path, list[Times]] = {before: [], after: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for root in list(found)[:: 1 if number % 2 == 0 else -1]:
                found[root].append(_in_checkout(root, folder))
    for name in found[after][0]:
        columns, middles = [], []
        for rows in found.values():
            values = sorted(row[name] for row in rows)
            middles.append(statistics.median(values))
            columns.append(f"{middles[-1]:11.1f} [{values[0]:.1f}, {values[-1]:.1f}]")
        print(f"{name:40} {columns[0]:36} {columns[1]:36} {middles[1] / middles[0]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("before", type=Path, nargs="?", help="a checkout")
    parser.add_argument("after", type=Path, nargs="?", help="another one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help="time the package that is imported")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure()))
    elif given.before is None or given.after is None:
        parser.error("give two checkouts")
    else:
        print(f"us{'':38} {'before':36} {'after':36} after / before")
        compare(given.before.resolve(), given.after.resolve(), given.rounds)


if __name__ == "__main__":
    main()
