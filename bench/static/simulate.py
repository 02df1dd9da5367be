"""Cycles that an SM takes for a kernel's machine code. Nothing runs, and nothing is fitted to it.

    code = Program.of(read(launch, 90))
    code.cycles(programs=3, iterations=64, per_byte=0.05)

One of the four schedulers is followed; the warps of the others do the same. In each cycle it issues
one instruction of one warp: of which the operands are there, the pipe is free and the barrier open.
Copies from global memory queue for the SM's part of the bandwidth (cycles per byte) and then take
the latency, so what is under way limits their rate (Little's law). Instructions under a guard are
executed, branches fall through; caches, bank conflicts and instruction fetch are not seen.

Sources of the figures, in cycles unless said otherwise:
[L] Luo et al., arXiv:2402.13499: tables IV, V, VII and VIII, of A100 and H800 PCIe
[M] Mesa, src/nouveau/compiler/nak/sm80_instr_latencies.rs: NVIDIA's figures for Ampere
[R] RRZE-HPC/gpu-benches at 1038c5d: files of A100 80 GB, GH200 and H200
[E] an estimate of ours
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf

from bench.static import sass
from bench.static.machine_code import MachineCode
from bench.static.sass import PIPE_RATES, Instruction, macs, multiprocessor, pipe_of

MEMORY_LATENCY = {80: 552, 90: 688}  # [R] gpu-latency, a100_80 and gh200; [L] has 466 and 479
SHARED_LATENCY = 29  # [L] table IV, both
HMMA_LATENCY = 25  # [L] table VII: 24.6 and 24.1 of m16n8k16
SAME_PIPE, OTHER_PIPE, TO_PRODUCT = 4, 5, 7  # [M] read after write; that Hopper is alike: [E]
UNIFORM, FROM_UNIFORM, TO_GUARD = 4, 6, 13  # [M]
SLOW_LATENCY = 20  # [E] conversions, special functions, constants, shuffles
BARRIER_LATENCY = 20  # [E] from the last arrival on
WGMMA_TAIL = 10  # [E]: [L] table VIII has N / 2 for N = 256, and no others
SHARED_BYTES = 32  # a cycle, of a scheduler: [L] table V, 128 of an SM

_REGISTER = re.compile(r"\b(U?[RP])(\d+)\b(\.64)?")
_NO_RESULT = frozenset(
    "STS STG ST STL STSM RED REDG BAR BRA EXIT LDGSTS DEPBAR LDGDEPBAR WARPGROUP MEMBAR FENCE CCTL "
    "BSSY BSYNC WARPSYNC RET CALL ERRBAR YIELD".split()
)
_SHARED = frozenset({"LDS", "STS", "LDSM", "STSM", "LDGSTS"})
_FROM_MEMORY = frozenset({"LDG", "LD", "LDL", "ATOMG", "ATOM"})
_SLOW = frozenset("MUFU I2F F2I F2F FRND POPC FLO LDC ULDC SHFL S2R S2UR R2UR".split())


@dataclass(frozen=True)
class Step:
    """One instruction as the scheduler sees it.

    reads: registers, each with whether it is the guard. busy: cycles of `pipe`. latency: until the
    result is there; None where it depends on the reader. shared: bytes of shared memory that a warp
    moves. copied: bytes of global memory, likewise. tensor: cycles of an asynchronous product.
    """

    name: str
    operands: str
    reads: tuple[tuple[str, bool], ...]
    writes: tuple[str, ...]
    pipe: str | None
    busy: float
    latency: float | None
    shared: int = 0
    copied: int = 0
    tensor: float = 0.0


def step(instruction: Instruction, arch: int) -> Step:
    """Decoded for the SM of this architecture."""
    name, parts = instruction.name, instruction.opcode.split(".")
    if instruction.guard == "!PT":
        return Step("", "", (), (), None, 0, None)
    texts = instruction.operands.split(", ") if instruction.operands else []
    size = 16 if {"128", "M88"} & set(parts) else 8 if "64" in parts else 4
    products = 4 if name in sass.PRODUCTS else 1
    wide = max(size // 4, 2 if "WIDE" in parts else 1, products)
    results = 0
    if name not in _NO_RESULT and texts:
        results = 2 if len(texts) > 1 and re.fullmatch(r"U?P(\d+|T)", texts[1]) else 1
    writes = [r for text in texts[:results] for r in _registers(text, wide)]
    stored = name in _NO_RESULT and size // 4
    reads = [r for text in texts[results:] for r in _registers(text, stored or products)]
    group = name in sass.WARPGROUP_PRODUCTS
    if group:  # sums stay in the tensor core; the wait for them is another instruction
        writes, reads = [], reads if sass.reads_registers(instruction) else []
    guard = [(r, True) for r in _registers(instruction.guard, 1)]
    pipe = "tensor" if name in sass.PRODUCTS and not group else pipe_of(instruction.label, arch)
    tensor, bytes_of_x = _product_cycles(instruction, arch) if group else (0.0, 0)
    busy = 1 / PIPE_RATES[pipe] if pipe in PIPE_RATES else 0.0
    if pipe == "tensor":
        busy = macs(instruction.opcode) / multiprocessor(arch).macs_per_cycle
    return Step(
        name, instruction.operands, tuple([(r, False) for r in reads] + guard), tuple(writes),
        pipe, busy, _latency(name, arch),
        shared=32 * size if name in _SHARED else bytes_of_x,
        copied=32 * size if name == "LDGSTS" else 0,
        tensor=tensor,
    )  # fmt: skip


def _registers(text: str, wide: int) -> list[str]:
    found = []
    for kind, number, pair in _REGISTER.findall(text):
        count = 1 if kind.endswith("P") else max(wide, 2 if pair else 1)
        found += [f"{kind}{int(number) + i}" for i in range(count)]
    return found


def _latency(name: str, arch: int) -> float | None:
    if name in _FROM_MEMORY:
        return MEMORY_LATENCY[arch]
    if name in {"LDS", "LDSM"}:
        return SHARED_LATENCY
    if name in sass.PRODUCTS:
        return HMMA_LATENCY
    return SLOW_LATENCY if name in _SLOW else None


def _product_cycles(instruction: Instruction, arch: int) -> tuple[float, int]:
    """Of a warpgroup's product: cycles, and a scheduler's quarter of its bytes of shared memory.

    [L] table VIII: at N = 64 and more .95 of the peak from registers and from shared memory, at
    N = 32 .94 from registers, .63 from shared memory, which gives 128 bytes a cycle.
    """
    m, n, k = map(int, instruction.opcode.split(".")[1].split("x"))
    cycles = macs(instruction.opcode) / multiprocessor(arch).macs_per_cycle
    columns = n if sass.reads_registers(instruction) else n + m
    return max(cycles, columns * k * 2 / (4 * SHARED_BYTES)), columns * k * 2 // 4


@dataclass
class _Warp:
    """Where a warp is, and when what it waits for will be there."""

    program: int
    at: int = 0  # of its next instruction
    ready: float = 0.0  # when that may be issued, as far as the warp itself knows
    last: float = -1.0
    written: dict[str, tuple[float, str | None, bool]] = field(default_factory=dict)
    copies: float = 0.0  # when those are there that no group has yet
    groups: list[float] = field(default_factory=list)
    products: float = 0.0


@dataclass
class _Scheduler:
    """One simulation: a warp of each program, or several, through the same list of steps."""

    code: Sequence[Step]
    per_byte: float
    arch: int
    warps: list[_Warp]
    free: dict[str | None, float] = field(default_factory=dict)  # when each pipe is
    time: float = 0.0  # of the next issue
    shared: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    arrived: dict[int, list[_Warp]] = field(default_factory=dict)

    def run(self) -> float:
        """Cycles until the last warp is through."""
        todo = list(self.warps)
        while todo:
            # Of those that could go at once, the one that has waited longest.
            now, _, index = min((self._earliest(w), w.last, i) for i, w in enumerate(todo))
            warp = todo[index]
            assert now < inf, "every warp of a program reaches its barriers"
            self._issue(warp, self.code[warp.at], now)
            if warp.at == len(self.code):
                todo.remove(warp)
        return max(warp.last for warp in self.warps)

    def _earliest(self, warp: _Warp) -> float:
        return max(warp.ready, self.time, self.free.get(self.code[warp.at].pipe, 0.0))

    def _issue(self, warp: _Warp, step: Step, now: float) -> None:
        self.time = now + 1
        if step.pipe:
            self.free[step.pipe] = now + step.busy
        warp.at, warp.last = warp.at + 1, now
        there = self._moved(step, now)
        if step.copied:
            self.memory = max(self.memory, now) + 4 * step.copied * self.per_byte
            warp.copies = max(there, self.memory + MEMORY_LATENCY[self.arch], warp.copies)
        if step.tensor:
            self.tensor = max(self.tensor, now) + step.tensor
            warp.products = self.tensor + WGMMA_TAIL
        if step.name == "LDGDEPBAR":
            warp.groups, warp.copies = [*warp.groups, warp.copies], 0.0
        for register in step.writes:
            done = now if step.latency is None else there + step.latency
            warp.written[register] = done, step.pipe, step.latency is None
        warp.ready = now + 1
        if step.name == "BAR":
            self._meet(warp, now)
        if warp.at < len(self.code):
            warp.ready = max(warp.ready, self._operands(warp, self.code[warp.at]))

    def _moved(self, step: Step, now: float) -> float:
        """When the step's bytes have gone through shared memory; else now."""
        if not step.shared:
            return now
        self.shared = max(self.shared, now) + step.shared / SHARED_BYTES
        return self.shared

    def _meet(self, warp: _Warp, now: float) -> None:
        """A barrier opens when all warps of the program are there."""
        here = self.arrived.setdefault(warp.program, [])
        here.append(warp)
        warp.ready = inf
        if len(here) == sum(other.program == warp.program for other in self.warps):
            for other in here:
                other.ready = now + BARRIER_LATENCY
            here.clear()

    def _operands(self, warp: _Warp, step: Step) -> float:
        """When this step's operands are there, and what it waits for by name."""
        times = [_known(*warp.written[r], r, step, g) for r, g in step.reads if r in warp.written]
        if step.name == "DEPBAR" and "SB0" in step.operands:
            left = int(step.operands.split(",")[1], 16)
            times += warp.groups[: max(0, len(warp.groups) - left)]
        if step.name == "WARPGROUP" and step.operands:
            times.append(warp.products)
        return max(times, default=0.0)


