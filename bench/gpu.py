"""A session on a GPU in one command: is it right, how fast is it; everything kept in one folder.

    python -m bench gpu --out DIRECTORY [--time-budget 570] [--steps tests,kernels]

Steps, each in a process of its own, with its output in DIRECTORY/STEP.log; one that fails or takes
too long does not stop the next, whose time is what is left of the budget:

    environment   GPU, driver, versions, kernels that would be selected
    tests         pytest -m gpu
    kernels       bench kernels --quick, also as kernels.json
    overhead      host time of one call

Asked for by name: experts, models and tune, each a session of its own. A table of the steps comes
last.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.core.steps import BENCH, Step, conclude, names_of, session

# Reads the card's state and changes none of it.
_STATE = "nvidia-smi -q -d CLOCK,POWER,UTILIZATION,PERFORMANCE"


def _environment(out: Path, seconds: float) -> Sequence[str]:
    return ("sh", "-c", f"{_STATE}; {sys.executable} -m fqcompile doctor")


def _tests(out: Path, seconds: float) -> Sequence[str]:
    options = ("-m", "gpu", "-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    return (sys.executable, "-m", "pytest", *options)


def _json(out: Path, name: str, seconds: float) -> tuple[str, ...]:
    # A step needs a while to start and to end: it is stopped by its own budget, not by ours.
    return ("--json", str(out / f"{name}.json"), "--time-budget", f"{max(20, seconds - 45):.0f}")


def _kernels(out: Path, seconds: float) -> Sequence[str]:
    return (*BENCH, "kernels", "--device", "cuda", "--quick", *_json(out, "kernels", seconds))


def _experts(out: Path, seconds: float) -> Sequence[str]:
    return (*BENCH, "experts", "--device", "cuda", *_json(out, "experts", seconds))


def _models(out: Path, seconds: float) -> Sequence[str]:
    return (*BENCH, "models", "--device", "cuda", *_json(out, "models", seconds))


def _tune(out: Path, seconds: float) -> Sequence[str]:
    page = ("--html", str(out / "tune.html"))
    return (*BENCH, "tune", "--device", "cuda", *page, *_json(out, "tune", seconds))


def _overhead(out: Path, seconds: float) -> Sequence[str]:
    return (*BENCH, "launch_overhead", "--device", "cuda")


STEPS = {
    "environment": Step(_environment, share=0.2),
    "tests": Step(_tests, share=0.45),
    "kernels": Step(_kernels, share=0.85, shown=6000),
    "overhead": Step(_overhead, shown=1500),
    "experts": Step(_experts, shown=6000),
    "models": Step(_models, shown=6000),
    "tune": Step(_tune, shown=6000),
}
USUAL = ("environment", "tests", "kernels", "overhead")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY")
    parser.add_argument("--time-budget", type=float, default=570.0, metavar="SECONDS")
    parser.add_argument("--steps", type=names_of(STEPS), default=list(USUAL), metavar="NAME,...")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    steps = {name: STEPS[name] for name in arguments.steps}
    conclude(steps, session(steps, out, arguments.time_budget), out)


if __name__ == "__main__":
    main()
