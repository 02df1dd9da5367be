"""The cost model of a GEMM configuration: bytes, issue slots, matrix products and waves.

Each resource of an SM has a time; the estimate is the longest, plus a small share of the others.
Instruction and register counts are fitted to the machine code of some 440 configurations (as read
by `python -m bench static`, Triton 3.7). Instructions are within 11 % for tiles of 16 rows, and
within 16 % for 9 of 10 of all; registers are within 25 % for 9 of 10. Nothing was fitted to a
measured time. Of 273 random layers, rows and configurations, 253 take within 25 % of what the
simulation of `bench/static/simulate.py` makes of them, with a median of 1.00.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from sympy import Max, Min, Symbol, ceiling, lambdify

from fqcompile.kernels.roofline import LAUNCH_SECONDS, M
from fqcompile.kernels.spec import MATRIX_SHARE, GemmSpec, Gpu, TileConfig
from fqcompile.kernels.template import MOST_GATHERED
from fqcompile.kernels.triton.launch import has_two_sums
from fqcompile.kernels.triton.layout import BLOCK_K, blocks_per_group, dot_width
from fqcompile.tensor.format import NORMAL

MAX_REGISTERS = 255
_REGISTERS, _WARPS = 65536, 64  # per SM
_LATENCY = 8e-7  # seconds of a load from device memory
# L2 bandwidth relative to device memory's, for data that several programs read: gpu-benches
# (RRZE-HPC, gpu-l2-cache) has 9.7 TB/s of an H200, 2.26 times, and 5.4 of an A100, 3 times.
L2_OVER_DRAM = 2.25
# In each block of K a program waits for barriers, shared memory and the last product; and for the
# scales of groups, of which the load from device memory is not pipelined: 3 parts of 5 of what it
# takes are left to wait for. Fitted to what `bench/static/simulate.py` makes of 40 loops.
_WAIT_SECONDS = 8e-8
_SCALE_SECONDS = 2.1e-7
_AROUND_CYCLES = 2600  # before and after the loop
# Instructions of a thread in a block of K: per weight, per accumulator to scale, per dot, per 16
# rows of x, per mma.sync (one wgmma serves four warps and is far larger), and all others.
_WGMMA = (1.49, 0.87, 13.5, 7.2, 0.0, 48.0)
_MMA = (1.42, 1.02, 1.2, 33.8, 0.94, 28.9)
_LOOK_UP = 1.0  # additional instructions per weight with normal levels
_SEARCH_SECONDS = 1e-6  # of a block for its expert: two loads one after the other, and a scan
_NOT_TOGETHER = 0.3  # of issue slots and products the part that does not overlap with the other
_NOT_HIDDEN = 0.1  # the part of each resource's time that does not overlap with the longest
_SHARE_BYTES = 8  # per fp32 element of a split-K partial sum: written once, read once
# Of the last program of a tile: until its share is in L2, the atomic, and the first load after it.
# Three trips to L2 one after the other; the first, a fence, takes as long as the other two.
_ARRIVAL_SECONDS = 1e-6


@dataclass(frozen=True)
class Model:
    """The formulas; fields are numbers or symbols.

    one_scale, normal, wgmma: 1 or 0. dots: dots per block of K. pair: 2 if gate and up have an
    accumulator each, else 1. grouped: 1 if each program looks for its expert first, else 0. last: 1
    if the last program of a tile adds its shares, 0 if a second kernel does.
    """

    rows: Any
    n: Any
    k: Any
    bits: Any
    one_scale: Any
    normal: Any
    dots: Any
    tile_m: Any
    tile_n: Any
    split: Any
    warps: Any
    stages: Any
    pair: Any
    wgmma: Any
    grouped: Any
    last: Any
    sms: Any
    clock: Any
    bandwidth: Any
    flops: Any
    shared: Any

    @property
    def _weights(self) -> Any:
        """Weights per thread in one block of K."""
        return self.pair * self.tile_n * BLOCK_K / (32 * self.warps)

    @property
    def _sums(self) -> Any:
        return self.pair * self.tile_m * self.tile_n / (32 * self.warps)

    @property
    def _block_bytes(self) -> Any:
        return self.pair * self.tile_n * (BLOCK_K * self.bits / 8 + 2 * self.dots)

    @property
    def _x_bytes(self) -> Any:
        return self.tile_m * BLOCK_K * 2

    @property
    def registers(self) -> Any:
        """Per thread: a fixed number, the accumulators, and products that wait for their scales."""
        grouped = 1 - self.one_scale
        return 70 + 1.83 * self._sums + grouped * (0.51 * self._sums + 0.18 * self._weights)

    @property
    def shared_bytes(self) -> Any:
        """Per program: pipelined packed weights and x; wgmma keeps x for one more stage."""
        stages = self.stages - 1
        return stages * self._block_bytes + (stages + self.wgmma) * self._x_bytes

    @property
    def instructions(self) -> Any:
        """Instructions per thread in one block of K."""
        scaled = self._sums * self.dots * (1 - self.one_scale)
        products = self._sums * BLOCK_K / 32
        counts = (self._weights, scaled, self.dots, self.tile_m / 16, products, 1)
        pairs = zip(_WGMMA, _MMA, counts, strict=True)
        uniform = sum((w * self.wgmma + m * (1 - self.wgmma)) * count for w, m, count in pairs)
        return uniform + _LOOK_UP * self.normal * self._weights

    @property
    def resident(self) -> Any:
        """Programs that are resident on an SM at the same time."""
        by_registers = _REGISTERS / (32 * self.warps * Min(self.registers, MAX_REGISTERS))
        by_shared = self.shared / (self.shared_bytes + 1024)
        return Min(by_registers, by_shared, _WARPS / self.warps)

    @property
    def around(self) -> Any:
        """Seconds of a program before and after its loop."""
        return _AROUND_CYCLES / self.clock + self.grouped * _SEARCH_SECONDS

    def programs(self, tiles_m: Any) -> Any:
        """Programs of the kernel with `tiles_m` tiles of rows."""
        return tiles_m * ceiling(self.rows / (self.pair * self.tile_n)) * self.split

    def seconds(self, tiles_m: Any, hit: Any) -> Any:
        """The time of one call with M rows in `tiles_m` tiles, which read `hit` weight matrices."""
        per_program = ceiling(ceiling(self.k / BLOCK_K) / self.split)
        programs = self.programs(tiles_m)
        # The SM with the most programs is the last to end.
        per_sm = ceiling(programs / self.sms)
        issue = self.instructions * self.warps / 4 / self.clock
        tile = self.pair * self.tile_m * self.tile_n
        matrix = 2 * tile * BLOCK_K * self.sms / self.flops
        # A warp does one thing after the other, and 4 to a program are one on each scheduler.
        product = MATRIX_SHARE * matrix
        alone = Max(issue, product) + Min(issue, product) * 4 / self.warps
        alone += _WAIT_SECONDS + (1 - self.one_scale) * _SCALE_SECONDS
        rounds = ceiling(per_sm / self.resident)
        together = Max(issue, matrix) + _NOT_TOGETHER * Min(issue, matrix)
        busy = per_program * Max(per_sm * together, rounds * alone)
        in_flight = Min(programs, self.sms * self.resident) * (self.stages - 1) * self._block_bytes
        rate = Min(self.bandwidth, in_flight / _LATENCY)
        memory = (hit * self.rows * self.k * self.bits / 8 + M * 2 * (self.k + self.n)) / rate
        read = programs * per_program * (self._block_bytes + self._x_bytes)
        from_cache = read / (L2_OVER_DRAM * self.bandwidth)
        times = (busy, memory, from_cache)
        hidden = (1 - _NOT_HIDDEN) * Max(*times) + _NOT_HIDDEN * sum(times)
        # A launch takes until its first programs are in their loops, and from the end of the last.
        # While others begin and end, those that are resident with them go on.
        gaps = (per_sm - 1) * self.around / Max(1, self.resident)
        launch = LAUNCH_SECONDS + self.grouped * _SEARCH_SECONDS
        return launch + hidden + gaps + self._finish(tiles_m)

    def _finish(self, tiles_m: Any) -> Any:
        """Seconds until the shares are added: by a kernel more, or by the last program of each tile
        alone, as fast as one SM reads from L2."""
        shares = self.split * M * self.rows * _SHARE_BYTES
        kernel = LAUNCH_SECONDS + shares / self.bandwidth
        tile = self.split * self.pair * self.tile_n * M / tiles_m * _SHARE_BYTES / 2
        cache = L2_OVER_DRAM * self.bandwidth
        last = _ARRIVAL_SECONDS + shares / 2 / cache + tile / (cache / self.sms)
        return Min(self.split - 1, 1) * (self.last * last + (1 - self.last) * kernel)


def model_of(spec: GemmSpec, config: TileConfig, gpu: Gpu) -> Model:
    """The formulas with this configuration's numbers in place of the symbols."""
    return Model(
        rows=spec.weight_rows,
        n=spec.n,
        k=spec.k,
        bits=spec.bits,
        one_scale=int(blocks_per_group(spec.group_size, spec.k) == 0),
        normal=int(spec.levels == NORMAL),
        dots=BLOCK_K // dot_width(spec.group_size, spec.k),
        tile_m=config.BLOCK_M,
        tile_n=config.BLOCK_N,
        split=config.SPLIT_K,
        warps=config.num_warps,
        stages=config.num_stages,
        pair=2 if spec.gated and has_two_sums(spec.n, config) else 1,
        wgmma=int(gpu.has_wgmma),
        grouped=int(spec.routing == "grouped"),
        last=int(config.last_finishes),
        sms=gpu.num_sms,
        clock=gpu.clock_hz,
        bandwidth=gpu.bandwidth,
        flops=gpu.matrix_flops,
        shared=gpu.shared_bytes,
    )


