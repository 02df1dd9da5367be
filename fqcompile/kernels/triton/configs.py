"""The kernel configurations: all of them, those that fit a GPU, and the cost model's choice."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from math import ceil

import torch

from fqcompile.kernels.roofline import M, crossover, dense
from fqcompile.kernels.spec import DENSE, Config, GemmSpec, Gpu, LaunchTable, Step, TileConfig
from fqcompile.kernels.template import SearchMode
from fqcompile.kernels.triton.cost import (
    MAX_REGISTERS,
    cost,
    mean_experts_hit,
    steady_seconds,
)
from fqcompile.kernels.triton.launch import GROUPED_MM_ALIGNED, has_two_sums
from fqcompile.kernels.triton.layout import BLOCK_K

FAST_CANDIDATES = 12
_TILE_M, _TILE_N = (16, 32, 64, 128), (64, 128, 256)
_WARPS, _STAGES = (4, 8), (3, 4, 5)
_ROWS_OF_A_WARP, _WEIGHTS_OF_A_THREAD = 16, 128
_MOST_SHARES = 64
_LEAST_BLOCKS = 4  # blocks of K in one split: fewer never fill the pipeline
_MANY_ROWS = 4096
_FIRST_STEP = 16  # rows of the smallest tile: M up to this takes as long as M = 1
_MANY_ROWS_OF_EACH = 256  # rows per expert, on average


def launches(spec: GemmSpec) -> LaunchTable:
    """The heuristic: the configuration that the cost model ranks first for the spec's M.

    If M is dynamic, a table with three steps, or four for grouped experts. The last step begins at
    the M from which, by the model, dequantizing and calling cuBLAS is faster.
    """
    if spec.m_range is None:
        return LaunchTable.of(candidates(spec, spec.m, "fast")[0])
    least, most = spec.m_range
    end = _dense_from(spec)
    bounds = [b for b in _bounds(spec, end) if least <= b]
    steps: list[Step] = [(b, _fastest(spec, b)) for b in bounds if most is None or b < most]
    if end is None or (most is not None and most <= end):
        last = _fastest(spec, most or _many_rows(spec))
    else:
        last = DENSE
    return LaunchTable((*dict(steps).items(), (None, last)))


def _bounds(spec: GemmSpec, end: int | None) -> list[int]:
    """The bounds of the steps in M, ascending.

    Grouped experts have one more: up to it the smallest tile holds twice an expert's mean rows.
    """
    bounds = {_FIRST_STEP}
    if spec.routing == "grouped":
        bounds.add(max(_FIRST_STEP, spec.experts * _FIRST_STEP // 2))
    if end is None:
        return sorted(bounds)
    return sorted({end, *(bound for bound in bounds if bound < end)})


def _many_rows(spec: GemmSpec) -> int:
    grouped = spec.routing == "grouped"
    return max(_MANY_ROWS, _MANY_ROWS_OF_EACH * spec.experts) if grouped else _MANY_ROWS


def offers_dense(spec: GemmSpec) -> bool:
    """Whether dequantizing and PyTorch's dense matmul is a candidate.

    For experts only where PyTorch's grouped matmul is fast: sorted bf16 rows, on Hopper or later,
    with rows that are multiples of 16 bytes.
    """
    if not spec.experts:
        return True
    assert spec.gpu is not None, "templates refuse specs without a GPU"
    aligned = spec.k % GROUPED_MM_ALIGNED == 0 == spec.weight_rows % GROUPED_MM_ALIGNED
    fast = spec.dtype == torch.bfloat16 and spec.gpu.capability >= 90
    return spec.routing == "grouped" and fast and aligned


def candidates(spec: GemmSpec, m: int, mode: SearchMode) -> Sequence[Config]:
    """Configurations to try, fastest first by the cost model; those of a bad shape come last.

    "fast" has twelve: the best one of each tile, then the best of the others. "max" has all.
    """
    return _candidates(spec, m, FAST_CANDIDATES if mode == "fast" else None)


def _fastest(spec: GemmSpec, m: int) -> Config:
    return next((c for c in _candidates(spec, m, None) if c is not DENSE), DENSE)


def _is_unshapely(spec: GemmSpec, config: Config) -> bool:
    """Whether a thread has too few weights to hide the loop's overhead, or so many that it spills.

    Only tiles for few rows are judged, which should be limited by memory bandwidth.
    """
    if config is DENSE or config.BLOCK_M > _TILE_M[0] or spec.weight_rows < _TILE_N[1]:
        return False
    sums = 2 if spec.gated and has_two_sums(spec.n, config) else 1
    return sums * config.BLOCK_N * BLOCK_K != _WEIGHTS_OF_A_THREAD * 32 * config.num_warps


@cache
def _candidates(spec: GemmSpec, m: int, limit: int | None) -> tuple[Config, ...]:
    gpu, m = spec.gpu, max(1, m)
    assert gpu is not None, "templates refuse specs without a GPU"
    seconds: dict[Config, float] = {
        config: cost(spec, config, gpu, m).seconds for config in _fitting(spec, gpu, m)
    }
    # For fewer rows, writing and reading the dense weight never pays off.
    if offers_dense(spec) and (m > _FIRST_STEP or not seconds):
        seconds[DENSE] = float(dense(spec, gpu).subs(M, m))
    ranked = sorted(seconds, key=lambda c: (_is_unshapely(spec, c), seconds[c], str(c)))
    if limit is None:
        return tuple(ranked)
    best_of_tile: dict[object, Config] = {}
    for config in ranked:
        best_of_tile.setdefault(_tile(config), config)
    first = list(best_of_tile.values())[:limit]
    rest = [config for config in ranked if config not in first]
    kept = {*first, *rest[: limit - len(first)]}
    return tuple(config for config in ranked if config in kept)


def _tile(config: Config) -> object:
    return config if config is DENSE else (config.BLOCK_M, config.BLOCK_N, config.num_warps)


def _fitting(spec: GemmSpec, gpu: Gpu, m: int) -> Iterator[TileConfig]:
    """Configurations without superfluous rows that fit into registers and shared memory."""
    blocks = -(-spec.k // BLOCK_K)
    shares = [1]
    while shares[-1] < _MOST_SHARES and blocks >= 2 * shares[-1] * _LEAST_BLOCKS:
        shares.append(2 * shares[-1])
    widest = max(_TILE_M[0], 1 << (_rows_of_a_weight(spec, m) - 1).bit_length())
    tiles_m = [tile for tile in _TILE_M if tile <= widest]
    for tile_m, tile_n, share, warps, stages in product(tiles_m, _TILE_N, shares, _WARPS, _STAGES):
        config = TileConfig(tile_m, tile_n, BLOCK_K, share, warps, stages)
        if tile_n < _ROWS_OF_A_WARP * warps:
            continue  # several warps would compute the same products
        if spec.experts and _spills(spec, gpu, config):
            continue
        needs = cost(spec, config, gpu, m)
        if needs.registers <= MAX_REGISTERS and needs.shared_bytes <= gpu.shared_bytes:
            yield config


def _spills(spec: GemmSpec, gpu: Gpu, config: TileConfig) -> bool:
    """Where the model underestimates registers: mma.sync, two accumulators, 64 rows, 4 warps."""
    two_sums = spec.gated and has_two_sums(spec.n, config)
    return gpu.capability != 90 and two_sums and config.BLOCK_M >= 64 and config.num_warps == 4


def _rows_of_a_weight(spec: GemmSpec, m: int) -> int:
    """The most rows of x that one weight needs in a tile: for grouped experts, twice the mean."""
    if spec.routing == "gathered":
        return 1
    return ceil(2 * m / mean_experts_hit(spec, m)) if spec.experts else m


@cache
def _dense_from(spec: GemmSpec) -> int | None:
    """The largest M at which the best tile is as fast as `dense`; None if it is at every M."""
    gpu = spec.gpu
    assert gpu is not None, "templates refuse specs without a GPU"
    if not offers_dense(spec):
        return None
    ranked = [
        c for c in _candidates(spec, _many_rows(spec), None) if c is not DENSE and c.SPLIT_K == 1
    ]
    best = {c.BLOCK_M: c for c in reversed(ranked)}.values()  # the fastest of each tile
    ends = [crossover(steady_seconds(spec, c, gpu), dense(spec, gpu)) for c in best]
    last = max(ends, default=0.0)
    return None if last == float("inf") else max(_FIRST_STEP, int(last))
