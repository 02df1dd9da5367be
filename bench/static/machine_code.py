"""What the compiler made of a Triton kernel, read from its machine code without a GPU.

    code = read(Launch(kernel, {"x_ptr": "*bf16"}, {"BLOCK_M": 16}), arch=90)
    code.per_weight(64 * 128)  # instructions of a thread per weight of a 64 x 128 tile

Nothing runs: latency, caches and bank conflicts are not seen.
"""

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.static import sass as reader
from fqcompile.kernels.spec import Gpu

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager

    TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """How a kernel would be launched, as far as its machine code depends on it.

    pointers: Triton type by argument, such as "*bf16", taken as aligned to 16 bytes.
    constants: tl.constexpr arguments, and those that Triton specializes on (None, 1).
    divisible: integers that 16 divides; without them copies are narrow or not asynchronous.
    wide: integers that are i64; the others are i32.
    """

    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: Collection[str] = ()
    wide: Collection[str] = ()
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    launch_pdl: bool = False


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel; counts are of its hot loop (`sass.hot_loop`), per warp and pass.

    registers, stack_bytes, local_bytes: of a thread. shared_bytes: of a program, without the 1 KiB
    that the system takes. spills: loads and stores of local memory in the whole kernel. loop: how
    often each opcode occurs. has_loop: False if no loop does the work and the whole kernel counts.
    register_operand_products: HGMMA whose left operand comes from registers, not shared memory.
    """

    arch: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int
    spills: int
    loop: Counter[str]
    has_loop: bool
    register_operand_products: int
    ptx: str = field(repr=False)
    sass: str = field(repr=False)

    def count(self, *prefixes: str) -> int:
        """Instructions with these opcodes: "LDG" counts LDG and LDG.E.128, but not LDGSTS."""
        starts = tuple(f"{prefix}." for prefix in prefixes)
        return sum(n for op, n in self.loop.items() if op in prefixes or op.startswith(starts))

    def _wide(self, name: str) -> int:
        # Among whole modifiers: LTC128B asks L2 to prefetch, and is no width.
        return sum(n for op, n in self.loop.items() if {name, "128"} <= set(op.split(".")))

    @property
    def instructions(self) -> int:
        """All instructions but NOP."""
        return self.loop.total()

    @property
    def wide_async_copies(self) -> int:
        """cp.async of 16 bytes per thread."""
        return self._wide("LDGSTS")

    @property
    def narrow_async_copies(self) -> int:
        """cp.async of 4 or 8 bytes per thread."""
        return self.count("LDGSTS") - self.wide_async_copies

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes per thread from global memory into registers."""
        return self._wide("LDG")

    @property
    def narrow_loads(self) -> int:
        """Loads of less than 16 bytes per thread from global memory into registers."""
        return self.count("LDG") - self.wide_loads

    @property
    def bulk_copies(self) -> int:
        """Copies by the tensor memory accelerator (TMA)."""
        return self.count(*reader.BULK_COPIES)

    @property
    def shared_stores(self) -> int:
        """Stores from registers to shared memory: a round trip, where operands take it."""
        return self.count("STS", "STSM")

    @property
    def matrix_products(self) -> int:
        """Tensor core instructions: HGMMA is one of four warps together, HMMA of each."""
        return self.count(*reader.PRODUCTS)

    @property
    def int_to_float(self) -> int:
        """Conversions from integers: I2F (an eighth of the rate) and I2FP (integer pipe)."""
        return self.count("I2F", "I2FP")

    @property
    def macs(self) -> int:
        """Multiply-accumulates on the tensor cores, of a program's pass of the hot loop."""
        return sum(n * reader.macs(op) for op, n in self.loop.items()) * self.num_warps // 4

    @property
    def unroll(self) -> float:
        """Iterations of the PTX loop in a pass of the hot loop: ptxas unrolls short ones by four.

        Multiply-accumulates of the loop over those of the PTX, where each product stands once. The
        tile does not tell: warps for which it is too small repeat the products of others. Nor do
        copies: weights and activations look alike. Raises if products are absent or elsewhere too.
        """
        per_iteration = reader.ptx_macs(self.ptx) * self.num_warps // 4
        if not per_iteration or self.macs < per_iteration:
            raise ValueError(
                f"{self.macs} multiply-accumulates in the hot loop and {per_iteration} in the PTX "
                "do not tell how often the loop is unrolled: pass `unroll`"
            )
        return self.macs / per_iteration

    def per_weight(self, weights_per_iteration: int, unroll: float | None = None) -> float:
        """Instructions of a thread per weight; an iteration of the program reads that many."""
        unroll = self.unroll if unroll is None else unroll
        return self.instructions * 32 * self.num_warps / (weights_per_iteration * unroll)

    def _bounds(self, weights: int, gpu: Gpu, unroll: float | None) -> dict[str, float]:
        cycles = reader.pipe_cycles(self.loop, self.arch)
        bounds = {pipe: number * self.num_warps / 4 for pipe, number in cycles.items()}
        bounds["tensor"] = self.macs / reader.multiprocessor(self.arch).macs_per_cycle
        divisor = weights * (self.unroll if unroll is None else unroll) * gpu.clock_hz
        return {what: number / divisor for what, number in bounds.items()}

    def issue_bound(self, weights: int, gpu: Gpu, unroll: float | None = None) -> float:
        """Least seconds of one SM per weight if only issue slots count; `weights` per iteration."""
        return self._bounds(weights, gpu, unroll)["issue"]

    def pipe_bound(self, weights: int, gpu: Gpu, unroll: float | None = None) -> float:
        """Least seconds of one SM per weight: issue slots, execution pipes and tensor cores."""
        return max(self._bounds(weights, gpu, unroll).values())

    def resident_programs(self) -> int:
        """Programs that an SM holds at once; 0 if it cannot hold one."""
        sm = reader.multiprocessor(self.arch)
        if self.shared_bytes > sm.shared_bytes_per_program:
            return 0
        # Warps take registers in blocks of 256, each from the 16,384 of its scheduler.
        warps = min(4 * (16384 // (-(-self.registers // 8) * 256)), 64)
        shared = -(-self.shared_bytes // 128) * 128 + 1024
        return min(warps // self.num_warps, sm.shared_bytes // shared, 32)

    def bytes_in_flight(self, bytes_per_iteration: int) -> int:
        """Bytes that an SM has under way while it computes, if the loop's copies are pipelined."""
        return (self.num_stages - 1) * bytes_per_iteration * self.resident_programs()


def toolchain_missing() -> str | None:
    """Why machine code cannot be read here; None if it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    missing = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (TOOLS / name).exists()]
    return f"Triton came without {', '.join(missing)} in {TOOLS}" if missing else None


def compile_for(launch: Launch, arch: int | str) -> Any:
    """The kernel compiled for sm_<arch>, or AMD's "gfx942": triton.compiler.CompiledKernel."""
    names = launch.kernel.arg_names
    unknown = {*launch.pointers, *launch.constants, *launch.divisible, *launch.wide} - set(names)
    if unknown:
        raise ValueError(f"{launch.kernel.__name__} has no {sorted(unknown)}; it has {names}")
    constants = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    if absent := constants - set(launch.constants):
        raise ValueError(f"{launch.kernel.__name__} needs constants for {sorted(absent)}")
    types = {name: "i64" if name in launch.wide else "i32" for name in names}
    types |= dict(launch.pointers) | dict.fromkeys(launch.constants, "constexpr")
    aligned = sorted({*launch.pointers, *launch.divisible})
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    names_of_options = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
    options = {option: getattr(launch, option) for option in names_of_options}
    source = ASTSource(launch.kernel, types, dict(launch.constants), hints)
    backend, warp = ("cuda", 32) if isinstance(arch, int) else ("hip", 64)
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)


def _inspect(tool: str, option: str, cubin: bytes) -> str:
    """What a tool prints about a cubin; kept among Triton's cached files."""
    key = f"{triton.__version__} {tool} {option} ".encode() + cubin
    cache = get_cache_manager(hashlib.sha256(key).hexdigest())  # replaces files atomically
    if kept := cache.get_file("output.txt"):
        return Path(kept).read_text()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([TOOLS / tool, option, path], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {option} failed: {done.stderr.strip()}")
    cache.put(done.stdout, "output.txt", binary=False)
    return done.stdout


def read(launch: Launch, arch: int) -> MachineCode:
    """Compile, disassemble and count. The second time takes milliseconds, in any process."""
    compiled = compile_for(launch, arch)
    usage = _inspect("cuobjdump", "-res-usage", compiled.asm["cubin"])
    sass = _inspect("nvdisasm", "-c", compiled.asm["cubin"])
    own = usage.partition(f"Function {compiled.metadata.name}:")[2]
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", own)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {usage.strip()!r}")
    loop, has_loop = reader.hot_loop(sass)
    return MachineCode(
        arch=arch,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        local_bytes=int(found[3]),
        shared_bytes=compiled.metadata.shared,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        spills=sum(
            instruction.name in reader.LOCAL_ACCESSES for instruction in reader.parse(sass)[0]
        ),
        loop=Counter(instruction.label for instruction in loop),
        has_loop=has_loop,
        register_operand_products=sum(map(reader.reads_registers, loop)),
        ptx=compiled.asm["ptx"],
        sass=sass,
    )
