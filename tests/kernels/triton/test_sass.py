"""The hot loop of short hand-written SASS, and what made-up loops cost: no compiler, no tools."""

from collections import Counter
from typing import Any

import pytest

from bench.static import sass
from bench.static.machine_code import MachineCode
from bench.static.sass import hot_loop
from fqcompile.kernels.spec import A100, H200


def listing(*lines: str) -> str:
    """SASS as nvdisasm prints it, from instructions and "label:" lines."""
    text = [
        line if line.endswith(":") else f"        /*{i * 16:04x}*/               {line} ;"
        for i, line in enumerate(lines)
    ]
    return "\n".join(['\t.section\t.text.k,"ax"', "k:", ".text.k:", *text])


# An outer loop; in it the hot one, whose wait goes on behind the function; padding.
NESTED = listing(
    "@P0 EXIT",
    ".L_x_3:",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
    ".L_x_2:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR7+0xc000], R93",
    "@!P1 BRA `(.L_x_1)",
    ".L_x_4:",
    "HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR4], R24, gsb0",
    "@!PT LDS RZ, [RZ]",
    "@P2 LDGSTS.E.BYPASS.LTC128B.64 [R15], desc[UR4][R8.64], !P2",
    "NOP",
    "@!UP0 UIADD3 UR4, UR4, 0x1, URZ",
    "BRA.U UP1, `(.L_x_2)",
    "STG.E.128 desc[UR4][R2.64], R4",
    "@P1 EXIT",
    "BRA `(.L_x_3)",
    ".L_x_1:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR7+0xc000], R93",
    "@!P1 BRA `(.L_x_1)",
    "BRA `(.L_x_4)",
    ".L_x_5:",
    "BRA `(.L_x_5)",
    "NOP",
)


def test_the_hot_loop_is_the_innermost_with_products_and_has_its_far_blocks() -> None:
    loop, found = hot_loop(NESTED)
    assert found
    assert Counter(instruction.label for instruction in loop) == {
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 2,
        "BRA": 3,
        "BRA.U": 1,
        "HGMMA.64x16x16.F32.BF16": 1,
        "@!PT LDS": 1,
        "LDGSTS.E.BYPASS.LTC128B.64": 1,
        "UIADD3": 1,
    }
    assert [sass.reads_registers(i) for i in loop if i.name == "HGMMA"] == [True]
    assert loop[1].guard == "!P1"


def test_of_several_loops_the_one_with_most_products_is_hot() -> None:
    product = "HMMA.16816.F32.BF16 R16, R12, R28, R16"
    text = listing(
        ".L_x_0:", *[product] * 4, "@P0 BRA `(.L_x_0)",
        ".L_x_1:", product, *["LDG.E R2, [R4.64]"] * 6, "@P0 BRA `(.L_x_1)",
        ".L_x_2:", "LDG.E R2, [R4.64]", "@P0 BRA `(.L_x_2)",
        "EXIT",
    )  # fmt: skip
    loop, found = hot_loop(text)
    assert (found, [instruction.opcode for instruction in loop]) == (
        True,
        ["HMMA.16816.F32.BF16"] * 4 + ["BRA"],
    )


def test_a_loop_beside_the_products_is_not_taken_for_theirs() -> None:
    product = "HMMA.16816.F32.BF16 R16, R12, R28, R16"
    loop, found = hot_loop(
        listing(".L_x_0:", "LDG.E R2, [R4.64]", "@P0 BRA `(.L_x_0)", product, "EXIT", "NOP")
    )
    assert (found, len(loop)) == (False, 4)


def test_a_branch_that_depends_on_its_operand_may_fall_through() -> None:
    loop, found = hot_loop(listing("BRA.U UP0, `(.L_x_0)", "STG.E [R2.64], R4", ".L_x_0:", "EXIT"))
    assert (found, len(loop)) == (False, 3)


def test_a_return_is_no_branch_to_the_function_that_it_names() -> None:
    text = listing(
        "LDG.E R2, [R4.64]", "CALL.REL.NOINC `($__internal_0)", "EXIT",
        "$__internal_0:", "MUFU.RCP R3, R2", "RET.REL.NODEC R20 `(k)",
    )  # fmt: skip
    loop, found = hot_loop(text)
    assert (found, len(loop)) == (False, 5)


def test_a_text_without_instructions_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction found in this disassembly; it begins 'x"):
        hot_loop("xyz")


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HGMMA.64x16x16.F32.BF16", 64 * 16 * 16),
        ("HMMA.16816.F32.BF16", 4 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 4 * 16 * 8 * 8),
        ("IMMA.8816.S8.S8", 4 * 8 * 8 * 16),
        ("DMMA.884", 4 * 8 * 8 * 4),
        ("IMAD", 0),
        ("@!PT LDS", 0),
    ],
)
def test_products_are_sized_by_their_shape(opcode: str, expected: int) -> None:
    assert sass.macs(opcode) == expected


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"HMMA\.SP: no rule for the shape SP"):
        sass.macs("HMMA.SP")


