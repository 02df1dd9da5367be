"""How fast weights are quantised and dequantised, and with how much extra memory.

    python -m bench.quantize [--n 4096] [--k 4096] [--dtype float32] [--repeat 5] [--threads 2]

Prints one row per setting: millions of weights per second of choosing and quantising (best of the
repeats), the peak of extra memory as a multiple of the weight's own bytes, the delivered error;
then G weights/s of `dequantize`. Gaussian weights.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from fqcompile.config import SiteOptions
from fqcompile.quant.choose import choose_and_quantize
from fqcompile.quant.quantized_weight import QuantizedWeight

SETTINGS: dict[str, SiteOptions] = {
    "int4 mse g128": SiteOptions(granularity=128),
    "int4 mse column": SiteOptions(granularity="column"),
    "int4 mse adaptive": SiteOptions(),
    "int4 mse range": SiteOptions(granularity="range"),
    "int4 absmax g128": SiteOptions(granularity=128, scale_method="absmax"),
    "int8 mse adaptive": SiteOptions(bits=8),
}
DEQUANTIZE_DTYPES = torch.bfloat16, torch.float32


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


def measure(w: torch.Tensor, options: SiteOptions, repeat: int) -> list[object]:
    """The row of one setting, after its name."""
    scale_dtype = w.dtype if w.dtype.itemsize == 2 else torch.float16
    run = partial(choose_and_quantize, w, options, scale_dtype)
    plan, _ = run()
    speed = w.numel() / best_seconds(run, repeat) / 1e6
    return [plan.group_size, speed, peak_bytes(run) / w.nbytes, plan.relative_error]


def measure_dequantize(weights: dict[str, QuantizedWeight], repeat: int) -> list[list[object]]:
    """Rows of name and G weights/s to each of DEQUANTIZE_DTYPES."""
    rows = []
    for name, weight in weights.items():
        count = weight.shape[0] * weight.shape[1]
        runs = [partial(weight.dequantize, dtype) for dtype in DEQUANTIZE_DTYPES]
        seconds = [best_seconds(run, repeat) for run in runs]
        rows.append([name, *(count / s / 1e9 for s in seconds)])
    return rows


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description="speed and memory of quantisation")
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    w = torch.randn(args.n, args.k, generator=torch.Generator().manual_seed(0))
    w = w.to(getattr(torch, args.dtype))
    print(f"{args.n} x {args.k} {args.dtype}, {args.threads} threads, torch {torch.__version__}")
    rows = [[name, *measure(w, options, args.repeat)] for name, options in SETTINGS.items()]
    columns = ["setting", "group", "M weights/s", "peak / w", "error"]
    print(tabulate(rows, columns, floatfmt=("", "", ".0f", ".2f", ".5f")))
    weights = {
        f"int{bits} g64": choose_and_quantize(w, options, torch.bfloat16)[1]
        for bits, options in ((b, SiteOptions(bits=b, granularity=64)) for b in (4, 8))
    }
    names = [f"to {str(dtype).removeprefix('torch.')} G/s" for dtype in DEQUANTIZE_DTYPES]
    print()
    rows = measure_dequantize(weights, 2 * args.repeat)
    print(tabulate(rows, ["dequantize", *names], floatfmt=".2f"))


if __name__ == "__main__":
    main()
