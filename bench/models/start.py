"""One start of one way of `bench models`, in the process that it is: prints its row as JSON."""

import argparse
import gc
import json
import time

import torch

from bench.core import processes
from bench.core.results import Row
from bench.core.shapes import DTYPES, MODELS, build, classes
from bench.models.phases import Decoding, Phase, Prefill
from bench.models.rows import WARM_CALLS, WAYS, first_logits, synchronize
from fqcompile.quantize_model import quantize_


def resident(device: torch.device) -> int:
    """Bytes that tensors have on a GPU, or that the process has in memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return processes.resident()


def peak(device: torch.device) -> int:
    """The most of it since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return processes.peak()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        processes.reset_peak()


def settle(device: torch.device) -> None:
    """Give back what is garbage; on a GPU the allocator does not count what it keeps for later."""
    gc.collect()
    if device.type != "cuda":
        processes.settle()


@torch.no_grad()
def started(arguments: argparse.Namespace) -> Row:
    """From a model in memory to its first result; nobody else needs its 16 bits, so they go."""
    device, way = torch.device(arguments.device), WAYS[arguments.way]
    classes(arguments.model)  # imports them
    settle(device)
    imports = resident(device)
    model = build(arguments.model, arguments.layers, DTYPES[arguments.dtype], device)
    phase = _phase(model, arguments)
    settle(device)
    loaded = resident(device)
    reset_peak(device)
    start = time.perf_counter()
    if way.change is not None:
        way.change(model)
    row: Row = {}
    if way.options is not None:  # in place, as users do who need the memory
        quantize_(model, **way.options)
        row["quantize_s"] = time.perf_counter() - start
    work = phase.step_of(model, way.compiler(arguments.inner))
    phase.rewind()
    logits = work().clone()
    synchronize(device)
    row["first_call_s"] = time.perf_counter() - start
    for _ in range(WARM_CALLS - 1):
        work()
    synchronize(device)
    most = peak(device)
    settle(device)
    held = {"loaded": loaded, "peak": most, "after": resident(device)}
    row |= {name: count - imports for name, count in held.items()}
    return row | {"logits": first_logits(logits)}


def _phase(model: torch.nn.Module, arguments: argparse.Namespace) -> Phase:
    if arguments.phase == "prefill":
        return Prefill(model, arguments.tokens)
    return Decoding(model, arguments.batch, arguments.tokens, arguments.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--phase", choices=("prefill", "decode"), required=True)
    for name in ("layers", "batch", "tokens", "steps", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--inner", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(started(arguments)))


if __name__ == "__main__":
    main()
