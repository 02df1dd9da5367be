"""What the compiler makes of the Triton kernels, for GPUs that need not be there.

    python -m bench static [--arch 90] [--quick] [--experts] [--check] [--json FILE]
    python -m bench static --predict | --stream-k [--arch 90] [--json FILE]

Compiles every format in every tile and reads the machine code. A row is a kernel: instructions of a
thread per weight; copies and loads of 16 bytes / fewer, stores to shared memory, conversions from
integers, products (R: the weight comes from registers) in an iteration of its loop; programs and
KB of weights under way on an SM. "issue" and "pipes" are the TB/s of codes and scales that the SMs
could take if nothing but their issue slots, or any of their pipes, counted; "memory" is what a copy
reaches on H200 or A100. A kernel is bound by the least. Nothing was run: no latency, no cache.

"grouped" and "gathered" are the kernels of experts, for E x rows x K of two models: what the closed
form picks to decode 1 to 16 tokens, and for 256 and 4096.

"plain" is `static.plain`; "ideal" is what memory allows. --check fails on `static.faults`.

--predict is `static.predict`, how long layers would take; --stream-k what `static.stream_k` gains.
"""

import argparse
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from bench.core.results import Results, Row, identity
from bench.core.section import show
from bench.static import expert_launches
from bench.static.faults import LEAST_IN_FLIGHT, faults, most_instructions
from bench.static.launches import GPUS, Case, chosen, matrix, plain_cases, selection
from bench.static.machine_code import MachineCode, toolchain_missing
from bench.static.predict import LAYERS, predicted
from bench.static.section import predictions, stream_k
from bench.static.stream_k import streamed

HEADERS = {
    "kernel": "kernel",
    "registers": "regs",
    "spills": "spills",
    "shared_bytes": "shared",
    "instructions_per_weight": "instr/\nweight",
    "copies": "copies\n16B/less",
    "loads": "loads\n16B/less",
    "shared_stores": "STS",
    "int_to_float": "I2F",
    "products": "products",
    "programs": "progs\n/SM",
    "kb_in_flight": "KB in\nflight",
    "issue": "issue\nTB/s",
    "pipes": "pipes\nTB/s",
    "memory": "memory\nTB/s",
}


