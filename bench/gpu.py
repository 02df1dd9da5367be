"""Fifteen minutes of a GPU in two commands: is it right, how fast is it, what is the fastest.

    python -m bench gpu --out DIRECTORY --part 1 [--budget 420] [--steps tests,kernels]
    python -m bench gpu --out DIRECTORY --part 2 [--budget 420]
    python -m bench gpu --out DIRECTORY --part 1 --dry     on a CPU: does every command work?
    python -m bench gpu --replay DIRECTORY ...             their files become results, and tables

Needs a checkout on PYTHONPATH and no network. Steps come in the order of their worth, each in a
process of its own; one that fails or takes too long does not stop the next, whose time is what is
left. Every test and every row is on disk as soon as it is there, in eight files at most:

1   environment   clocks, driver, versions, kernels that would be selected
    tests         what the kernels compute, against fp64, several at a time: tests.jsonl
    kernels       4 bits, five layers, 1 to 256 rows, static and dynamic, against cuBLAS, tinygemm
    int8          8 bits, two of them
    tune          which configurations are the fastest: tuned.json, and all trials
2   models        four layers of Llama 3 8B that decode in CUDA graphs
    plain         the same with each kernel launched when the one before it is complete
    experts       a layer of Qwen3 30B
    peers         torchao and gemlite where they are installed
    overhead      host time of one call
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import readme
from bench.core.results import RESULTS, slug
from bench.core.steps import BENCH, ROOT, Step, run_suite
from bench.planner import run as planner

# Reads the card's state and changes none of it.
_STATE = "nvidia-smi -q -d CLOCK,POWER,UTILIZATION,PERFORMANCE"
_LOG_OF_TESTS, _WORKER = "BENCH_TESTS", "PYTEST_XDIST_WORKER"
_LONGEST_REASON = 600
_BUDGET = 420.0
_FAMILY = (
    "target gemm last_finishes layer_chains fragments dequantize experts expert_ops gemm_edges "
    "row_blocks launch_ops"
)
_TESTS = [
    *(f"tests/kernels/triton/test_{name}.py" for name in _FAMILY.split()),
    "tests/kernels/tuning",
    "tests/test_triton_backend.py",
]
_SHAPES = ("8192x8192", "28672x4096", "4096x14336", "6144x4096", "4096x4096")


def pytest_runtest_logreport(report: Any) -> None:
    """With `-p bench.gpu` every test's result is on disk at once: a killed run loses none."""
    path = os.environ.get(_LOG_OF_TESTS)
    if path is None or _WORKER in os.environ or (report.when != "call" and report.passed):
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        row["why"] = str(report.longrepr)[-_LONGEST_REASON:]
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _environment(out: Path, seconds: float) -> Sequence[str]:
    return ("sh", "-c", f"{_STATE}; {sys.executable} -m fqcompile doctor")


def _tests(*chosen: str) -> Callable[[Path, float], Sequence[str]]:
    def command(out: Path, seconds: float) -> Sequence[str]:
        several = ("-n", str(os.cpu_count()), "--dist", "worksteal") if find_spec("xdist") else ()
        options = ("-q", "--tb=line", "-p", "bench.gpu", "-p", "no:cacheprovider", *several)
        log = f"{_LOG_OF_TESTS}={out / 'tests.jsonl'}"
        # Tests that run in a worker of other tests are not in a worker of these.
        return ("env", "-u", _WORKER, log, sys.executable, "-m", "pytest", *options, *chosen)

    return command


def _measured(name: str, *flags: str, file: str) -> Callable[[Path, float], Sequence[str]]:
    """A benchmark that is stopped by its own budget, not by ours: it needs a while to start and to
    end."""

    def command(out: Path, seconds: float) -> Sequence[str]:
        own = f"{max(20, seconds - 15):.0f}"
        return (*BENCH, name, *flags, "--json", str(out / f"{file}.json"), "--time-budget", own)

    return command


def _plainly(command: Callable[[Path, float], Sequence[str]]) -> Callable[..., Sequence[str]]:
    """The same without programmatic dependent launch."""
    return lambda out, seconds: ("env", "FQCOMPILE_PDL=0", *command(out, seconds))


def _tune(out: Path, seconds: float) -> Sequence[str]:
    """Its table is kept by its cache, also where it is stopped."""
    report, cache = out / "tuning.json", out / "cache"
    tune = f"{sys.executable} -m fqcompile tune {_SHAPES[0]} {_SHAPES[4]} --m 1,16,64"
    stopped = f"timeout {max(10, seconds - 5):.0f} {tune} --report {report}"
    keep = f"mv {cache}/tuned/*.json {out}/tuned.json; rm -rf {cache}; exit $code"
    return ("sh", "-c", f"FQCOMPILE_CACHE_DIR={cache} {stopped}; code=$?; {keep}")


