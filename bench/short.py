"""The short suite of `make bench`: each benchmark on a small case, 10 minutes on 2 cores.

    python -m bench short [--out build/bench] [--steps kernels,models,...] [--time-budget 900]

Each step is a process of its own; one that fails does not stop the next, and the suite then ends
with status 1. Results (JSON) and output (STEP.log) lie in --out, which git ignores unless it
is another one. Small cases say whether a benchmark works and where it stands; what is quoted comes
from the whole ones.
"""

from collections.abc import Sequence
from pathlib import Path

from bench.core.steps import BENCH, ROOT, Step, run_suite

OUT = ROOT / "build" / "bench"


def _step(name: str, *flags: str, file: str | None = None, shown: int = 2000) -> Step:
    """`file`: what its results are called, as bench/sections.py has them."""

    def command(out: Path, seconds: float) -> Sequence[str]:
        return (*BENCH, name, *flags, "--json", str(out / f"{file or name}.json"))

    return Step(command, shown=shown)


def _accuracy(out: Path, seconds: float) -> Sequence[str]:
    return (*BENCH, "accuracy", "--quick", "--folder", str(out))


_LAYERS = ("--device", "cpu", "--shapes", "4096x4096", "1536x384", "--m", "1,16")
_MODEL = ("--device", "cpu", "--model", "small", "--batch", "1", "--context", "64", "--phases",
          "decode", "--ways", "inductor", "int4")  # fmt: skip
STEPS: dict[str, Step] = {
    "kernels": _step("kernels", *_LAYERS, file="kernels-cpu"),
    "models": _step("models", *_MODEL, file="models-cpu", shown=3000),
    "startup": _step("startup", "--size", "tiny", "--rounds", "1"),
    "launch_overhead": _step(
        "launch_overhead", "--calls", "50", "--repeat", "10", file="launch-overhead"
    ),
    "accuracy": Step(_accuracy, shown=6000),
}


def main(argv: Sequence[str] | None = None) -> None:
    run_suite(STEPS, argv, usual=list(STEPS), seconds=900.0, out=OUT)


if __name__ == "__main__":
    main()
