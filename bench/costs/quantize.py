"""How fast weights are quantised and dequantised, and with how much extra memory.

    python -m bench quantize [--n 4096] [--k 4096] [--dtype float32] [--repeat 5] [--threads 2]
        [--json FILE]

Prints one row per setting: millions of weights per second of choosing and quantising (best of the
repeats), the peak of extra memory as a multiple of the weight's own bytes, the delivered error;
then G weights/s of `dequantize`. Gaussian weights. Before anything is timed, the dequantised weight
is compared with the error that is told.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.core.results import Results, Row
from bench.core.section import show
from bench.costs import section
from fqcompile.config import SiteOptions
from fqcompile.kernels.tuning.search import WrongResult
from fqcompile.quant.choose import choose_and_quantize

SETTINGS: dict[str, SiteOptions] = {
    "int4 mse g128": SiteOptions(granularity=128),
    "int4 mse column": SiteOptions(granularity="column"),
    "int4 mse adaptive": SiteOptions(),
    "int4 mse range": SiteOptions(granularity="range"),
    "int4 absmax g128": SiteOptions(granularity=128, scale_method="absmax"),
    "int8 mse adaptive": SiteOptions(bits=8),
}
DEQUANTIZE_DTYPES = torch.bfloat16, torch.float32
_ALLOWED = 0.01  # of the error: the plan counts in fp32


def best_seconds(run: Callable[[], object], repeat: int) -> float:
    """The fastest of `repeat` runs: other load on the machine only ever adds time."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that were allocated at one moment of the run, beyond those before it.

    On one thread, the only one whose allocations the profiler sees; each more adds its pieces of
    the matrix, about 2 MiB.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    torch.set_num_threads(threads)
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def checked(w: torch.Tensor, w_hat: torch.Tensor, expected: float) -> None:
    """Hold the dequantised weight against the error that the plan tells.

    Raises:
        WrongResult: ‖w - ŵ‖ / ‖w‖, counted in fp64, is another.
    """
    error = float((w.double() - w_hat.double()).norm() / w.double().norm())
    rounding = torch.finfo(w_hat.dtype).eps / 4  # of ŵ to its type, in the mean square less
    if not abs(error - expected) <= _ALLOWED * expected + rounding:
        raise WrongResult(f"relative error {error:.6f}, the plan says {expected:.6f}")


def measure(w: torch.Tensor, options: SiteOptions, repeat: int) -> Row:
    """The row of one setting, after its name; the error is checked first."""
    scale_dtype = w.dtype if w.dtype.itemsize == 2 else torch.float16
    run = partial(choose_and_quantize, w, options, scale_dtype)
    plan, weight = run()
    checked(w, weight.dequantize(torch.float32), plan.relative_error)
    return {
        "group": plan.group_size,
        "weights_per_s": w.numel() / best_seconds(run, repeat),
        "peak": peak_bytes(run) / w.nbytes,
        "error": plan.relative_error,
    }


def measure_dequantize(w: torch.Tensor, bits: int, repeat: int) -> Row:
    """Weights/s to each of DEQUANTIZE_DTYPES, in groups of 64."""
    plan, weight = choose_and_quantize(w, SiteOptions(bits=bits, granularity=64), torch.bfloat16)
    row: Row = {"dequantize": f"int{bits} g64"}
    for dtype in DEQUANTIZE_DTYPES:
        run = partial(weight.dequantize, dtype)
        checked(w, run(), plan.relative_error)
        row[str(dtype).removeprefix("torch.")] = w.numel() / best_seconds(run, 2 * repeat)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print what there is to say."""
    parser = argparse.ArgumentParser(description="speed and memory of quantisation")
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    w = torch.randn(args.n, args.k, generator=torch.Generator().manual_seed(0))
    w = w.to(getattr(torch, args.dtype))
    results = Results.of(args, torch.device("cpu"))
    for name, options in SETTINGS.items():
        results.add({"setting": name, **measure(w, options, args.repeat)})
    for bits in (4, 8):
        results.add(measure_dequantize(w, bits, args.repeat))
    show(results, section.quantize)


if __name__ == "__main__":
    main()
