"""The inputs and result of kernel selection for a quantized matmul: GemmSpec, Gpu, LaunchTable.

y[M, N] = act(x[M, K] @ ŵ[N, K]ᵀ + bias[N]) + residual[M, N]
gated: ŵ has 2N rows, gate over up:  y = act(x @ gateᵀ + b_gate) * (x @ upᵀ + b_up) + residual
experts: ŵ[E, N, K], and each row of x has its expert:  y[m] = act(x[m] @ ŵ[e(m)]ᵀ + bias[e(m)])
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, Final, Literal

import torch

from fqcompile.errors import NoKernelError, OptionError
from fqcompile.tensor.format import QTYPES, UNIFORM, QType

# Dense fp16/bf16 flop per SM and clock with fp32 sums, by compute capability: rates of datasheets
# over SMs and boost clock. Others are taken for the slowest of these.
_MATRIX_FLOPS_PER_CLOCK = {
    80: 2048, 86: 1024, 87: 2048, 89: 1024, 90: 4096, 100: 8192, 103: 8192, 110: 8192, 120: 1024,
    121: 1024,
}  # fmt: skip
_SLOWEST_FLOPS_PER_CLOCK = 1024
_HALVED = "GeForce"  # whose fp32 sums take twice as long (71 TFLOP/s of an RTX 3090, not 142)
# Fraction of the nominal memory bandwidth that a copy reaches, and of peak FLOPs cuBLAS reaches.
COPY_SHARE, MATRIX_SHARE = 0.9, 0.8
_SHARED_RESERVED = 1 << 10  # bytes of each program's shared memory that the system takes
_TILE = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)w(\d+)s(\d+)(-last)?")
_STEP = re.compile(r"(?:m(\d+)=)?(.+)")


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU model that selection and the cost model use; tests invent some.

    Attributes:
        arch: "sm_90", or AMD's name such as "gfx942".
        clock_hz: of the multiprocessors.
        bandwidth: bytes/s of device memory that a copy reaches.
        matrix_flops: dense fp16 or bf16 flop/s that cuBLAS reaches.
        shared_bytes: shared memory that one program may take.
    """

    name: str
    arch: str
    num_sms: int
    clock_hz: float
    bandwidth: float
    matrix_flops: float
    shared_bytes: int

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 where the GPU is not NVIDIA's."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def has_wgmma(self) -> bool:
        """Whether four warps share a matrix product: Hopper, and its successors in data centers.

        Consumer GPUs of any generation have mma.sync, of one warp, alone.
        """
        return 90 <= self.capability < 120


# Datasheet memory rates times the share that copies reach; the H200's copy and matrix product were
# measured by others at 4.3 TB/s and 790 TFLOP/s.
H200 = Gpu("NVIDIA H200", "sm_90", 132, 1.755e9, 4.3e12, 790e12, 227 << 10)
A100 = Gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, 1.41e9, 1.8e12, 250e12, 163 << 10)
KNOWN = {gpu.name: gpu for gpu in (H200, A100)}