def _known(
    done: float, pipe: str | None, coupled: bool, register: str, reader: Step, guard: bool
) -> float:
    """When `reader` may take a register that was written at `done`."""
    if not coupled:
        return done
    if guard:
        return done + TO_GUARD
    if pipe == "uniform" and register.startswith("U"):
        return done + (UNIFORM if reader.pipe == "uniform" else FROM_UNIFORM)
    if reader.name in sass.PRODUCTS:
        return done + TO_PRODUCT
    return done + (SAME_PIPE if pipe == reader.pipe else OTHER_PIPE)


@dataclass(frozen=True)
class Program:
    """A kernel's steps before, in a pass of and after its hot loop; `unroll` iterations a pass."""

    arch: int
    num_warps: int
    resident: int
    unroll: float
    before: tuple[Step, ...]
    loop: tuple[Step, ...]
    after: tuple[Step, ...]

    @classmethod
    def of(cls, code: MachineCode) -> "Program":
        """Of what the compiler made."""
        parts = sass.around_hot_loop(code.sass)
        steps = [tuple(step(instruction, code.arch) for instruction in part) for part in parts]
        return cls(code.arch, code.num_warps, code.resident_programs(), code.unroll, *steps)

    def cycles(self, programs: int, iterations: float, per_byte: float) -> float:
        """Until so many programs that begin together on an SM are through."""
        passes = iterations / self.unroll
        few, many = _MEASURED
        if passes <= many:
            return _run(self, programs, max(1, round(passes)), per_byte)
        start, end = (_run(self, programs, number, per_byte) for number in _MEASURED)
        return end + (passes - many) * (end - start) / (many - few)

    def overhead(self, programs: int, per_byte: float) -> float:
        """What of these cycles no iteration adds to."""
        few, many = _MEASURED
        start, end = (_run(self, programs, number, per_byte) for number in _MEASURED)
        return max(0.0, end - many * (end - start) / (many - few))


_MEASURED = 8, 20  # passes; more go on as between these two


@cache
def _run(program: Program, programs: int, passes: int, per_byte: float) -> float:
    """`per_byte`: cycles of the whole SM; a scheduler has a quarter of its way to memory."""
    warps = [_Warp(p) for p in range(programs) for _ in range(max(1, program.num_warps // 4))]
    code = [*program.before, *program.loop * passes, *program.after]
    return _Scheduler(code, per_byte, program.arch, warps).run()
