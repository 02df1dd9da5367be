"""What the planner predicts for each measured row of `results/`, beside it.

Layers by our kernels and by the 16-bit library, layers of experts, whole models: time, and the
bytes of their weights. All is one device's. Rows of other libraries and of fp32 have no prediction.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.core.results import Row
from bench.core.shapes import EXPERTS, GROUPED_MM, MODELS, OURS, ExpertShape
from fqcompile.estimator.costs import (
    FLOAT_BYTES,
    decode_speed,
    experts_read,
    prefill_speed,
    weight_memory,
)
from fqcompile.estimator.decoder import ConfigFields, Decoder
from fqcompile.estimator.devices import DEVICES, PCIE_HOP, Cluster, Device, Link
from fqcompile.estimator.matmuls import (
    Matrix,
    Sharing,
    WeightFormat,
    Workload,
    matmul_seconds,
    spec_of,
)
from fqcompile.estimator.model_shapes import decoder_of

PLAIN = WeightFormat("bf16", 16, None, 16)
GROUP = 128  # as the adaptive rule has it for random weights
MODEL_WAYS = {
    "inductor": PLAIN,
    "int8": WeightFormat("int8", 8, None, 8),
    "int4": WeightFormat("int4", 4, GROUP, 8),
    "int4 head": WeightFormat("int4", 4, GROUP, 4),
}
PLAIN_LAYERS = ("cuBLAS", "F.linear bf16")
# Of a CPU the results have what it reads. A Zen 4 core makes 64 flop of AVX512-BF16 in a clock
# (AMD's software optimization guide for family 19h, models 10h to 1Fh); EPYC 9004 reach 3.7 GHz.
CPU_FLOPS_OF_A_THREAD = 64 * 3.7e9
CPU_LAUNCH_SECONDS, CPU_STEP_SECONDS = 1e-5, 1e-4
_ANY_CHUNK = 1 << 30
_PLANNED = ("Llama", "OPT")  # classes of transformers: of others no rows are predicted


@dataclass(frozen=True)
class Compared:
    """One figure as measured and as predicted: both in milliseconds, or both in MB."""

    device: str
    part: str
    what: str
    way: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """0.1: predicted a tenth more than measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Machine:
    """Where results are from: a GPU that the planner knows, or a CPU by what it was seen read."""

    name: str
    gpu: Device | None
    read_rates: Mapping[int, float]

    def device(self, threads: int | None = None) -> Device | None:
        """With so many threads (None: the most). None where nothing is known of it."""
        if self.gpu is not None or not self.read_rates:
            return self.gpu
        threads = max(self.read_rates) if threads is None else threads
        if threads not in self.read_rates:
            return None
        return Device(
            self.name,
            memory=float("inf"),
            bandwidth=self.read_rates[threads],
            matrix_flops=threads * CPU_FLOPS_OF_A_THREAD,
            link=Link("none", 1.0, PCIE_HOP),
            source="measured reads",
            launch_seconds=CPU_LAUNCH_SECONDS,
            step_seconds=CPU_STEP_SECONDS,
        )


def machine_of(name: str, contents: Mapping[str, Mapping[str, Any]]) -> Machine:
    """The machine of a folder of results."""
    gpu = next((device for device in DEVICES.values() if device.name == name), None)
    rates: dict[int, float] = {}
    for content in contents.values():
        found = content["settings"].get("read_bandwidth", {})
        rates |= {
            int(threads): rate for threads, rate in found.items() if int(threads) not in rates
        }
    return Machine(name, gpu, rates)


def compared(name: str, content: Mapping[str, Any], machine: Machine) -> Iterator[Compared]:
    """All figures of the results called `name` that there is a prediction for."""
    if machine.device() is None:
        return
    predict = next((p for start, p in _PARTS.items() if name.startswith(start)), None)
    for row in content["rows"] if predict is not None else ():
        yield from predict(row, content["settings"], machine)


def _layer(row: Row, settings: Mapping[str, Any], machine: Machine) -> Iterator[Compared]:
    """By our kernel, in the activations' type that the planner has, or by the 16-bit library."""
    contender = row["contender"]
    ours = contender.startswith(OURS) and not contender.endswith("fp32")
    device = machine.device(row.get("threads"))
    if "us" not in row or "n" not in row or device is None:
        return
    if not ours and contender not in PLAIN_LAYERS:
        return
    form = _format(row, ours)
    matrix = Matrix("layer", 1, row["n"], row["k"])
    seconds = matmul_seconds(spec_of(matrix, row["m"], form, device), device)
    threads = f", {row['threads']} threads" if "threads" in row else ""
    what = f"{row['n']}x{row['k']}, {row['m']} rows{threads}"
    way = form.name if ours else contender
    yield Compared(machine.name, "layer", what, way, row["us"] / 1e3, 1e3 * seconds)


