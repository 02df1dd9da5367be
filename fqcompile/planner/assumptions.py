"""What a plan takes for granted, in words and with its numbers: printed below every plan."""

from collections.abc import Iterable

from fqcompile.kernels.gpu import COPY_SHARE, MATRIX_SHARE
from fqcompile.planner.communication import Cluster
from fqcompile.planner.devices import (
    LINK_SHARE,
    NVLINK_HOP,
    PCIE_HOP,
    RING_SECONDS,
    Device,
)
from fqcompile.planner.memory import USABLE_SHARE
from fqcompile.planner.speed import ATTENTION_SHARE, EXPERT_KERNELS, OTHER_KERNELS
from fqcompile.planner.weight_format import WeightFormat
from fqcompile.planner.workload import Workload

_MICRO = 1e6


def assumptions(
    devices: Iterable[Device],
    formats: Iterable[WeightFormat],
    cluster: Cluster,
    loads: Iterable[Workload],
) -> list[str]:
    """One sentence or two each; nothing of it is fitted to a measurement."""
    chunks = sorted({load.chunk for load in loads})
    return [
        *(_device(device) for device in devices),
        *(_format(form) for form in formats),
        f"memory: {USABLE_SHARE:.0%} of a GPU's is usable; keys, values and activations have 16 "
        "bits; each GPU holds the whole embedding, and a copy of a KV head where tp exceeds them",
        f"rates are {COPY_SHARE:.0%} of nominal memory, {MATRIX_SHARE:.0%} of matrix units, "
        f"{LINK_SHARE:.0%} of links, but for the H200, whose were measured; attention over a "
        f"prompt reaches {ATTENTION_SHARE:.0%} of a matrix product's rate",
        "matmuls: int8 and int4 take what the cost model says of the kernel that `select` would "
        "choose; bf16 takes the roofline and a launch",
        f"each layer launches {OTHER_KERNELS} kernels beside its matmuls, of experts "
        f"{EXPERT_KERNELS} more; all tokens choose experts alike often, each on its own: a batch "
        "of B tokens reads E(1 - (1 - k/E)^B) of E, and no GPU has more rows than another",
        f"an exchange takes {_MICRO * RING_SECONDS:.1f} µs and for each step "
        f"{_MICRO * NVLINK_HOP:.1f} µs by NVLink, {_MICRO * PCIE_HOP:.1f} by PCIe, "
        f"{_MICRO * cluster.link.hop_seconds:.1f} by network (NCCL's figures); nothing overlaps it",
        f"machines of {cluster.gpus} GPUs, between them {cluster.network / 1e9:g} GB/s for each "
        "GPU in each direction",
        f"a prefill's pass reads at most {', '.join(map(str, chunks))} tokens, of prompts as long "
        "as the context; a step of decoding attends to the whole context",
    ]


def _device(device: Device) -> str:
    return (
        f"{device.name}: {device.memory / 1e9:.0f} GB; as reached {device.bandwidth / 1e12:.2f} "
        f"TB/s, {device.matrix_flops / 1e12:.0f} TFLOP/s; {device.link.name}, as reached "
        f"{device.link.bandwidth / 1e9:.0f} GB/s in one direction. {device.source}"
    )


def _format(form: WeightFormat) -> str:
    if form.head_bits == form.bits == 16:
        return "bf16: all weights in 16 bits"
    where = "each column" if form.group is None else f"each {form.group} weights"
    return (
        f"{form.name}: a 16-bit scale for {where}, the head in {form.head_bits} bits; embeddings, "
        "routers, norms and biases in 16"
    )
