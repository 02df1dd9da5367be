"""SASS, NVIDIA's machine code, as `nvdisasm -c` prints it: its hot loop, and what that costs."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

WARPGROUP_PRODUCTS = frozenset({"HGMMA", "QGMMA", "IGMMA"})
PRODUCTS = WARPGROUP_PRODUCTS | {"HMMA", "QMMA", "IMMA", "DMMA"}
BULK_COPIES = frozenset({"UBLKCP", "UTMALDG"})
GLOBAL_READS = frozenset({"LDG", "LDGSTS"}) | BULK_COPIES
LOCAL_ACCESSES = frozenset({"LDL", "STL"})

_JUMPS, _ENDS = frozenset({"BRA", "CALL"}), frozenset({"EXIT", "RET", "BRX", "JMX"})
_INSTRUCTION = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.ASCII
)
_LABEL = re.compile(r"([.$\w]+):\s*")
_TARGET = re.compile(r"`\(([^)]+)\)")

# Warp instructions per cycle that one of an SM's four schedulers can send a pipe, by opcode. Other
# opcodes go to the integer pipe; those of _FULL_RATE cost their issue slot and no more.
PIPE_RATES = {"convert": 0.125, "memory": 0.25, "integer": 0.5, "multiply": 0.5, "uniform": 0.5}
_PIPE_OPCODES = {
    "convert": "I2F F2I F2F MUFU POPC FRND BREV FLO",
    "memory": "LDG LDS STS STG LDSM STSM LDGSTS LD ST LDL STL LDC SHFL SYNCS MATCH ATOM ATOMG "
    "ATOMS RED REDG",
    "multiply": "IMAD IDP",
    "uniform": "R2UR S2UR",
}
_PIPE_OF = {op: pipe for pipe, ops in _PIPE_OPCODES.items() for op in ops.split()}
_FP32 = frozenset({"FFMA", "FMUL", "FADD"})
_FULL_RATE = _FP32 | PRODUCTS
_FULL_RATE |= set("HFMA2 HMUL2 HADD2 BRA EXIT BSSY BSYNC BMOV YIELD ELECT PLOP3 VOTE".split())
_FULL_RATE |= set("BAR WARPGROUP WARPSYNC DEPBAR LDGDEPBAR FENCE CCTL ERRBAR MEMBAR".split())


class Instruction(NamedTuple):
    """One line: its guard ("P0", "!P0", or "" without), opcode with modifiers, operands."""

    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers: LDG of LDG.E.128."""
        return self.opcode.split(".")[0]

    @property
    def label(self) -> str:
        """What it is counted as: its opcode, set apart if its guard is "never".

        ptxas puts such loads (`@!PT LDS RZ, [RZ]`) before cp.async and wgmma as a delay. They take
        issue slots, and load nothing.
        """
        return f"@!PT {self.opcode}" if self.guard == "!PT" else self.opcode


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """All instructions, and for each label the index of the instruction after it."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.fullmatch(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(Instruction(found[1] or "", found[2], found[3]))
    if not code:
        raise ValueError(f"no instruction found in this disassembly; it begins {sass[:200]!r}")
    return code, labels


def _successors(code: list[Instruction], labels: Mapping[str, int]) -> list[list[int]]:
    """Where each instruction may continue."""
    follow = []
    for i, instruction in enumerate(code):
        # BSSY and RET name labels too, which are no jumps of theirs.
        target = _TARGET.search(instruction.operands) if instruction.name in _JUMPS else None
        after = [labels[target[1]]] if target and target[1] in labels else []
        # `BRA.U UP0, label` depends on its first operand instead of on a guard.
        ends = instruction.name in _ENDS or (
            instruction.name == "BRA" and instruction.operands.startswith("`")
        )
        if instruction.guard or not ends:
            after.append(i + 1)
        follow.append([j for j in after if j < len(code)])
    return follow


def _walk(
    follow: list[list[int]], roots: Collection[int]
) -> tuple[set[int], list[tuple[int, int]]]:
    """What is reachable, and the edges that close a loop (depth first, back to the path taken)."""
    on_path: dict[int, bool] = {}
    closing = []
    for root in roots:
        if root in on_path:
            continue
        on_path[root] = True
        path: list[tuple[int, Iterator[int]]] = [(root, iter(follow[root]))]
        while path:
            here, ahead = path[-1]
            step = next(ahead, None)
            if step is None:
                on_path[here] = False
                path.pop()
            elif step not in on_path:
                on_path[step] = True
                path.append((step, iter(follow[step])))
            elif on_path[step]:
                closing.append((here, step))
    return set(on_path), closing


def _natural_loops(
    follow: list[list[int]], reached: set[int], closing: list[tuple[int, int]]
) -> list[frozenset[int]]:
    """For each loop head, the instructions that reach a branch back to it without passing it.

    A range of addresses would not do: ptxas puts the rare half of a wait behind the function's end,
    and its branch back then seems to enclose the second half of the loop and the epilogue.
    """
    before: dict[int, list[int]] = {i: [] for i in reached}
    for i in reached:
        for j in follow[i]:
            before[j].append(i)
    loops = []
    for head in dict.fromkeys(head for _, head in closing):
        body, todo = {head}, [tail for tail, to in closing if to == head]
        while todo:
            i = todo.pop()
            if i not in body:
                body.add(i)
                todo += before[i]
        loops.append(frozenset(body))
    return loops


def hot_loop(sass: str) -> tuple[list[Instruction], bool]:
    """The loop that does the work, in address order and without NOPs; False where there is none.

    It is the innermost with tensor core products, of several the one with the most: the body that
    ptxas unrolled rather than its remainder. Where the kernel has no products, reads of global
    memory decide. If they lie in no loop, the result is all that is reachable. Functions that are
    called (CALL, as for exact division) are not part of the loop that calls them.
    """
    code, labels = parse(sass)
    body, found = _hot(code, labels)
    return [code[i] for i in sorted(body) if code[i].name != "NOP"], found


def around_hot_loop(
    sass: str,
) -> tuple[list[Instruction], list[Instruction], list[Instruction]]:
    """What stands before the hot loop, the loop, and what follows it up to the function's end.

    Or up to where a program tells others that its share is stored: what comes then, the last does.
    """
    code, labels = parse(sass)
    body, _ = _hot(code, labels)
    after = range(max(body) + 1, len(code))
    end = next((i for i in after if _is_end(code[i])), len(code))
    parts = range(min(body)), sorted(body), range(max(body) + 1, end)
    before, loop, rest = ([code[i] for i in part if code[i].name != "NOP"] for part in parts)
    return before, loop, rest


def _is_end(instruction: Instruction) -> bool:
    return instruction.name == "MEMBAR" or (instruction.name == "EXIT" and not instruction.guard)


def _hot(code: list[Instruction], labels: Mapping[str, int]) -> tuple[frozenset[int], bool]:
    """Where the instructions of the hot loop are."""
    follow = _successors(code, labels)
    entries = sorted({i for name, i in labels.items() if name.startswith(".text.")} | {0})
    reached, closing = _walk(follow, [i for i in entries if i < len(code)])

    def score(part: Collection[int]) -> tuple[int, int, int]:
        names = Counter(code[i].name for i in part)
        products, reads = (sum(names[op] for op in ops) for ops in (PRODUCTS, GLOBAL_READS))
        return products, reads, names.total()

    deciding = next(i for i, number in enumerate(score(reached)) if number)
    working = [p for p in _natural_loops(follow, reached, closing) if score(p)[deciding]]
    innermost = [loop for loop in working if not any(other < loop for other in working)]
    return max(innermost, key=score, default=frozenset(reached)), bool(innermost)


def ahead_of(sass: str, opcode: str) -> list[Instruction]:
    """What the kernel may execute before it comes to its first `opcode`, in address order."""
    code, labels = parse(sass)
    follow = _successors(code, labels)
    for i, instruction in enumerate(code):
        if instruction.name == opcode and not instruction.guard:
            follow[i] = []
    entry = min((i for name, i in labels.items() if name.startswith(".text.")), default=0)
    reached, _ = _walk(follow, [entry])
    return [code[i] for i in sorted(reached) if code[i].name != opcode]


def reads_registers(instruction: Instruction) -> bool:
    """Whether this is a Hopper product whose left operand is in registers.

    `HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR4], R24` is one; of two operands in shared memory the
    single gdesc of `R24, gdesc[UR4], R24` names both descriptors.
    """
    operands = instruction.operands.split(", ")
    return instruction.name in WARPGROUP_PRODUCTS and not operands[1].startswith("gdesc")


def macs(opcode: str) -> int:
    """Multiply-accumulates of one tensor core instruction when four warps execute it; else 0."""
    name, *modifiers = opcode.split(".")
    if name not in PRODUCTS:
        return 0
    if group := re.fullmatch(r"(\d+)x(\d+)x(\d+)", modifiers[0]):
        return int(group[1]) * int(group[2]) * int(group[3])
    if warp := re.fullmatch(r"(16|8)8(\d+)", modifiers[0]):
        return 4 * int(warp[1]) * 8 * int(warp[2])
    raise ValueError(
        f"{opcode}: no rule for the shape {modifiers[0]}; bench.static.sass.macs needs one"
    )


def ptx_macs(ptx: str) -> int:
    """As `macs`, the sum of all products written in this PTX."""
    found = re.findall(r"\b(wg)?mma[\w.]*\.m(\d+)n(\d+)k(\d+)\.", ptx)
    return sum((1 if group else 4) * int(m) * int(n) * int(k) for group, m, n, k in found)


class Multiprocessor(NamedTuple):
    """What an SM has: bytes of shared memory (in all, for one program), 16-bit MACs per cycle."""

    shared_bytes: int
    shared_bytes_per_program: int
    macs_per_cycle: int


_MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 163 * 1024, 1024),
    90: Multiprocessor(228 * 1024, 227 * 1024, 2048),
}


def multiprocessor(arch: int) -> Multiprocessor:
    """The SM of the data center GPU with this architecture: A100, H100 and H200."""
    if arch not in _MULTIPROCESSORS:
        raise ValueError(
            f"sm_{arch}: bench.static.sass knows the SMs of {sorted(_MULTIPROCESSORS)} only"
        )
    return _MULTIPROCESSORS[arch]


def pipe_cycles(loop: Mapping[str, int], arch: int) -> dict[str, float]:
    """Least cycles of one scheduler, for one warp's pass of the loop: of each pipe, and of issue.

    A model: rates of NVIDIA's throughput table for 8.0 and 9.0, I2F and F2F taken at the slow one.
    """
    cycles = dict.fromkeys(PIPE_RATES, 0.0) | {"issue": float(sum(loop.values()))}
    for label, number in loop.items():
        if pipe := pipe_of(label, arch):
            cycles[pipe] += number / PIPE_RATES[pipe]
    return cycles


def pipe_of(label: str, arch: int) -> str | None:
    """Of PIPE_RATES the one that executes it; None where it costs its issue slot and no more."""
    name = label.split(".")[0]
    if name in _FP32 and arch < 86:
        return "multiply"  # 16 lanes for both, up to A100
    if name in _FULL_RATE or name.startswith("@!PT"):
        return None
    return _PIPE_OF.get(name, "uniform" if name.startswith("U") else "integer")