def made(loop: dict[str, int] | None = None, **changes: Any) -> MachineCode:
    """Machine code that needs next to nothing, but for `changes`."""
    usage = {"registers": 16, "stack_bytes": 0, "local_bytes": 0, "shared_bytes": 0, "spills": 0}
    shape = {"arch": 90, "num_warps": 4, "num_stages": 3, "has_loop": True}
    text = {"register_operand_products": 0, "ptx": "", "sass": ""}
    return MachineCode(**usage | shape | text | {"loop": Counter(loop or {})} | changes)


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({}, 16),  # 64 warps
        ({"num_warps": 1}, 32),
        ({"num_warps": 8}, 8),
        ({"registers": 128}, 4),
        ({"registers": 129}, 3),
        ({"registers": 129, "num_warps": 1}, 12),  # three for each scheduler, not 15 in all
        ({"registers": 255}, 2),
        ({"registers": 255, "num_warps": 16}, 0),
        ({"shared_bytes": 56 * 1024}, 4),
        ({"shared_bytes": 56 * 1024 + 1}, 3),
        ({"shared_bytes": 227 * 1024}, 1),
        ({"shared_bytes": 227 * 1024 + 1}, 0),
        ({"shared_bytes": 56 * 1024, "arch": 80}, 2),
        ({"shared_bytes": 163 * 1024, "arch": 80}, 1),
        ({"shared_bytes": 163 * 1024 + 1, "arch": 80}, 0),
    ],
)
def test_programs_share_an_sm_as_its_limits_allow(changes: dict[str, int], programs: int) -> None:
    assert made(**changes).resident_programs() == programs
    assert made(**changes, num_stages=4).bytes_in_flight(100) == 300 * programs


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sm_75: .* knows the SMs of \[80, 90\] only"):
        made(arch=75).resident_programs()


def test_opcodes_are_counted_by_whole_modifiers() -> None:
    loop = {"LDG.E": 1, "LDG.E.LTC128B.64": 2, "LDG.E.128.CONSTANT": 4, "LDGSTS.E.BYPASS.128": 8}
    code = made(loop | {"LDGSTS.E.LTC128B": 16, "LDGDEPBAR": 32, "@!PT LDS": 64, "UBLKCP.S.G": 128})
    assert (code.count("LDG"), code.count("LDG.E"), code.count("LDS")) == (7, 7, 0)
    assert (code.wide_loads, code.narrow_loads) == (4, 3)
    assert (code.wide_async_copies, code.narrow_async_copies) == (8, 16)
    assert (code.bulk_copies, code.instructions) == (128, 255)


@pytest.mark.parametrize(
    ("loop", "arch", "cycles"),
    [
        ({"FFMA": 10}, 90, 10),
        ({"FFMA": 10, "IMAD.WIDE": 5}, 80, 30),
        ({"LOP3.LUT": 10, "HFMA2.BF16_V2": 5}, 90, 20),
        ({"LDS.128": 10}, 90, 40),
        ({"I2F.S8": 10}, 80, 80),
        ({"I2FP.F32.S32": 10}, 90, 20),
        ({"UIADD3": 10, "R2UR": 10}, 90, 40),
        ({"@!PT LDS": 10}, 90, 10),
        ({"HGMMA.64x16x16.F32.BF16": 10}, 90, 80),  # 64 * 16 * 16 at 2,048 per cycle
        ({"HMMA.16816.F32.BF16": 10}, 80, 80),  # 4 * 16 * 8 * 16 at 1,024 per cycle
    ],
)
def test_the_fullest_pipe_bounds_the_speed(loop: dict[str, int], arch: int, cycles: int) -> None:
    code = made(loop, arch=arch)
    gpu = H200 if arch == 90 else A100
    assert code.pipe_bound(100, gpu, unroll=2) == pytest.approx(cycles / gpu.clock_hz / 200)
    issue = sum(loop.values())
    assert code.issue_bound(100, gpu, unroll=2) == pytest.approx(issue / gpu.clock_hz / 200)


def test_products_outside_the_hot_loop_do_not_tell_its_unrolling() -> None:
    ptx = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {}, {}, {}, {};"
    assert made({"HMMA.16816.F32.BF16": 2}, ptx=ptx).unroll == 2
    with pytest.raises(ValueError, match=r"8192 .* in the hot loop and 16384 in the PTX"):
        made({"HMMA.16816.F32.BF16": 1}, ptx=ptx * 2).per_weight(1)
