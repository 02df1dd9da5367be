"""What the cost model and selection need to know of a GPU, as a value that tests can make up."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fqcompile.errors import NoKernelError

# Dense fp16/bf16 flop per SM and clock, by compute capability (vendor's white papers).
_MATRIX_FLOPS_PER_CLOCK = {80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192}
# What a copy reaches of the memory's nominal rate, and cuBLAS of the matrix units'.
COPY_SHARE, MATRIX_SHARE = 0.9, 0.8
_SHARED_RESERVED = 1 << 10  # bytes of each program's shared memory that the system takes


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

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
    per_clock = _MATRIX_FLOPS_PER_CLOCK.get(capability, 2048)
    return Gpu(
        name=properties.name,
        arch=arch,
        num_sms=properties.multi_processor_count,
        clock_hz=clock,
        bandwidth=COPY_SHARE * nominal,
        matrix_flops=MATRIX_SHARE * per_clock * properties.multi_processor_count * clock,
        shared_bytes=properties.shared_memory_per_multiprocessor - _SHARED_RESERVED,
    )