def figures(case: Case, code: MachineCode) -> dict[str, Any]:
    """A row: the columns of HEADERS; counts are of an iteration, however often it is unrolled."""
    unroll = code.unroll if code.has_loop else 1
    rate = case.bytes_per_weight * case.gpu.num_sms / 1e12
    in_flight = code.bytes_in_flight(case.weights * case.spec.bits // 8) / 1024
    return {
        "kernel": case.name,
        "registers": code.registers,
        "spills": code.spills,
        "shared_bytes": code.shared_bytes,
        "instructions_per_weight": code.per_weight(case.weights, unroll),
        "copies": _both(code.wide_async_copies, code.narrow_async_copies, unroll),
        "loads": _both(code.wide_loads, code.narrow_loads, unroll),
        "shared_stores": code.shared_stores / unroll,
        "int_to_float": code.int_to_float / unroll,
        "products": _products(code, unroll),
        "programs": code.resident_programs(),
        "kb_in_flight": in_flight if code.has_loop else None,
        "issue": rate / code.issue_bound(case.weights, case.gpu, unroll),
        "pipes": rate / code.pipe_bound(case.weights, case.gpu, unroll),
        "memory": case.gpu.bandwidth / 1e12,
    }


def _both(wide: int, narrow: int, unroll: float) -> str:
    return f"{wide / unroll:g}/{narrow / unroll:g}"


def _products(code: MachineCode, unroll: float) -> str:
    registers = "R" if code.register_operand_products else ""
    name = "HGMMA" if code.count("HGMMA") else "HMMA"
    return f"{code.matrix_products / unroll:g} {name}{registers}" if code.matrix_products else ""


def ideal(arch: int, bits: int) -> dict[str, Any]:
    """The row of a kernel that memory alone would bound, without scales."""
    gpu = GPUS[arch]
    weights = gpu.bandwidth / (bits / 8)  # a second
    return {
        "kernel": f"ideal w{bits} {gpu.arch}: at most, or at least",
        "spills": 0,
        "instructions_per_weight": gpu.num_sms * gpu.clock_hz * 4 * 32 / weights,
        "copies": "x/0",
        "shared_stores": 0,
        "int_to_float": 0,
        "products": "x HGMMAR" if arch >= 90 else "x HMMA",
        "kb_in_flight": LEAST_IN_FLIGHT / 1024,
        "issue": gpu.bandwidth / 1e12,
        "pipes": gpu.bandwidth / 1e12,
        "memory": gpu.bandwidth / 1e12,
    }


def broken(case: Case, code: MachineCode) -> Iterator[str]:
    """What `--check` complains about."""
    yield from faults(case, code)
    target = most_instructions(case)
    if target is not None and code.per_weight(case.weights) > target:
        yield f"{code.per_weight(case.weights):.2f} instructions per weight, more than {target}"


def cases_of(arch: int, quick: bool, only_experts: bool) -> Iterator[Case]:
    """What is read; `quick`: what the tests read."""
    if not only_experts:
        yield from selection(arch) if quick else chain(matrix(arch), chosen(arch))
    yield from expert_launches.selection(arch) if quick else expert_launches.matrix(arch)


def measure(
    archs: Sequence[int], quick: bool, only_experts: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and what is broken."""
    rows, complaints = [], []
    for arch in archs:
        cases = list(cases_of(arch, quick, only_experts))
        compared = [] if only_experts else list(plain_cases(arch))
        for case in tqdm([*cases, *compared], f"sm_{arch}", disable=None, leave=False):
            code = case.read()
            rows.append(figures(case, code))
            if case not in compared:
                complaints += [f"{case.name}: {text}" for text in broken(case, code)]
        rows += [ideal(arch, bits) for bits in (4, 8)]
    return rows, complaints


def _made(archs: Sequence[int], stream: bool) -> Iterator[Row]:
    """The rows of --predict, or of --stream-k."""
    if stream:
        for arch in archs:
            yield from streamed(arch)
        return
    layers = [layer for layer in LAYERS if layer.arch in archs]
    for layer in tqdm(layers, "layers", disable=None, leave=False):
        yield predicted(layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, choices=tuple(GPUS), help="one instead of all")
    parser.add_argument("--quick", action="store_true", help="only what the tests read")
    parser.add_argument("--experts", action="store_true", help="only the kernels of experts")
    parser.add_argument("--check", action="store_true", help="fail if a rule is broken")
    parser.add_argument("--predict", action="store_true", help="times of layers, none measured")
    parser.add_argument("--stream-k", action="store_true", help="what stream-K would gain")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if missing := toolchain_missing():
        raise SystemExit(f"no machine code to read: {missing}")
    archs = [arguments.arch] if arguments.arch else list(GPUS)
    about = identity(torch.device("cpu")) | {"triton": version("triton")}
    if arguments.predict or arguments.stream_k:
        results = Results(about, {"arch": archs}, arguments.json)
        results.add(*_made(archs, arguments.stream_k))
        show(results, stream_k if arguments.stream_k else predictions)
        return
    rows, complaints = measure(archs, arguments.quick, arguments.experts)
    table = [[row.get(name) for name in HEADERS] for row in rows]
    print(tabulate(table, list(HEADERS.values()), floatfmt=".4g", disable_numparse=[5, 6]))
    settings = {"arch": archs, "quick": arguments.quick, "experts": arguments.experts}
    Results(about, settings, arguments.json).add(*rows)
    if arguments.check and complaints:
        raise SystemExit("\n".join(["", *complaints]))


if __name__ == "__main__":
    main()
