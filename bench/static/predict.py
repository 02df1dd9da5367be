"""How long layers would take on GPUs that are not here: predicted twice, and what others published.

    python -m bench static --predict [--arch 90]

"simulated" is `static.simulate` on the machine code of what the cost model chooses, times the waves
of programs, plus a launch; "model" is `cost`. Neither was held against a GPU.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path

import torch

from bench.core.results import Row
from bench.core.shapes import EXPERTS, Matrix, RoutingName, expert_spec
from bench.static.expert_launches import routed
from bench.static.launches import GPUS, Case, gemm
from bench.static.simulate import Program
from fqcompile.kernels.roofline import LAUNCH_SECONDS, M, dense, ideal_seconds
from fqcompile.kernels.spec import DENSE, GemmSpec, Gpu, TileConfig
from fqcompile.kernels.triton.configs import candidates
from fqcompile.kernels.triton.cost import cost, mean_experts_hit
from fqcompile.kernels.triton.layout import BLOCK_K

# gpu-benches (see `simulate`), gpu-l2-cache: bytes/s of data of several SMs, of A100 and H200.
L2_BANDWIDTH = {80: 5.4e12, 90: 9.7e12}
# gpu-small-kernels, *_graph: a call of the smallest kernel; without its read from L2, 206 and 281
# cycles, a call before and after its programs.
SMALLEST_KERNEL = {80: 1.34e-6, 90: 1.26e-6}
LAUNCHED = {arch: seconds - 2e-7 for arch, seconds in SMALLEST_KERNEL.items()}
# Until a program's share of a tile is seen by another: a write, a fence, an atomic and a read go
# through L2 one after the other. An estimate.
HAND_OVER = 1e-6
PER_COLUMN = 1 << 20


@dataclass(frozen=True)
class Published:
    """What others measured: microseconds, or times as fast as 16 bits (`ratio`)."""

    who: str
    value: float
    source: str
    ratio: bool = False

    def __str__(self) -> str:
        value = f"{self.value:.2f} x 16 bits" if self.ratio else f"{self.value:.1f} µs"
        return f"{self.who} {value} ({self.source})"


@dataclass(frozen=True)
class Layer:
    """N x K, or a model's experts, with M rows (tokens of experts), on sm_`arch`."""

    arch: int
    n: int
    k: int
    m: int
    bits: int = 4
    group_size: int = 128
    experts: tuple[str, Matrix, RoutingName] | None = None

    @property
    def spec(self) -> GemmSpec:
        """bf16, fp16 scales, no epilogue but that of experts."""
        gpu, form = GPUS[self.arch], (self.bits, self.group_size)
        if self.experts:
            model, matrix, routing = self.experts
            shape = EXPERTS[model]
            made = expert_spec(shape, matrix, routing, self.m, *form, torch.bfloat16, gpu)
            return replace(made, scale_dtype=torch.float16)
        return plain_layer(self.n, self.k, self.m, gpu, *form)

    @property
    def name(self) -> str:
        """Such as "8192 x 8192 w4 g128"."""
        group = "column" if self.group_size == PER_COLUMN else f"g{self.group_size}"
        what = " ".join(self.experts) if self.experts else f"{self.n} x {self.k}"
        return f"{what} w{self.bits} {group}"


def plain_layer(
    n: int, k: int, m: int, gpu: Gpu, bits: int = 4, group_size: int = 128, gated: bool = False
) -> GemmSpec:
    return GemmSpec(
        m, n, k, bits, min(group_size, k), torch.bfloat16, torch.float16, "cuda",
        "silu" if gated else "none", gated, gpu=gpu,
    )  # fmt: skip


def _layers() -> Iterator[Layer]:
    for arch in GPUS:
        for n in (4096, 8192):
            yield from (Layer(arch, n, n, m) for m in (1, 16, 64, 256))
        yield from (Layer(arch, 8192, 8192, m, 8, PER_COLUMN) for m in (1, 16))
        for model in EXPERTS:
            yield Layer(arch, 0, 0, 1, experts=(model, "gate_up", "gathered"))
            yield Layer(arch, 0, 0, 16, experts=(model, "down", "grouped"))
    yield from (Layer(90, 8192, 8192, m, 4, PER_COLUMN) for m in (1, 16))
    yield from (Layer(90, n, k, 1) for n, k in ((8192, 16384), (7168, 20480)))
    for n, k in ((1536, 7168), (5120, 2048)):
        yield from (Layer(90, n, k, m) for m in (64, 128, 256))


LAYERS = tuple(_layers())


def _published() -> dict[Layer, list[Published]]:
    """vllm#34556 has TFLOP/s; gemlite's charts are of groups of 128 against fp16, with launches."""
    found = defaultdict[Layer, list[Published]](list)
    for row in json.loads(Path(__file__).with_name("published.json").read_text()):
        layer = Layer(*(row.pop(key) for key in ("arch", "n", "k", "m", "bits", "group_size")))
        found[layer].append(Published(**row))
    return found


