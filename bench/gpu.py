"""A session on a GPU in one command: is it right, how fast is it; everything kept in one folder.

    python -m bench gpu --out DIRECTORY [--time-budget 570] [--steps tests,kernels]

Steps, each in a process of its own, with its output in DIRECTORY/STEP.log; one that fails or takes
too long does not stop the next, whose time is what is left of the budget:

    environment   GPU, driver, versions, kernels that would be selected
    tests         pytest -m gpu
    kernels       bench kernels --quick, also as kernels.json
    overhead      host time of one call

Asked for by name: experts and models, each a session of its own. A table of the steps comes last.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.core.steps import BENCH, Step, run_suite

# Reads the card's state and changes none of it.
_STATE = "nvidia-smi -q -d CLOCK,POWER,UTILIZATION,PERFORMANCE"


def _environment(out: Path, seconds: float) -> Sequence[str]:
    return ("sh", "-c", f"{_STATE}; {sys.executable} -m fqcompile doctor")


def _tests(out: Path, seconds: float) -> Sequence[str]:
    options = ("-m", "gpu", "-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    return (sys.executable, "-m", "pytest", *options)


def _measured(name: str, *flags: str) -> Callable[[Path, float], Sequence[str]]:
    """A benchmark that is stopped by its own budget, not by ours: it needs a while to start and to
    end."""

    def command(out: Path, seconds: float) -> Sequence[str]:
        kept = (
            "--json",
            str(out / f"{name}.json"),
            "--time-budget",
            f"{max(20, seconds - 45):.0f}",
        )
        return (*BENCH, name, "--device", "cuda", *flags, *kept)

    return command


def _overhead(out: Path, seconds: float) -> Sequence[str]:
    return (*BENCH, "launch_overhead", "--device", "cuda")


STEPS = {
    "environment": Step(_environment, share=0.2),
    "tests": Step(_tests, share=0.45),
    "kernels": Step(_measured("kernels", "--quick"), share=0.85, shown=6000),
    "overhead": Step(_overhead, shown=1500),
    "experts": Step(_measured("experts"), shown=6000),
    "models": Step(_measured("models"), shown=6000),
}
USUAL = ("environment", "tests", "kernels", "overhead")


def main(argv: Sequence[str] | None = None) -> None:
    run_suite(STEPS, argv, usual=USUAL, seconds=570.0)


if __name__ == "__main__":
    main()
