"""What is wrong with a kernel's machine code: rules that make it fast, whatever compiled it.

Budgets belong to one version of Triton, and are in the tests.
"""

from collections.abc import Iterator

from bench.static.launches import Case
from bench.static.machine_code import MachineCode
from fqcompile.kernels.triton.layout import BLOCK_K, dot_width
from fqcompile.tensor.format import NORMAL

FEW_ROWS = 16  # the tile for which memory, not arithmetic, is to be the limit
LEAST_IN_FLIGHT = 32 << 10  # bytes of an SM: 4.3 TB/s over 132 SMs for 1 µs
# Of a loop's instructions, in tiles of many rows. On twice the warps such a tile has no spills, and
# half as many instructions again.
MOST_SPILLED = 0.03
_NARROW_DOT = 32  # columns
_COPY = 16  # bytes of the widest copy


def faults(case: Case, code: MachineCode) -> list[str]:
    """Each with the number found and the one expected; empty if there is none."""
    return list(_faults(case, code))


def _faults(case: Case, code: MachineCode) -> Iterator[str]:
    few_rows = case.config is None or case.config.BLOCK_M <= FEW_ROWS
    in_loop = code.count("LDL", "STL")
    if in_loop > MOST_SPILLED * code.instructions or (few_rows and code.spills):
        yield f"{code.spills} spills, {in_loop} of {code.instructions} instructions of the loop"
    if case.config is None:
        return
    if not code.has_loop or not code.matrix_products:
        yield "no loop with products of the tensor cores"
        return
    yield from _in_every_tile(case, code)
    if few_rows:
        yield from _for_few_rows(case, code)


def _in_every_tile(case: Case, code: MachineCode) -> Iterator[str]:
    expected = wide_copies(case) * code.unroll
    if code.wide_async_copies < expected:
        yield f"{code.wide_async_copies} copies of {_COPY} bytes in the loop, not {expected:g}"
    # A round trip stores each weight in 2 bytes, by at most 16 an instruction.
    weights = case.weights * code.unroll / (32 * code.num_warps)
    if code.shared_stores > weights * 2 / _COPY / 2:
        yield f"{code.shared_stores} stores to shared memory for {weights:g} weights of a thread"
    if code.int_to_float:
        yield f"{code.int_to_float} conversions from integers"
    if code.arch >= 90 and code.register_operand_products < code.matrix_products:
        yield (
            f"{code.register_operand_products} of {code.matrix_products} products "
            "take the weight from registers (wgmma)"
        )


def _for_few_rows(case: Case, code: MachineCode) -> Iterator[str]:
    in_flight = code.bytes_in_flight(case.weights * case.spec.bits // 8)
    if in_flight < LEAST_IN_FLIGHT:
        yield f"{in_flight} bytes of weights in flight, not {LEAST_IN_FLIGHT}"
    width = dot_width(case.spec.group_size, case.spec.k)
    if case.spec.levels == NORMAL and width <= _NARROW_DOT:
        return  # on Hopper 3.9 instructions per weight or 5: up to 15 % longer than memory takes
    memory = case.bytes_per_weight * case.gpu.num_sms / case.gpu.bandwidth
    issue = code.issue_bound(case.weights, case.gpu)
    if issue >= memory:
        yield f"an SM issues for {issue * 1e12:.0f} ps a weight, memory takes {memory * 1e12:.0f}"


def wide_copies(case: Case) -> int:
    """Of a thread in an iteration: weights, and x if a dot has 16 bytes of it for each thread."""
    assert case.config is not None
    width = case.config.num_warps * 32 * _COPY
    copies = case.weights * case.spec.bits // 8 // width
    for_dot = case.config.BLOCK_M * dot_width(case.spec.group_size, case.spec.k) * 2
    if for_dot >= width:
        copies += case.config.BLOCK_M * BLOCK_K * 2 // width
    return copies


def most_instructions(case: Case) -> float | None:
    """The target per weight in the tile for few rows; None where none is set."""
    if case.config is None or case.config.BLOCK_M > FEW_ROWS:
        return None
    if case.spec.bits == 8:
        return 3.2 if case.spec.group_size > 16 else None
    hopper = case.gpu.capability >= 90
    if case.spec.levels == NORMAL:
        wide, narrow = (3.45, 4.05) if hopper else (4.2, None)
    else:
        wide, narrow = (2.6, 3.1) if hopper else (3.0, None)
    if case.spec.group_size >= 128:
        return wide
    return narrow if case.spec.group_size >= 32 else None
