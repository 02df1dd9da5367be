"""The assumptions of an estimate: as sentences with numbers, and as formulas.

The formulas are the same functions that `costs` and `devices` use, called with symbols.
"""

from collections.abc import Iterable

from sympy import Expr, Symbol

from fqcompile.estimator.costs import (
    ATTENTION_SHARE,
    EXPERT_KERNELS,
    OTHER_KERNELS,
    USABLE_SHARE,
    attention_flops,
    experts_read,
    kv_bytes,
)
from fqcompile.estimator.decoder import Decoder
from fqcompile.estimator.devices import (
    LINK_SHARE,
    NVLINK_HOP,
    PCIE_HOP,
    RING_SECONDS,
    Cluster,
    Device,
    exchange_seconds,
    ring_seconds,
)
from fqcompile.estimator.estimate import token_cost
from fqcompile.estimator.matmuls import (
    PLAIN_BITS,
    Sharing,
    WeightFormat,
    Workload,
    matrices,
    spec_of,
)
from fqcompile.kernels.roofline import M, dense, ideal, weight_bytes
from fqcompile.kernels.spec import COPY_SHARE, MATRIX_SHARE

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


def _symbols(names: str) -> list[Symbol]:
    return [Symbol(name, positive=True) for name in names.split()]


def general_formulas() -> dict[str, Expr]:
    """Those that hold for every model."""
    layers, heads, kv_heads, head_dim, tokens, keys = _symbols("layers heads KV width tokens keys")
    experts, per_token, size, p, machines = _symbols("E k bytes p machines")
    rate, hop, far_hop, price, per_second = _symbols("rate hop far_hop price tokens_per_second")
    return {
        "bytes of keys and values": kv_bytes(layers, kv_heads, head_dim, tokens),
        "flops of attention in a layer": attention_flops(tokens, keys, heads, head_dim),
        "experts that tokens meet": experts_read(experts, per_token, tokens),
        "seconds of an all-reduce": ring_seconds(size, p, machines, rate, hop, far_hop),
        "seconds of an all-to-all": exchange_seconds(size, p, rate, hop),
        "cost of a million tokens": token_cost(price, p, per_second),
    }


def matmul_formulas(decoder: Decoder, form: WeightFormat, device: Device) -> dict[str, Expr]:
    """The roofline of each matrix on one device, in seconds for M rows; of experts, routed ones."""
    found = {}
    for matrix in matrices(decoder, Sharing()):
        spec = spec_of(matrix, 1, form, device)
        name = f"{matrix.name} of {weight_bytes(spec) * max(1, matrix.experts)} bytes"
        hit = None
        if matrix.experts and decoder.experts is not None:
            per_token = decoder.experts.per_token
            hit = experts_read(matrix.experts, per_token, M / per_token)
        found[name] = ideal(spec, device, hit)
        if spec.gpu is not None and spec.bits != PLAIN_BITS:
            found[f"{matrix.name} dequantized, then multiplied"] = dense(spec, spec.gpu)
    return found


def formulas_text(decoder: Decoder, form: WeightFormat, device: Device) -> str:
    """The matmuls' formulas, a line each."""
    title = f"{decoder.name} in {form.name} on one {device.name}, seconds for {M} rows:"
    return "\n".join([title, *_lines(matmul_formulas(decoder, form, device))])


def general_text() -> str:
    """The formulas of every model, a line each."""
    return "\n".join(["Formulas:", *_lines(general_formulas())])


def _lines(formulas: dict[str, Expr]) -> list[str]:
    return [f"  {name} = {formula}" for name, formula in formulas.items()]
