"""Python's time in one call of our operator, against that of Triton's own launcher alone.

    python -m bench launch_overhead [--device cuda] [--calls 200] [--repeat 50] [--target 10]
        [--json FILE]

Outside of CUDA graphs each call of a kernel costs this much of the host, and a small model is bound
by it. All ways are timed in turn: per-call medians over the repeats, with the fastest repeat, which
other load on the machine disturbs least. Without a GPU the launch itself is a stub that does
nothing (`launch_overhead.stub_driver`), and the tensors lie in main memory: Triton's binding of
arguments, its choice of the compiled kernel and all of ours are real; what the driver takes is
missing.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton

from bench.core.results import Results, identity
from bench.core.section import show
from bench.launch_overhead import section
from bench.launch_overhead.stub_driver import as_on_an_h200
from fqcompile.kernels import op as operator
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.registry import KernelChoice
from fqcompile.kernels.spec import H200, GemmSpec, LaunchTable, TileConfig, gpu_of
from fqcompile.kernels.triton import launch, target
from fqcompile.kernels.triton.gemm import gemm_kernel
from fqcompile.kernels.triton.launch import dequant_gemm, forms_of
from fqcompile.kernels.triton.layout import BLOCK_K, blocks_per_group, dot_width
from fqcompile.kernels.triton.template import TRITON_GEMM
from fqcompile.kernels.tuning.measure import random_problem

# Small, so that a GPU keeps up with the host; as a model has it, so that the paths are its own.
M, N, K, GROUP = 1, 256, 256, 128
CONFIG = TileConfig(16, 64, 128, 1, 4, 3)
KWIDTH = 2
LAUNCHER, WRAPPER, TEMPLATE = "Triton's launcher", "dequant_gemm", "template"
OP, OP_INFERENCE = "operator, no_grad", "operator, inference_mode"


def ways(device: torch.device) -> dict[str, Callable[[], object]]:
    """Each does the same launch, from the innermost layer to the outermost."""
    gpu = gpu_of(device) if device.type == "cuda" else H200
    spec = GemmSpec(M, N, K, 4, GROUP, torch.bfloat16, torch.bfloat16, "cuda", gpu=gpu)
    plain, x = random_problem(spec, M, device)
    weight = TRITON_GEMM.layout.pack(plain)
    tensors = weight.tensors
    y = x.new_empty((M, N))
    grid = (triton.cdiv(M, CONFIG.BLOCK_M) * triton.cdiv(N, CONFIG.BLOCK_N), CONFIG.SPLIT_K)
    arguments = (
        x, *tensors, None, None, y, None, None, M, N, K, x.stride(0), 0,
        blocks_per_group(GROUP, K), dot_width(GROUP, K), spec.bits, spec.levels, KWIDTH,
        target.conversion(device, x.dtype), *forms_of("none"), False,
        K % BLOCK_K == 0, CONFIG.BLOCK_M, CONFIG.BLOCK_N, BLOCK_K, CONFIG.SPLIT_K,
    )  # fmt: skip
    options = {"num_warps": CONFIG.num_warps, "num_stages": CONFIG.num_stages}
    options |= launch.early_launch(device)
    kernel = str(KernelChoice(TRITON_GEMM, LaunchTable.of(CONFIG)))
    format_ = (spec.bits, spec.levels, GROUP, N, K, "none", False, kernel, None, None, False)

    def op() -> object:
        return operator.matmul_inference(x, *tensors, None, None, *format_)

    def op_in_inference_mode() -> object:
        with torch.inference_mode():
            return operator.matmul_inference(x, *tensors, None, None, *format_)

    def op_below_autograd() -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.matmul_inference(x, *tensors, None, None, *format_)

    def enter_inference_mode() -> None:
        with torch.inference_mode():
            pass

    return {
        "y alone: new_empty": lambda: x.new_empty((M, N)),
        LAUNCHER: lambda: gemm_kernel[grid](*arguments, **options),
        WRAPPER: lambda: dequant_gemm(x, weight, Epilogue(), CONFIG, KWIDTH),
        TEMPLATE: lambda: TRITON_GEMM.run(x, weight, None, Epilogue(), CONFIG),
        OP: op,
        OP_INFERENCE: op_in_inference_mode,
        "operator, below autograd": op_below_autograd,
        "inference_mode alone": enter_inference_mode,
    }


def host_microseconds(
    run: Mapping[str, Callable[[], object]], calls: int, repeat: int, synchronize: Callable[[], Any]
) -> dict[str, list[float]]:
    """Microseconds of one call, for each repeat; in turn, and the GPU's queue empty before each."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for round_number in range(repeat + 1):
        for name, call in run.items():
            synchronize()
            start = time.perf_counter_ns()
            for _ in range(calls):
                call()
            elapsed = time.perf_counter_ns() - start
            if round_number:
                times[name].append(elapsed / calls / 1e3)
    synchronize()
    return times


def measure(device: torch.device, calls: int, repeat: int) -> dict[str, list[float]]:
    """Of every way. On a machine without a GPU the launch does nothing."""
    if device.type == "cuda":
        with torch.no_grad():
            return host_microseconds(ways(device), calls, repeat, torch.cuda.synchronize)
    with as_on_an_h200():
        return host_microseconds(ways(device), calls, repeat, _nothing)


def _nothing() -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--target", type=float, default=10.0, metavar="MICROSECONDS")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    found = measure(device, arguments.calls, arguments.repeat)
    settings = {"stub": device.type == "cpu", "launcher": LAUNCHER, "operator": OP}
    results = Results(identity(device), settings, arguments.json)
    results.add(
        *({"way": n, "us": median(times), "best": min(times)} for n, times in found.items())
    )
    if device.type == "cpu":
        print("a STUB takes the place of the launch, and the machine may have other work")
    show(results, section.launch_overhead)
    over = min(found[OP]) - min(found[LAUNCHER])
    verdict = "within" if over <= arguments.target else "beyond"
    print(f"\nthe operator is {over:.1f} us over Triton's launcher: {verdict} the target of "
          f"{arguments.target:g}")  # fmt: skip


if __name__ == "__main__":
    main()