def _format(about: Mapping[str, Any], ours: bool) -> WeightFormat:
    if not ours:
        return PLAIN
    bits, group = about["bits"], about["group"]
    return WeightFormat(f"int{bits}", bits, None if group == "column" else group, bits)


def _experts(row: Row, settings: Mapping[str, Any], machine: Machine) -> Iterator[Compared]:
    """Both products of a layer of experts, by ours and by PyTorch's grouped matmul."""
    ours = row["contender"].startswith(OURS)
    device = machine.device()
    if "us" not in row or device is None or row["model"] not in EXPERTS:
        return
    if not ours and row["contender"] != GROUPED_MM:
        return
    form = _format(settings, ours)
    seconds = _experts_seconds(EXPERTS[row["model"]], row["tokens"], form, device)
    what = f"{row['model']}, {row['tokens']} tokens"
    way = row["contender"] if ours else f"bf16, {GROUPED_MM}"
    yield Compared(machine.name, "experts", what, way, row["us"] / 1e3, 1e3 * seconds)


def _decoded_experts(row: Row, settings: Mapping[str, Any], machine: Machine) -> Iterator[Compared]:
    """A block of experts on a CPU, by ours and by Inductor, in bf16."""
    device = machine.device(settings.get("threads"))
    if row["dtype"] != "bf16" or device is None:
        return
    sizes = ("num_experts", "top_k", "hidden_size", "moe_intermediate_size")
    shape = ExpertShape(*(settings[size] for size in sizes))
    form = MODEL_WAYS["int4"] if row["ours"] else PLAIN
    seconds = _experts_seconds(shape, row["tokens"], form, device)
    what = f"64 experts of Qwen3, {row['tokens']} tokens, {row['form']}"
    way = form.name if row["ours"] else "inductor"
    yield Compared(machine.name, "experts", what, way, row["ms"], 1e3 * seconds)


def _experts_seconds(shape: ExpertShape, tokens: int, form: WeightFormat, device: Device) -> float:
    hit = experts_read(shape.experts, shape.top_k, tokens)
    gate_up = Matrix("up", 1, shape.intermediate, shape.hidden, True, shape.experts)
    down = Matrix("down", 1, shape.hidden, shape.intermediate, experts=shape.experts)
    specs = (spec_of(m, tokens * shape.top_k, form, device) for m in (gate_up, down))
    return sum(matmul_seconds(spec, device, hit) for spec in specs)


def _model(row: Row, settings: Mapping[str, Any], machine: Machine) -> Iterator[Compared]:
    """A step of decoding or a prefill; and the bytes of all weights that are matrices."""
    device = machine.device(row.get("threads", settings.get("threads")))
    form = None if settings.get("dtype") == "fp32" else MODEL_WAYS.get(row.get("way", ""))
    if "ms" not in row or row["model"] not in MODELS or form is None or device is None:
        return
    if row["phase"] == "generate" or MODELS[row["model"]].kind not in _PLANNED:
        return
    shape = _decoder(row["model"], row["layers"])
    load = Workload(row["batch"], row["tokens"], _ANY_CHUNK)
    speed = prefill_speed if row["phase"] == "prefill" else decode_speed
    seconds = speed(shape, Sharing(), form, load, device, Cluster()).seconds
    about = f"{row['model']}, {row['layers']} layers"
    if "extrapolated_from" in row:
        about += " (extrapolated)"
    what = f"{about}, {row['phase']} {row['tokens']}, batch {row['batch']}"
    yield Compared(machine.name, row["phase"], what, row["way"], row["ms"], 1e3 * seconds)
    if row.get("linear_bytes") and not shape.tied:  # of a tied one reports count the head alone
        held = weight_memory(shape, Sharing(), form, device) - FLOAT_BYTES * shape.vectors
        measured = row["linear_bytes"] / 1e6
        yield Compared(machine.name, "weights, MB", about, row["way"], measured, held / 1e6)


def _decoder(model: str, layers: int) -> Decoder:
    shape = MODELS[model]
    sizes = {**shape.sizes, "num_hidden_layers": layers, "model_type": shape.kind.lower()}
    return replace(decoder_of(ConfigFields(sizes, f"bench model {model}"), model), positions=None)


_PARTS = {
    "models": _model,
    "kernels": _layer,
    "experts": _experts,
    "expert-decode": _decoded_experts,
}
