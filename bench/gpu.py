"""Fifteen minutes of a GPU in two commands: is it right, how fast is it, what is the fastest.

    python -m bench gpu --out DIRECTORY --part 1 [--budget 420] [--steps tests,kernels]
    python -m bench gpu --out DIRECTORY --part 2 [--budget 420]
    python -m bench gpu --out DIRECTORY --part 1 --dry     on a CPU: does every command work?
    python -m bench gpu --ahead DIRECTORY                  on a CPU: builds kernels of part 1
    python -m bench gpu --replay DIRECTORY ...             their files become results, and tables

Needs a checkout on PYTHONPATH and no network. Steps come in the order of their worth, each in a
process of its own; one that fails or takes too long does not stop the next, whose time is what is
left. A kernel that loses the GPU ends its process; the benchmark goes on behind it in another. What
was built ahead is found where TRITON_CACHE_DIR is that folder, and Python's version, the files of
Triton and those of our kernels are the same. Every test and every row is on disk as soon as it is
there, in eight files at most. A machine whose time is lent counts its start and copies too: give
the second command as --budget what is left, less half a minute.

1   environment   clocks, driver, versions, kernels that would be selected
    tests         what the kernels compute, against fp64, several at a time: tests.jsonl
    kernels       4 bits, five layers, 1 to 256 rows, static and dynamic, against cuBLAS, tinygemm
    int8          8 bits, the same layers
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
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.core.shapes import parse_shapes
from bench.core.steps import BENCH, Step, planned, run_suite, writable_folder
from bench.kernels import run as kernels
from bench.kernels.contenders import Ours, Problem
from bench.launch_overhead.stub_driver import as_on_an_h200
from bench.replay import replay
from fqcompile.commands.tune import specs_of_shape
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import H200
from fqcompile.tensor.format import NORMAL, QTYPES

# Reads the card's state and changes none of it.
_STATE = "nvidia-smi -q -d CLOCK,POWER,UTILIZATION,PERFORMANCE"
_LOG_OF_TESTS, _WORKER = "BENCH_TESTS", "PYTEST_XDIST_WORKER"
_LONGEST_REASON = 600
_BUDGET = 420.0
_TRIES = 4  # of tuning
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


def pytest_configure() -> None:
    """Results of an earlier run are no longer there."""
    path = os.environ.get(_LOG_OF_TESTS)
    if path is not None and _WORKER not in os.environ:
        Path(path).unlink(missing_ok=True)


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


def pytest_runtest_logfinish() -> None:
    """Ends a worker whose GPU a test has lost, so that another takes its place: all tests after
    that one would fail, and so fast that they are taken from other workers."""
    if _WORKER in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


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
    """Its table is kept by its cache, also where it is stopped or loses the GPU, and goes on."""
    report, cache = out / "tuning.json", out / "cache"
    rows = ",".join(map(str, _TUNED_ROWS))
    tune = f"{sys.executable} -m fqcompile tune {' '.join(_TUNED)} --m {rows}"
    again = " || ".join([f"{tune} --report {report}"] * _TRIES)
    stopped = f"timeout -k 2 {max(10, seconds - 5):.0f} sh -c '{again}'"
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
    *_GPU, "--shapes", *_SHAPES, "--m", "1,16,24,64,256", "--bits", "8", "--group", "column",
    "--baselines", "cuBLAS",
)  # fmt: skip
_TUNED, _TUNED_ROWS = (_SHAPES[0], _SHAPES[4]), (1, 16, 64)
_PEERS = (
    *_GPU, "--shapes", _SHAPES[0], "--m", "1,16,64", "--baselines", "cuBLAS", "torchao", "gemlite",
)  # fmt: skip
_LLAMA = (*_GPU, "--model", "llama-3-8b", "--layers", "4", "--batch", "1", "--phases", "decode")
_QWEN = (*_GPU, "--models", "qwen3-30b-a3b", "--tokens", "1,4,16,64")
# Expected seconds: 12 to start a process; 1.2 to build a kernel, of tests 16 at a time; 0.3 to time
# one; 3 for a layer's weights; for four layers of Llama 3 8B 20, and 25 for Inductor to compile.
PARTS: dict[int, dict[str, Step]] = {
    1: {
        "environment": Step(_environment, share=0.1, expected=15),
        "tests": Step(_tests("-m", "gpu", *_TESTS), share=0.35, expected=110),
        "kernels": Step(
            _measured("kernels", *_LAYERS, file="kernels"), share=0.5, expected=110, shown=6000
        ),
        "int8": Step(
            _measured("kernels", *_INT8, file="kernels-int8"), share=0.45, expected=75, shown=3000
        ),
        "tune": Step(_tune, expected=100, shown=3000),
    },
    2: {
        "models": Step(
            _measured("models", *_LLAMA, "--ways", "inductor", "int4", "int4 head", file="models"),
            share=0.45,
            expected=150,
            shown=3000,
        ),
        "plain": Step(
            _plainly(_measured("models", *_LLAMA, "--ways", "int4", file="models-plain")),
            share=0.35,
            expected=65,
            shown=1500,
        ),
        "experts": Step(
            _measured("experts", *_QWEN, file="experts"), share=0.45, expected=75, shown=3000
        ),
        "peers": Step(
            _measured("kernels", *_PEERS, file="kernels-peers"), share=0.7, expected=60, shown=3000
        ),
        "overhead": Step(_overhead(*_GPU), expected=20, shown=1500),
    },
}
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


def build_ahead(folder: Path, layers: Sequence[Sequence[str]], tuned: Sequence[str]) -> int:
    """Builds what `kernels` of these arguments and `tune` of these shapes launch; how many did."""
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    cpu = torch.device("cpu")
    with as_on_an_h200() as stub:
        before = stub.launches
        for arguments in map(kernels.parse, layers):
            for shape in parse_shapes(arguments.shapes):
                cases = kernels.specs(shape, arguments, H200, "cuda")
                problem = Problem(replace(cases[0], m=max(arguments.m)), cpu)
                ours = Ours(problem)
                for spec in cases:
                    for way in ours.contenders(spec, "off"):
                        way.run(problem.x(spec.m), way.weights[0])
        for text in tuned:
            found = specs_of_shape(
                text, QTYPES[4, NORMAL], None, torch.bfloat16, False, None, "cuda", H200
            )
            for spec in found or ():
                problem = Problem(replace(spec, m=max(_TUNED_ROWS)), cpu)
                ours = Ours(problem)
                for m in _TUNED_ROWS:
                    for config in ours.template.candidates(spec, m, "fast"):
                        ours.template.run(problem.x(m), ours.weights[0], None, Epilogue(), config)
        return stub.launches - before


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], add_help=False)
    parser.add_argument("--part", type=int, choices=PARTS, default=1)
    parser.add_argument("--dry", action="store_true", help="small cases on a CPU")
    parser.add_argument("--ahead", type=writable_folder, metavar="DIRECTORY")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="DIRECTORY")
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.ahead or arguments.replay):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.ahead:
        layers, tuned = ((_SMALL,), ()) if arguments.dry else ((_LAYERS, _INT8), _TUNED)
        launched = build_ahead(arguments.ahead, layers, tuned)
        built = len([*arguments.ahead.rglob("*.cubin")])
        print(f"{built} kernels for {launched} launches lie in {arguments.ahead}")
        return
    if arguments.replay:
        replay(arguments.replay)
        return
    steps = (DRY if arguments.dry else PARTS)[arguments.part]
    if arguments.dry:
        table = planned(PARTS[arguments.part], _BUDGET)
        print(tabulate(table, ("on a GPU", "seconds expected", "at most"), floatfmt=".0f"))
    run_suite(steps, rest, usual=list(steps), seconds=_BUDGET, log="log.txt")


if __name__ == "__main__":
    main()
