"""Hand-written SASS of which the cycles are known: no compiler, no tools, no GPU."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench.static import predict, simulate
from bench.static.machine_code import toolchain_missing
from bench.static.predict import Layer, predicted, simulated, waves
from bench.static.sass import Instruction, around_hot_loop
from bench.static.simulate import (
    BARRIER_LATENCY,
    HMMA_LATENCY,
    MEMORY_LATENCY,
    OTHER_PIPE,
    SAME_PIPE,
    SHARED_LATENCY,
    TO_PRODUCT,
    WGMMA_TAIL,
    Program,
    step,
)
from fqcompile.kernels.spec import TileConfig
from tests.kernels.triton.test_sass import listing

FREE = 1e-9  # cycles per byte: a memory without limits


def program(*lines: str, arch: int = 90, warps: int = 4) -> Program:
    """A loop of these instructions, each "OPCODE operands" or "@guard OPCODE operands"."""
    code = []
    for line in lines:
        guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        code.append(step(Instruction(guard[1:], opcode, operands), arch))
    return Program(arch, warps, resident=8, unroll=1, before=(), loop=tuple(code), after=())


def per_pass(made: Program, programs: int = 1, per_byte: float = FREE) -> float:
    """Cycles that a pass adds, once the loop is under way."""
    return (made.cycles(programs, 400, per_byte) - made.cycles(programs, 200, per_byte)) / 200


def test_a_chain_of_dependent_instructions_takes_its_latencies() -> None:
    chain = program("IADD3 R1, R4, 0x1, RZ", "LOP3.LUT R2, R1, 0xf, RZ, 0xc0, !PT",
                    "FFMA R3, R2, R2, R3", "IADD3 R4, R3, 0x1, RZ")  # fmt: skip
    assert per_pass(chain) == 2 * SAME_PIPE + 2 * OTHER_PIPE


def test_warps_hide_each_others_latency_until_the_issue_slots_are_full() -> None:
    chain = program("FFMA R1, R1, R2, R1")
    assert [per_pass(chain, programs) for programs in (1, 2, 4, 8)] == [4, 4, 4, 8]


@pytest.mark.parametrize(
    ("line", "cycles"),
    [
        ("FFMA R{0}, R100, R101, R102", 10),
        ("LOP3.LUT R{0}, R100, 0xf, RZ, 0xc0, !PT", 20),  # half rate
        ("I2F.S8 R{0}, R100", 80),  # an eighth
        ("@!PT LDS RZ, [RZ]", 10),  # a slot and nothing else
        ("LDS.128 R{0}, [R100]", 160),  # 512 bytes a warp, 32 a cycle
    ],
)
def test_independent_instructions_take_their_pipe(line: str, cycles: float) -> None:
    made = program(*(line.format(4 * i) for i in range(10)), "@P0 BRA `(.L_x_0)")
    waited = program(*(line.format(4 * i) for i in range(10)), "IADD3 R99, R36, 0x1, RZ")
    assert per_pass(made if "LDS.128" not in line else waited) == pytest.approx(cycles, abs=5 + 29)
    if "LDS" not in line or "@" in line:
        assert per_pass(made, programs=4) == pytest.approx(4 * cycles, abs=5)


def test_a_load_is_waited_for_by_the_one_who_reads_it() -> None:
    waits = program("LDG.E R2, [R4.64]", "IADD3 R4, R2, 0x1, RZ")
    assert per_pass(waits) == MEMORY_LATENCY[90] + OTHER_PIPE
    late = program("LDG.E R2, [R4.64]", *["FFMA R9, R10, R11, R12"] * 100, "IADD3 R4, R2, 0x1, RZ")
    assert per_pass(late) == MEMORY_LATENCY[90] + OTHER_PIPE  # the hundred are hidden behind it
    assert per_pass(late, programs=4) == MEMORY_LATENCY[90] + OTHER_PIPE
    assert per_pass(late, programs=16) == pytest.approx(16 * 102, rel=0.01)
    shared = program("LDS R2, [R4]", "IADD3 R4, R2, 0x1, RZ", arch=80)
    assert per_pass(shared) == 4 + SHARED_LATENCY + OTHER_PIPE  # 128 bytes, 32 a cycle


def copies(stages: int) -> Program:
    """2 KiB of four warps a pass, `stages` of them under way."""
    return program("LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDGDEPBAR", f"DEPBAR.LE SB0, {stages:#x}")


def test_what_is_under_way_limits_copies_and_then_bandwidth_does() -> None:
    """Little's law: with k groups under way one is done each 1 / k of the latency."""
    latency = MEMORY_LATENCY[90]
    assert per_pass(copies(0)) == pytest.approx(latency, abs=5)
    assert per_pass(copies(3)) == pytest.approx(latency / 4, rel=0.02)
    assert per_pass(copies(3), programs=2) == pytest.approx(latency / 4, rel=0.02)
    # At 16 bytes a cycle 2 KiB are under way for 128 cycles more, and two programs fill the memory.
    assert per_pass(copies(3), per_byte=1 / 16) == pytest.approx((latency + 128) / 4, rel=0.02)
    assert per_pass(copies(3), programs=2, per_byte=1 / 16) == pytest.approx(256, rel=0.01)
    assert per_pass(copies(9), per_byte=1 / 4) == pytest.approx(512, rel=0.03)


def test_a_barrier_waits_for_all_warps_of_a_program() -> None:
    alone = program("FFMA R1, R1, R2, R1", "BAR.SYNC.DEFER_BLOCKING 0x0")
    assert per_pass(alone) == 1 + BARRIER_LATENCY
    assert per_pass(replace(alone, num_warps=16)) == 4 + BARRIER_LATENCY + 3