def _overhead(*flags: str) -> Callable[[Path, float], Sequence[str]]:
    def command(out: Path, seconds: float) -> Sequence[str]:
        return (*BENCH, "launch_overhead", *flags, "--json", str(out / "launch-overhead.json"))

    return command


_GPU = ("--device", "cuda")
_LAYERS = (
    *_GPU, "--shapes", *_SHAPES, "--m", "1,16,24,64,256", "--baselines", "cuBLAS", "tinygemm",
)  # fmt: skip
_INT8 = (
    *_GPU, "--shapes", _SHAPES[0], _SHAPES[4], "--m", "1,16", "--bits", "8", "--group", "column",
    "--baselines", "cuBLAS",
)  # fmt: skip
_PEERS = (
    *_GPU, "--shapes", _SHAPES[0], "--m", "1,16,64", "--baselines", "cuBLAS", "torchao", "gemlite",
)  # fmt: skip
_LLAMA = (*_GPU, "--model", "llama-3-8b", "--layers", "4", "--batch", "1", "--phases", "decode")
_QWEN = (*_GPU, "--models", "qwen3-30b-a3b", "--tokens", "1,4,16,64")
PARTS: dict[int, dict[str, Step]] = {
    1: {
        "environment": Step(_environment, share=0.1),
        "tests": Step(_tests("-m", "gpu", *_TESTS), share=0.35),
        "kernels": Step(_measured("kernels", *_LAYERS, file="kernels"), share=0.5, shown=6000),
        "int8": Step(_measured("kernels", *_INT8, file="kernels-int8"), share=0.45, shown=3000),
        "tune": Step(_tune, shown=3000),
    },
    2: {
        "models": Step(
            _measured("models", *_LLAMA, "--ways", "inductor", "int4", "int4 head", file="models"),
            share=0.45,
            shown=3000,
        ),
        "plain": Step(
            _plainly(_measured("models", *_LLAMA, "--ways", "int4", file="models-plain")),
            share=0.35,
            shown=1500,
        ),
        "experts": Step(_measured("experts", *_QWEN, file="experts"), share=0.45, shown=3000),
        "peers": Step(_measured("kernels", *_PEERS, file="kernels-peers"), share=0.7, shown=3000),
        "overhead": Step(_overhead(*_GPU), shown=1500),
    },
}  # fmt: skip
# The same commands on small cases of a CPU; experts and tuning have none.
_CPU = ("--device", "cpu")
_SMALL = (*_CPU, "--shapes", "384x384", "--m", "1", "--threads", "1", "--baselines")
_TINY = (*_CPU, "--model", "tiny", "--layers", "1", "--batch", "1", "--context", "16")
DRY: dict[int, dict[str, Step]] = {
    1: {
        "environment": PARTS[1]["environment"],
        "tests": Step(_tests("tests/kernels/triton/test_target.py")),
        "kernels": Step(_measured("kernels", *_SMALL, file="kernels-cpu")),
        "int8": Step(_measured("kernels", *_SMALL, "--bits", "8", file="kernels-cpu-int8")),
    },
    2: {
        "models": Step(
            _measured(
                "models", *_TINY, "--phases", "decode", "--ways", "int4", "--inner", "eager",
                file="models-cpu",
            )
        ),
        "overhead": Step(_overhead(*_CPU, "--calls", "5", "--repeat", "2")),
    },
}  # fmt: skip


def replay(folders: Sequence[Path], root: Path = RESULTS, page: Path = ROOT / "README.md") -> None:
    """Put each file of results below its device, and write and print what follows from them."""
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            print(f"{path} is left out: it is no whole JSON ({error})")
            continue
        if "identity" in content and "rows" in content:
            device = root / slug(content["identity"]["device"])
            device.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, device / path.name)
            print(f"{path} is {device / path.name} now")
    readme.main([], readme=page, root=root)
    planner.main(["--results", str(root)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], add_help=False)
    parser.add_argument("--part", type=int, choices=PARTS, default=1)
    parser.add_argument("--dry", action="store_true", help="small cases on a CPU")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="DIRECTORY")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.replay:
        replay(arguments.replay)
        return
    steps = (DRY if arguments.dry else PARTS)[arguments.part]
    run_suite(steps, rest, usual=list(steps), seconds=_BUDGET, log="log.txt")


if __name__ == "__main__":
    main()
