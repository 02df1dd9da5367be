"""Memory and achievable rates of devices, links between devices, and the time of collectives.

Memory is the vendor's decimal gigabytes. Rates of memory and matrix units are dense bf16 figures of
the vendor's data sheets times `COPY_SHARE` and `MATRIX_SHARE`, but for the GPUs that `kernels.spec`
knows itself. A link's rate is one direction's. Exchanges are rings as NCCL runs them, over one or
several machines; functions of plain numbers take symbols as well, for `assumptions`.
"""

from dataclasses import dataclass
from typing import Any

from fqcompile.errors import EstimateError, nearest
from fqcompile.kernels.roofline import LAUNCH_SECONDS
from fqcompile.kernels.spec import A100, COPY_SHARE, H200, MATRIX_SHARE, Gpu

# What a ring of NCCL reaches of a link's nominal rate: NCCL's own model has 235 of the A100's 300
# GB/s (src/graph/tuning.cc).
LINK_SHARE = 0.8
# A ring's latencies for small messages, from the same file: to begin, and for each step.
RING_SECONDS = 6.6e-6
NVLINK_HOP, PCIE_HOP, NETWORK_HOP = 0.6e-6, 1e-6, 2.7e-6
GPU_STEP_SECONDS = 2e-5  # to start a CUDA graph, and to choose the tokens


@dataclass(frozen=True)
class Link:
    """Between GPUs: bytes/s of one GPU in one direction as reached, and seconds for each step."""

    name: str
    bandwidth: float
    hop_seconds: float


@dataclass(frozen=True)
class Device:
    """A GPU, or a CPU where `gpu` is None.

    Attributes:
        memory: bytes.
        bandwidth: bytes/s of its memory that a copy reaches (of a CPU: a read).
        matrix_flops: dense bf16 flop/s that a matrix product reaches.
        launch_seconds: for each kernel, beside its work.
        step_seconds: for each pass through the model, beside its kernels.
        link: to the other GPUs of the machine.
        source: where the figures are from.
    """

    name: str
    memory: float
    bandwidth: float
    matrix_flops: float
    link: Link
    source: str
    gpu: Gpu | None = None
    launch_seconds: float = LAUNCH_SECONDS
    step_seconds: float = GPU_STEP_SECONDS


def _nvlink(nominal: float) -> Link:
    """From the vendor's figure, which counts both directions."""
    return Link(f"NVLink {nominal / 1e9:.0f} GB/s", LINK_SHARE * nominal / 2, NVLINK_HOP)


def _of(gpu: Gpu, memory: float, link: Link, source: str) -> Device:
    return Device(gpu.name, memory, gpu.bandwidth, gpu.matrix_flops, link, source, gpu)


def _gpu(
    name: str, arch: int, sms: int, clock: float, rates: tuple[float, float], shared_kib: int
) -> Gpu:
    """`rates`: nominal bytes/s of memory and dense bf16 flop/s."""
    copy, matrix = COPY_SHARE * rates[0], MATRIX_SHARE * rates[1]
    return Gpu(name, f"sm_{arch}", sms, clock, copy, matrix, shared_kib << 10)


_PCIE4 = Link("PCIe 4.0 x16, 64 GB/s", LINK_SHARE * 32e9, PCIE_HOP)
_H100 = _gpu("NVIDIA H100 80GB HBM3", 90, 132, 1.755e9, (3.35e12, 989e12), 227)
_B200 = _gpu("NVIDIA B200", 100, 148, 1.965e9, (8e12, 2250e12), 227)
_A100_40 = _gpu("NVIDIA A100-SXM4-40GB", 80, 108, 1.41e9, (1.555e12, 312e12), 163)
_L40S = _gpu("NVIDIA L40S", 89, 142, 2.52e9, (864e9, 362e12), 99)
_L4 = _gpu("NVIDIA L4", 89, 58, 2.04e9, (300e9, 121e12), 99)
_A10 = _gpu("NVIDIA A10", 86, 72, 1.695e9, (600e9, 125e12), 99)
_RTX_4090 = _gpu("NVIDIA GeForce RTX 4090", 89, 128, 2.52e9, (1.008e12, 165e12), 99)