def test_products_of_a_warp_take_their_latency_and_of_many_their_rate() -> None:
    chain = program("HMMA.16816.F32.BF16 R8, R0, R4, R8", arch=80)
    assert per_pass(chain) == HMMA_LATENCY
    assert per_pass(chain, programs=8) == 8 * 8  # 2,048 at 256 a cycle and scheduler
    converted = program("LOP3.LUT R0, R8, 0xf, RZ, 0xc0, !PT", "HMMA.16816.F32.BF16 R8, R0, R4, RZ",
                        arch=80)  # fmt: skip
    assert per_pass(converted) == TO_PRODUCT + HMMA_LATENCY


@pytest.mark.parametrize(
    ("operands", "cycles"),
    [
        ("R24, R32, gdesc[UR4], R24", 8),  # 64 x 16 x 16 at 2,048 a cycle
        ("R24, gdesc[UR4], R24", 20),  # 2.5 KiB of shared memory, 128 bytes a cycle
    ],
)
def test_a_warpgroups_product_goes_on_until_it_is_waited_for(operands: str, cycles: int) -> None:
    product = f"HGMMA.64x16x16.F32.BF16 {operands}, gsb0"
    made = program(product, product, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert per_pass(made) == pytest.approx(2 * cycles + WGMMA_TAIL + 1, abs=3)
    beside = program(
        product, product, *["FFMA R1, R2, R3, R4"] * 20, "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    )
    assert per_pass(beside) == pytest.approx(2 * cycles + WGMMA_TAIL + 1, abs=3)
    assert per_pass(made, programs=8) == pytest.approx(16 * cycles, rel=0.02)


def test_what_stands_around_the_loop_is_done_once() -> None:
    product = "HMMA.16816.F32.BF16 R16, R12, R28, R16"
    text = listing(
        "MOV R12, R1", "NOP", ".L_x_0:", product, product, "@P0 BRA `(.L_x_0)",
        "STG.E [R2.64], R16", "EXIT", "MOV R9, R9",
    )  # fmt: skip
    names = [[i.name for i in part] for part in around_hot_loop(text)]
    assert names == [["MOV"], ["HMMA", "HMMA", "BRA"], ["STG"]]
    told = text.replace("EXIT", "MEMBAR.SC.GPU")  # the sum of the shares is the last program's
    assert [[i.name for i in part] for part in around_hot_loop(told)] == names
    made = replace(
        program("FFMA R1, R1, R2, R1"), before=program(*["FFMA R9, R10, R11, R12"] * 50).loop
    )
    assert made.cycles(1, 100, FREE) == pytest.approx(50 + 400, abs=8)
    assert made.overhead(1, FREE) == pytest.approx(50, abs=8)


def test_registers_are_as_wide_as_their_instruction() -> None:
    loads = step(Instruction("", "LDS.128", "R16, [R32+0x200]"), 90)
    assert (loads.writes, loads.reads) == (("R16", "R17", "R18", "R19"), (("R32", False),))
    wide = step(Instruction("P2", "LEA.HI.X", "R17, P0, R19, R114, 0x1"), 90)
    assert wide.writes == ("R17", "P0")
    assert wide.reads == (("R19", False), ("R114", False), ("P2", True))
    copied = step(
        Instruction("", "LDGSTS.E.BYPASS.128", "[R31+0x800], desc[UR16][R18.64], !P2"), 90
    )
    assert copied.writes == () and copied.copied == 512
    assert copied.shared == simulate.SHARED_BYTES * 16


TILE = TileConfig(16, 64, 128, 1, 4, 4)
LAYER = Layer(90, 64 * 132, 1280, 1)


@pytest.fixture
def ten_cycles_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of which an SM holds two programs, alone 10 cycles an iteration each."""
    made = replace(program(*["FFMA R9, R10, R11, R12"] * 10), resident=2)
    monkeypatch.setattr(predict, "program_of", lambda spec, config: made)


def test_the_sm_with_the_most_programs_is_waited_for(ten_cycles_an_iteration: None) -> None:
    def cycles(programs: int) -> float:
        return waves(LAYER.spec, TILE, programs, 100) * 1.755e9

    one, two = cycles(132), cycles(264)
    assert one == pytest.approx(1000, rel=0.01)
    assert two == pytest.approx(2000, rel=0.01)
    assert cycles(133) == pytest.approx(two, rel=0.01)
    assert cycles(265) == pytest.approx(two + one, rel=0.01)


def test_a_call_takes_a_launch_and_where_k_is_split_a_second(ten_cycles_an_iteration: None) -> None:
    whole = simulated(LAYER.spec, TILE)
    assert whole == pytest.approx(1.06e-6 + 100 / 1.755e9, rel=0.02)
    split = replace(TILE, SPLIT_K=2)
    programs, shares = 1.06e-6 + 100 / 1.755e9, 2 * 64 * 132 * 4 / 9.7e12
    finished = simulated(LAYER.spec, split)
    assert finished == pytest.approx(programs + 1.26e-6 + 2 * shares, rel=0.02)
    # 132 SMs read the shares of a tile each, which are all there are.
    by_last = simulated(LAYER.spec, replace(split, last_finishes=True))
    assert by_last == pytest.approx(programs + 1e-6 + 2 * shares, rel=0.02)


@pytest.mark.skipif(toolchain_missing() is not None, reason="no machine code to read")
def test_a_layer_is_predicted_twice_and_neither_beats_the_memory() -> None:
    row = predicted(Layer(90, 4096, 4096, 1))
    assert 1 < row["simulated"] / row["ideal"] < 5
    assert row["simulated"] / row["model"] == pytest.approx(1, abs=0.25)
    assert row["published"][0] == "gemlite 1.68 x 16 bits (H100, gemlite's README)"
