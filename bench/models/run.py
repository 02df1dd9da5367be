"""Whole decoders: a step of decoding, a prefill and generate(), against 16 bits and llama.cpp.

    python -m bench models --device cuda [--model llama-3-8b opt-175b] [--layers N]
        [--batch 1,16,64] [--context 64,1024] [--prompt 1024] [--phases prefill decode generate]
        [--ways inductor int4 ...] [--dtype bf16|fp16] [--json FILE] [--time-budget SECONDS]
    python -m bench models --device cpu --model llama-3-8b --layers 2 --batch 1 --context 64 \
        --threads 1,2
    python -m bench models --device cpu --tiny     # whether it works, in 3 minutes

Weights are random, but for Gemma's.

All are compiled with mode="reduce-overhead", so run as CUDA graphs: the ways of `models.rows`. A
step of decoding has a static cache filled with --context tokens; what is timed is that step alone,
compiled on its own, in turn with the others: 25 steps, the median, 20th and 80th percentile. Before
that a way's logits are compared with those of its weights, dequantized, in the eager model. "of
ideal" is the least time that reading its own weights and the context, or the products, allow
(`models.phases`) over the time measured. generate() reads a prompt and makes --new tokens.

A model with fewer layers than it has is measured with half as many too; what is said of all its
layers is extrapolated from the two on a straight line, and marked so.
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from bench.core.measure import LEASE, MANY_COMPILATIONS, REPLAYS, WARM_UPS
from bench.core.results import Budget, Results, Row, duration, failure, missing
from bench.core.section import show as show_section
from bench.core.shapes import DTYPES, LARGE, MODELS, build, parameter_bytes
from bench.models import llama_cpp, section
from bench.models.phases import Decoding, Generation, Phase, Prefill, rates_of
from bench.models.rows import WAYS, Way, measured_rows, runs_on
from fqcompile.commands import counts as row_counts
from fqcompile.kernels.spec import gpu_of
from fqcompile.kernels.tuning.measure import DeviceLost

_STEPS = WARM_UPS + REPLAYS + 1
PHASES = ("prefill", "decode", "generate")
TINY = {"model": ["tiny", "tiny-opt"], "batch": [1, 2], "context": [32], "prompt": [16]}


def phases(model: torch.nn.Module, arguments: argparse.Namespace) -> Iterator[tuple[Row, Phase]]:
    """Each phase at each size; made one after another, for caches are large."""
    steps = product(arguments.batch, arguments.context) if "decode" in arguments.phases else ()
    for batch, context in steps:
        about = {"phase": "decode", "batch": batch, "tokens": context}
        yield about, Decoding(model, batch, context, _STEPS)
    for prompt in arguments.prompt if "prefill" in arguments.phases else ():
        yield {"phase": "prefill", "batch": 1, "tokens": prompt}, Prefill(model, prompt)
    for prompt in arguments.prompt if "generate" in arguments.phases else ():
        about = {"phase": "generate", "batch": 1, "tokens": prompt, "new": arguments.new}
        yield about, Generation(model, prompt, arguments.new)


@dataclass
class Runner:
    """Measures model after model into `results`, as long as there is time."""

    arguments: argparse.Namespace
    device: torch.device
    ways: Sequence[Way]
    results: Results
    budget: Budget

    def run(self) -> None:
        try:
            for name in tqdm(self.arguments.model, "models", disable=None):
                layers = min(self.arguments.layers or MODELS[name].timed, MODELS[name].layers)
                for count in self._counts(name, layers):
                    self._attempt(name, count)
                self.results.add(
                    *section.extrapolated(self.results.rows, name, MODELS[name].layers)
                )
        except DeviceLost as lost:
            self.results.leave_out(f"all after {name}: {lost}")

    def _counts(self, name: str, layers: int) -> list[int]:
        """The number asked for first: a short time budget ends before half as many."""
        half = max(1, layers // 2)
        return [layers] if half == layers or layers == MODELS[name].layers else [layers, half]

    def _attempt(self, name: str, layers: int) -> None:
        if not self.budget.allows_a_step():
            self.results.leave_out(f"{name}, {layers} layers")
            return
        _forget()  # of a model before this one
        try:
            self._measure(name, layers)
        except Exception as error:
            self.results.leave_out(f"{name}, {layers} layers: {failure(error)}")

    @torch.no_grad()
    def _measure(self, name: str, layers: int) -> None:
        model = build(name, layers, DTYPES[self.arguments.dtype], self.device)
        whole = {"model": name, "layers": layers, "of_layers": MODELS[name].layers}
        whole |= {"parameter_bytes": parameter_bytes(model)}
        for about, phase in phases(model, self.arguments):
            for threads in self.arguments.threads:
                work = whole | about | {"threads": threads}
                if not self.budget.allows_a_step():
                    what = f"{name}, {layers} layers, {section.work_text(work)}, batch"
                    self.results.leave_out(f"{what} {work['batch']}")
                    continue
                rows = self._rows(model, phase, layers, threads)
                self.results.add(*(work | row for row in rows))

    def _rows(
        self, model: torch.nn.Module, phase: Phase, layers: int, threads: int
    ) -> Sequence[Row]:
        torch.set_num_threads(threads)
        rates = rates_of(self.device, DTYPES[self.arguments.dtype])
        self.results.settings["rates"][str(threads)] = asdict(rates)
        return [*measured_rows(model, phase, self.ways, layers, self.arguments.inner, rates)]


def _forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(LARGE))
    parser.add_argument("--layers", type=int, help="time so many (default: what fits one GPU)")
    parser.add_argument("--batch", type=row_counts, default=[1, 16, 64], metavar="B,...")
    parser.add_argument("--context", type=row_counts, default=[1024], metavar="T,...",
                        help="tokens that decoding attends to")  # fmt: skip
    parser.add_argument("--prompt", type=row_counts, default=[1024], metavar="T,...",
                        help="tokens of the prefill, or that generate() begins with")  # fmt: skip
    parser.add_argument("--new", type=int, default=32, help="tokens that generate() makes")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES[:2]))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tiny", action="store_true", help="made-up models: does it work?")
    parser.add_argument("--threads", type=row_counts, default=[torch.get_num_threads()],
                        metavar="N,...", help="a CPU's")  # fmt: skip
    parser.add_argument("--inner", default="inductor", help="backend that compiles the graphs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and identity there")
    parser.add_argument("--time-budget", type=duration, default=LEASE, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        vars(arguments).update(TINY)
    if arguments.layers is not None and arguments.layers < 1:
        parser.error(f"--layers {arguments.layers}: at least 1")
    return arguments


def run(arguments: argparse.Namespace) -> Results:
    """Everything that the arguments ask for, or what the time budget allows of it."""
    device = torch.device(arguments.device)
    if device.type == "cuda":
        gpu_of(device)
    if arguments.inner == "inductor":
        torch.compile(lambda x: x + 1)(torch.zeros(3))  # starts Inductor's helpers, for nobody
    results = Results.of(arguments, device)
    results.settings["rates"] = {}
    ways = [way for way in map(WAYS.__getitem__, arguments.ways) if runs_on(way, device)]
    present = [way for way in ways if missing(way.package) is None]
    results.leave_out(*(f"{w.name}: {missing(w.package)}" for w in ways if w not in present))
    if any(way.own for way in present):
        results.settings[llama_cpp.PACKAGE] = llama_cpp.system_info()
    Runner(arguments, device, present, results, Budget(arguments.time_budget)).run()
    return results


def show(results: Results) -> None:
    """What to beware of, then the section: every row, what went wrong."""
    for row in results.rows:
        if row.get("cudagraph_skips") and torch.cuda.is_available():
            print(f"{row['model']} {row['phase']} {row['way']}: ran WITHOUT CUDA graphs")
    for threads, rates in results.settings["rates"].items():
        read, flops = f"{rates['bandwidth'] / 1e9:.4g}", f"{rates['flops'] / 1e12:.3g}"
        print(f"ideal, {threads} threads: {read} GB/s read, {flops} Tflop/s")
    if told := results.settings.get(llama_cpp.PACKAGE):
        print(f"llama.cpp: {told}")
    if any(row.get("of_ideal", 0) > 1 for row in results.rows):
        print("a way is FASTER than the ideal: these rates were measured beside other work")
    if torch.cuda.is_available():
        most = torch.cuda.max_memory_allocated() / 2**30
        print(f"most device memory of all ways and their checks together: {most:.1f} GiB")
    show_section(results, section.models)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = cache
        # Each batch and way is a compilation of its own of one function.
        with torch._dynamo.config.patch(MANY_COMPILATIONS):
            results = run(arguments)
        show(results)


if __name__ == "__main__":
    main()