PUBLISHED = _published()


def _case(spec: GemmSpec, config: TileConfig) -> Case:
    return routed(spec, config) if spec.experts else gemm(spec, config)


@cache
def program_of(spec: GemmSpec, config: TileConfig) -> Program:
    return Program.of(_case(spec, config).read())


def simulated(spec: GemmSpec, config: TileConfig) -> float:
    """Seconds of a call: launch, waves of programs, and the sum of shares where K is split."""
    gpu = gpu_of_layer(spec)
    programs = ceil(cost(spec, config, gpu, spec.m).programs)
    iterations = ceil(ceil(spec.k / BLOCK_K) / config.SPLIT_K)
    seconds = LAUNCHED[gpu.capability] + waves(spec, config, programs, iterations)
    return seconds + (_finished(spec, config) if config.SPLIT_K > 1 else 0)


def _finished(spec: GemmSpec, config: TileConfig) -> float:
    """Seconds until the shares are added: by a kernel more, or each tile by its last program, for
    which an SM has its part of L2's bandwidth."""
    gpu, arch = gpu_of_layer(spec), gpu_of_layer(spec).capability
    shares = config.SPLIT_K * spec.m * spec.weight_rows * 4
    if not config.last_finishes:
        return SMALLEST_KERNEL[arch] + 2 * shares / L2_BANDWIDTH[arch]
    columns = _case(spec, config).weights / BLOCK_K
    tile = config.SPLIT_K * columns * _rows_of_x(spec, config) * 4
    return HAND_OVER + (shares + gpu.num_sms * tile) / L2_BANDWIDTH[arch]


def _rows_of_x(spec: GemmSpec, config: TileConfig) -> int:
    """Of a program."""
    return 1 if spec.routing == "gathered" else min(config.BLOCK_M, spec.m)


def gpu_of_layer(spec: GemmSpec) -> Gpu:
    assert spec.gpu is not None, "a layer of a GPU"
    return spec.gpu


@dataclass(frozen=True)
class Traffic:
    """Bytes of a program's iteration: copied by the machine code, read from L2, and from memory."""

    copied: float
    from_l2: float
    from_memory: float


def _traffic(spec: GemmSpec, config: TileConfig, iterations: int) -> Traffic:
    codes, row = _case(spec, config).weights * spec.bits / 8, BLOCK_K * 2
    from_l2 = codes + _rows_of_x(spec, config) * row
    weights = mean_experts_hit(spec, spec.m) * spec.weight_rows * spec.k * spec.bits / 8
    return Traffic(codes + config.BLOCK_M * row, from_l2, weights / iterations)


def waves(spec: GemmSpec, config: TileConfig, programs: int, iterations: int) -> float:
    """Seconds of the SM with the most programs, which hide each other's begin and end."""
    gpu, program = gpu_of_layer(spec), program_of(spec, config)
    traffic = _traffic(spec, config, programs * iterations)
    cycles, left, first = 0.0, programs, True
    while left > 0:
        active = min(left, gpu.num_sms * program.resident)
        here = ceil(active / gpu.num_sms)
        # An SM with more programs asks for more, and gets more of the memory's bandwidth.
        memory = gpu.bandwidth * here / active / gpu.clock_hz
        l2 = L2_BANDWIDTH[program.arch] / gpu.num_sms / gpu.clock_hz
        per_byte = max(traffic.from_memory / memory, traffic.from_l2 / l2) / traffic.copied
        cycles += program.cycles(here, iterations, per_byte)
        cycles -= 0 if first else program.overhead(here, per_byte) * (1 - 1 / here)
        left, first = left - active, False
    return cycles / gpu.clock_hz


def predicted(layer: Layer) -> Row:
    """A row: microseconds, and what others published."""
    spec = layer.spec
    gpu, config = GPUS[layer.arch], candidates(spec, spec.m, "max")[0]
    row: Row = {"layer": layer.name, "gpu": gpu.name, "m": layer.m, "config": str(config)}
    row["ideal"] = 1e6 * ideal_seconds(spec, spec.m)
    if config is DENSE:
        row["model"] = 1e6 * float(dense(spec, gpu).subs(M, spec.m))
    else:
        row["model"] = 1e6 * cost(spec, config, gpu, spec.m).seconds
        row["simulated"] = 1e6 * simulated(spec, config)
    # Of cuBLAS at best: bytes and products at the rates of a copy and of a large product.
    least = ideal_seconds(replace(spec, bits=16), spec.m)
    row["sixteen_bits"] = 1e6 * (least + LAUNCH_SECONDS)
    row["published"] = [str(one) for one in PUBLISHED.get(layer, ())]
    return row