DEVICES = {
    "h200": _of(H200, 141e9, _nvlink(900e9), "NVIDIA H200 data sheet; rates as kernels.spec has"),
    "h100": _of(_H100, 80e9, _nvlink(900e9), "NVIDIA H100 data sheet, SXM"),
    "b200": _of(_B200, 180e9, _nvlink(1800e9), "NVIDIA HGX B200 data sheet, one of eight"),
    "a100-80": _of(A100, 80e9, _nvlink(600e9), "NVIDIA A100 data sheet, SXM 80 GB"),
    "a100-40": _of(_A100_40, 40e9, _nvlink(600e9), "NVIDIA A100 data sheet, SXM 40 GB"),
    "l40s": _of(_L40S, 48e9, _PCIE4, "NVIDIA L40S data sheet"),
    "l4": _of(_L4, 24e9, _PCIE4, "NVIDIA L4 data sheet"),
    "a10": _of(_A10, 24e9, _PCIE4, "NVIDIA A10 data sheet"),
    "rtx-4090": _of(_RTX_4090, 24e9, _PCIE4, "NVIDIA Ada architecture white paper, appendix A"),
}


def device_called(name: str) -> Device:
    """The device of that short name.

    Raises:
        EstimateError: there is none.
    """
    if name not in DEVICES:
        known = ", ".join(DEVICES)
        raise EstimateError(f"no GPU is called {name!r}; there are {known}{nearest(name, DEVICES)}")
    return DEVICES[name]


@dataclass(frozen=True)
class Cluster:
    """Machines of `gpus` each; `network` is bytes/s of one GPU to others, in one direction."""

    gpus: int = 8
    network: float = 50e9

    @property
    def link(self) -> Link:
        rate = LINK_SHARE * self.network
        return Link(f"network {self.network / 1e9:g} GB/s", rate, NETWORK_HOP)


def ring_seconds(size: Any, p: Any, machines: Any, rate: Any, hop: Any, far_hop: Any) -> Any:
    """An all-reduce of `size` bytes by p GPUs: 2(p-1) steps of size/p, of which 2(machines-1) leave
    a machine."""
    steps, far = 2 * (p - 1), 2 * (machines - 1)
    moved = steps * size / (p * rate)
    return moved + RING_SECONDS + (steps - far) * hop + far * far_hop


def all_reduce_seconds(size: float, p: int, device: Device, cluster: Cluster) -> float:
    """Of `size` bytes on each of p GPUs. A ring leaves each machine through all of its ports."""
    if p == 1:
        return 0.0
    machines, far = -(-p // cluster.gpus), cluster.link
    rate = device.link.bandwidth
    if machines > 1:
        rate = min(rate, cluster.gpus * far.bandwidth)
    near_hop = device.link.hop_seconds
    return float(ring_seconds(size, p, machines, rate, near_hop, far.hop_seconds))


def all_gather_seconds(size: float, p: int, device: Device, cluster: Cluster) -> float:
    """Of p parts of `size` bytes in all: the second half of an all-reduce."""
    return all_reduce_seconds(size, p, device, cluster) / 2


def exchange_seconds(size: Any, p: Any, rate: Any, hop: Any) -> Any:
    """An all-to-all in which each of p GPUs sends `size` bytes: all but its own share."""
    return size * (p - 1) / (p * rate) + RING_SECONDS + hop


def all_to_all_seconds(size: float, p: int, device: Device, cluster: Cluster) -> float:
    """`size` bytes of each of p GPUs, an equal part to each; beyond a machine at the network's rate
    if that takes longer."""
    if p == 1:
        return 0.0
    inside = min(p, cluster.gpus)
    link, far = device.link, cluster.link
    near = exchange_seconds(size * inside / p, inside, link.bandwidth, link.hop_seconds)
    leaves = size * (p - inside) / (p * far.bandwidth) + RING_SECONDS + far.hop_seconds
    return float(near if p == inside else max(near, leaves))