def gpu_of(device: torch.device) -> Gpu:
    """The GPU that `device` names.

    Raises:
        NoKernelError: torch sees no GPU here.
    """
    if not torch.cuda.is_available():
        raise NoKernelError(f"device {device}: torch sees no GPU on this machine")
    return _gpu_at(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu_at(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return KNOWN.get(properties.name) or _from_properties(properties)


def _from_properties(properties: Any) -> Gpu:
    """From clocks and widths that the driver tells; the matrix rate by capability."""
    capability = 10 * properties.major + properties.minor
    arch = f"sm_{capability}" if torch.version.hip is None else properties.gcnArchName.split(":")[0]
    # Virtual and unified-memory GPUs tell no clocks: those of a small one then.
    clock = 1e3 * properties.clock_rate or 1.5e9
    # Both edges of the memory's clock carry bits.
    nominal = 2 * 1e3 * properties.memory_clock_rate * properties.memory_bus_width / 8 or 3e11
    per_clock: float = _MATRIX_FLOPS_PER_CLOCK.get(capability, _SLOWEST_FLOPS_PER_CLOCK)
    per_clock /= 2 if _HALVED in properties.name else 1
    return Gpu(
        name=properties.name,
        arch=arch,
        num_sms=properties.multi_processor_count,
        clock_hz=clock,
        bandwidth=COPY_SHARE * nominal,
        matrix_flops=MATRIX_SHARE * per_clock * properties.multi_processor_count * clock,
        shared_bytes=properties.shared_memory_per_multiprocessor - _SHARED_RESERVED,
    )


@dataclass(frozen=True)
class GemmSpec:
    """One quantized matmul as kernels see it; the key of selection and tuning.

    Attributes:
        m: rows of x in the call that the graph was captured with.
        n: columns of the output (half the weight's rows when `gated`).
        k: the reduced dimension.
        dtype: of x and of the output.
        needs_backward: the weight must be dequantizable again, since x may require grad or since
            the packed copy is its only one.
        levels: the levels of the codes, see `tensor.format.QType`.
        m_range: least and largest number of rows (None: no bound) where the graph leaves it open.
        gpu: the GPU that it will run on; None elsewhere.
        experts: matrices in the stack; 0 for a plain linear, which has one and no routing.
        routing: how the rows of x are told their experts, see `template.Routing`; m counts the
            routed rows, so tokens times experts per token.
    """

    m: int
    n: int
    k: int
    bits: int
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    device_type: str
    activation: str = "none"
    gated: bool = False
    has_bias: bool = False
    has_residual: bool = False
    needs_backward: bool = False
    m_range: tuple[int, int | None] | None = None
    gpu: Gpu | None = None
    experts: int = 0
    routing: Literal["grouped", "gathered"] | None = None
    levels: str = UNIFORM

    @property
    def qtype(self) -> QType:
        """The number format of the weight."""
        return QTYPES[self.bits, self.levels]

    @property
    def weight_rows(self) -> int:
        """Rows of the packed weight, of one expert where there are several."""
        return 2 * self.n if self.gated else self.n


@dataclass(frozen=True)
class TileConfig:
    """`BLOCK_M x BLOCK_N` output tile, `BLOCK_K` step, split-K factor, warps, pipeline stages.

    `last_finishes`: of the programs that split K, the last one to arrive adds the shares of its
    tile; else a second kernel adds all of them.

    Raises:
        OptionError: a size is not a power of two, `num_stages` is below 1, or K is not split and
            still the last program finishes.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int = 1
    num_warps: int = 4
    num_stages: int = 3
    last_finishes: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise OptionError(f"TileConfig.{name}={value} must be a power of two")
        if self.num_stages < 1:
            raise OptionError(f"TileConfig.num_stages={self.num_stages} must be at least 1")
        if self.last_finishes and self.SPLIT_K == 1:
            raise OptionError("TileConfig.last_finishes=True needs SPLIT_K of at least 2, not 1")

    def __str__(self) -> str:
        tile = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}x{self.SPLIT_K}"
        return f"{tile}w{self.num_warps}s{self.num_stages}" + "-last" * self.last_finishes

    @classmethod
    def parse(cls, text: str) -> "TileConfig":
        """The config that `str()` wrote, such as "16x64x128x1w4s3" or "16x64x128x8w4s3-last"."""
        match = _TILE.fullmatch(text)
        if match is None:
            raise OptionError(
                f"tile config {text!r} is not of the form "
                "BLOCK_MxBLOCK_NxBLOCK_KxSPLIT_KwWARPSsSTAGES, for example '16x64x128x1w4s3', "
                "with -last behind it where the last program finishes"
            )
        *sizes, last = match.groups()
        return cls(*map(int, sizes), last_finishes=last is not None)


class Way(Enum):
    """The alternative to a tile configuration: dequantize into scratch and multiply with cuBLAS."""

    DENSE = "dense"

    def __str__(self) -> str:
        return self.value


DENSE: Final = Way.DENSE
Config = TileConfig | Literal[Way.DENSE]
Step = tuple[int | None, Config]


def parse_config(text: str) -> Config:
    """The configuration that `str()` wrote: "16x128x128x8w4s4" or "dense"."""
    return DENSE if text == DENSE.value else TileConfig.parse(text)


@dataclass(frozen=True)
class LaunchTable:
    """Steps (largest M or None, configuration): bounds ascend, and only the last one is open.

    Raises:
        OptionError: the bounds do not.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        bounds = [bound for bound, _ in self.steps]
        limits = [bound for bound in bounds[:-1] if bound is not None]
        if not bounds or bounds[-1] is not None or len(limits) != len(bounds) - 1:
            raise OptionError(f"launch table {self!s}: the last step alone has no bound of M")
        if sorted(set(limits)) != limits:
            raise OptionError(f"launch table {self!s}: bounds of M must ascend")

    def at(self, m: int) -> Config:
        """The configuration for `m` rows."""
        for bound, config in self.steps:
            if bound is None or m <= bound:
                return config
        raise AssertionError("the last step has no bound")

    def __str__(self) -> str:
        return ",".join(f"{config}" if m is None else f"m{m}={config}" for m, config in self.steps)

    @classmethod
    def of(cls, config: Config) -> "LaunchTable":
        """One configuration for any number of rows."""
        return cls(((None, config),))

    @classmethod
    def parse(cls, text: str) -> "LaunchTable":
        """The table that `str()` wrote, e.g. "m16=16x128x128x8w4s4,m128=64x128x128x1w4s3,dense"."""
        steps: list[Step] = []
        for part in text.split(","):
            match = _STEP.fullmatch(part)
            if match is None:
                raise OptionError(f"launch table {text!r} has an empty step")
            bound, config = match.groups()
            steps.append((None if bound is None else int(bound), parse_config(config)))
        return cls(tuple(steps))