@dataclass(frozen=True)
class Cost:
    """The model's figures for one configuration at one M; `instructions` are per weight."""

    seconds: float
    registers: float
    shared_bytes: float
    instructions: float
    programs: float


@cache
def _evaluate() -> Callable[..., tuple[float, ...]]:
    symbols = [Symbol(field.name, positive=True) for field in fields(Model)]
    model = Model(*symbols)
    tiles_m, hit = (Symbol(name, positive=True) for name in ("tiles_m", "hit"))
    seconds = model.seconds(tiles_m, hit)
    per_weight = model.instructions / model._weights
    wanted = (
        seconds, model.registers, model.shared_bytes, per_weight, model.programs(tiles_m)
    )  # fmt: skip
    function: Callable[..., tuple[float, ...]]
    function = lambdify((M, tiles_m, hit, *symbols), wanted, "math", cse=True)
    return function


def mean_experts_hit(spec: GemmSpec, m: int) -> float:
    """`roofline.experts_hit` as a number."""
    return spec.experts * (1 - (1 - 1 / spec.experts) ** m) if spec.experts else 1.0


def _tiles_of_experts(m: Any, hit: Any, block_m: int) -> Any:
    """Tiles of experts with many rows each: on average, the last tile of an expert is half full."""
    return m / block_m + hit * (block_m - 1) / (2 * block_m)


def _tiles(spec: GemmSpec, config: TileConfig, m: int, hit: float) -> float:
    """The number of tiles of rows, if `hit` experts have rows."""
    if not spec.experts:
        return -(-m // config.BLOCK_M)
    if spec.routing == "gathered":
        return m
    tiles: float = max(hit, _tiles_of_experts(m, hit, config.BLOCK_M))
    return tiles


def as_run(spec: GemmSpec, m: int) -> GemmSpec:
    """The spec with the routing that m rows run with: many rows with ids are sorted by expert."""
    many = spec.routing == "gathered" and m > MOST_GATHERED * spec.experts
    return replace(spec, routing="grouped") if many else spec


def cost(spec: GemmSpec, config: TileConfig, gpu: Gpu, m: int, hit: float | None = None) -> Cost:
    """The model's figures for m rows; `hit`: the number of experts that they read, if known.

    Sorting rows is not counted.
    """
    spec = as_run(spec, m)
    hit = mean_experts_hit(spec, m) if hit is None else hit
    tiles = _tiles(spec, config, m, hit)
    values = vars(model_of(spec, config, gpu)).values()  # not astuple, which copies each
    return Cost(*_evaluate()(m, tiles, hit, *values))
