"""The kernel configurations: all of them, those that fit a GPU, and the cost model's choice."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from math import ceil

import torch

from fqcompile.kernels.roofline import M, dense
from fqcompile.kernels.spec import DENSE, Config, GemmSpec, Gpu, LaunchTable, Step, TileConfig
from fqcompile.kernels.template import MOST_GATHERED, SearchMode
from fqcompile.kernels.triton.cost import (
    MAX_REGISTERS,
    as_run,
    cost,
    mean_experts_hit,
)
from fqcompile.kernels.triton.launch import GROUPED_MM_ALIGNED, has_two_sums, is_whole
from fqcompile.kernels.triton.layout import BLOCK_K, dot_width
from fqcompile.tensor.format import NORMAL

FAST_CANDIDATES = 12
# Takes the least shared memory of all, and any number of rows.
ANY_ROWS = TileConfig(16, 64, BLOCK_K, 1, 4, 3)
_TILE_M, _TILE_N = (16, 32, 64, 128), (64, 128, 256)
_WARPS, _STAGES = (4, 8), (3, 4, 5)
_ROWS_OF_A_WARP, _WEIGHTS_OF_A_THREAD = 16, 128
_MOST_SHARES = 64
_NARROW_DOT = 32  # columns
_LEAST_BLOCKS = 4  # blocks of K in one split: fewer never fill the pipeline
_MANY_ROWS = 4096
_FEW_ROWS = (2, 4, 8)
_FULL_TILES = (16, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
_MOST_DENSE_BYTES = 2 << 30  # of a dequantized stack of experts
_MANY_ROWS_OF_EACH = 1024  # rows per expert, on average


def launches(spec: GemmSpec) -> LaunchTable:
    """The heuristic: the configuration that the cost model ranks first for the spec's M.

    If M is dynamic, a table that has a step for each number of tiles: between two bounds a
    configuration's time changes little. From where dequantizing and calling cuBLAS is faster by the
    model, the last step does that.
    """
    if spec.m_range is None:
        return LaunchTable.of(_candidates(spec, spec.m, spec.m, None)[0])
    least, most = spec.m_range
    bounds = [b for b in _bounds(spec) if least <= b and (most is None or b < most)]
    begins, many = [least, *(bound + 1 for bound in bounds)], max(_many_rows(spec), least)
    spans = [*zip(begins, bounds, strict=False)]
    spans.append((many, many) if most is None else (begins[-1], most))
    best = [_candidates(spec, *span, None)[0] for span in spans]
    steps: list[Step] = [*zip([*bounds, None], best, strict=True)]
    return LaunchTable((*(a for a, b in pairwise(steps) if a[1] != b[1]), steps[-1]))


def _bounds(spec: GemmSpec) -> list[int]:
    """The bounds of the steps in M, ascending: where the rows of a weight fill tiles.

    Grouped experts fill one where it holds twice an expert's mean rows. With fewer rows than fill
    the smallest one, each row may bring one more expert, and so more programs.
    """
    if not spec.experts:
        return list(_FULL_TILES)
    many = {spec.experts * rows // 2 for rows in _FULL_TILES}
    few = {*_FEW_ROWS, *(rows for rows in _FULL_TILES if rows < min(many))} | {_TILE_M[0]}
    if spec.routing == "gathered":
        last = MOST_GATHERED * spec.experts
        few, many = {b for b in few if b < last} | {last}, {b for b in many if b > last}
    return sorted(few | many)


def _many_rows(spec: GemmSpec) -> int:
    return max(_MANY_ROWS, _MANY_ROWS_OF_EACH * spec.experts)


def offers_dense(spec: GemmSpec) -> bool:
    """Whether dequantizing and PyTorch's dense matmul is a candidate.

    For experts only where PyTorch's grouped matmul is fast: sorted bf16 rows, on Hopper or its
    successor in data centers, with rows that are multiples of 16 bytes. Elsewhere it copies the
    offsets to the host, which no capture of a CUDA graph allows. And only where the dense stack, of
    which nobody has reserved the memory, is not too large.
    """
    if not spec.experts:
        return True
    assert spec.gpu is not None, "templates refuse specs without a GPU"
    aligned = spec.k % GROUPED_MM_ALIGNED == 0 == spec.weight_rows % GROUPED_MM_ALIGNED
    fast = spec.dtype == torch.bfloat16 and 90 <= spec.gpu.capability < 110
    dense_bytes = spec.experts * spec.weight_rows * spec.k * spec.dtype.itemsize
    small = dense_bytes <= _MOST_DENSE_BYTES
    return spec.routing == "grouped" and fast and aligned and small


def candidates(
    spec: GemmSpec, m: int, mode: SearchMode, fewest: int | None = None
) -> Sequence[Config]:
    """Configurations to try, best first by the cost model; those of a bad shape come last.

    "fast" has twelve: the best one of each tile, with shares that its last program adds and without
    such, then the best of the others. "max" has all. Best is what is fastest for `m` rows; of one
    that serves `fewest` to `m` rows, what loses least to the fastest at both ends: the best for 256
    rows, four full tiles of 64, has a tile too many for 129.
    """
    least = m if fewest is None else fewest
    return _candidates(spec, least, m, FAST_CANDIDATES if mode == "fast" else None)


def _is_unshapely(spec: GemmSpec, config: Config, m: int) -> bool:
    """Whether a thread has so many weights that few programs fit, or too few to hide the overhead.

    Only tiles for few rows are judged, which should be limited by memory bandwidth. Few weights are
    right where a tile of enough would leave SMs without a program.

    Twice the weights take 128 to 255 registers, mostly more than the model counts: two or three
    programs on an SM in place of four. They need not spill: of 30 kernels none does on sm_80, 5 do
    on sm_90. Not judged, such tiles would be first in a third of the cases; simulated
    (`bench/static/simulate.py`), 51 of these are .90 times as fast on an H200, .99 on an A100.
    """
    if config is DENSE or config.BLOCK_M > _TILE_M[0] or spec.weight_rows < _TILE_N[1]:
        return False
    assert spec.gpu is not None, "templates refuse specs without a GPU"
    sums = 2 if spec.gated and has_two_sums(spec.n, config) else 1
    share = sums * config.BLOCK_N * BLOCK_K / (_WEIGHTS_OF_A_THREAD * 32 * config.num_warps)
    programs = cost(spec, config, spec.gpu, m).programs
    return share > 1 or (share < 1 and share * programs >= spec.gpu.num_sms)


@cache
def _seconds(spec: GemmSpec, m: int) -> dict[Config, float]:
    """Of every configuration that fits m rows."""
    gpu, spec = spec.gpu, as_run(spec, m)
    assert gpu is not None, "templates refuse specs without a GPU"
    seconds: dict[Config, float] = dict(_fitting(spec, gpu, m))
    # For fewer rows, writing and reading the dense weight never pays off.
    if offers_dense(spec) and (m > _TILE_M[0] or not seconds):
        seconds[DENSE] = float(dense(spec, gpu).subs(M, m))
    return seconds


@cache
def _candidates(spec: GemmSpec, fewest: int, most: int, limit: int | None) -> tuple[Config, ...]:
    fewest, most = max(1, fewest), max(1, most)  # no rows launch nothing
    form = replace(spec, m=1, m_range=None)
    few, many = _seconds(form, fewest), _seconds(form, most)
    best_of_few, best_of_many = min(few.values()), min(many.values())

    def rank(config: Config) -> tuple[bool, float, str]:
        loss = max(few[config] / best_of_few, many[config] / best_of_many)
        return all(_is_unshapely(form, config, m) for m in (fewest, most)), loss, str(config)

    ranked = tuple(sorted((config for config in many if config in few), key=rank))
    if limit is None:
        return ranked
    best_of_tile: dict[object, Config] = {}
    for config in ranked:
        best_of_tile.setdefault(_tile(config), config)
    first = list(best_of_tile.values())[:limit]
    rest = [config for config in ranked if config not in first]
    kept = {*first, *rest[: limit - len(first)]}
    return tuple(config for config in ranked if config in kept)


def _tile(config: Config) -> object:
    if config is DENSE:
        return config
    return config.BLOCK_M, config.BLOCK_N, config.num_warps, config.last_finishes


def _fitting(spec: GemmSpec, gpu: Gpu, m: int) -> Iterator[tuple[TileConfig, float]]:
    """Configurations without superfluous rows that fit into registers and shared memory, and the
    seconds that each takes."""
    blocks = -(-spec.k // BLOCK_K)
    shares = [1]
    while shares[-1] < _MOST_SHARES and blocks >= 2 * shares[-1] * _LEAST_BLOCKS:
        shares.append(2 * shares[-1])
    # The order in which a GPU sees what several programs store is known of NVIDIA's alone.
    ends = (False, True) if gpu.capability else (False,)
    widest = max(_TILE_M[0], 1 << (_rows_of_a_weight(spec, m) - 1).bit_length())
    tiles_m = [tile for tile in _TILE_M if tile <= widest]
    for tile_m, tile_n, share, last, warps, stages in product(
        tiles_m, _TILE_N, shares, ends, _WARPS, _STAGES
    ):
        if tile_n < _ROWS_OF_A_WARP * warps or (last and share == 1):
            continue  # several warps would compute the same products, or one program be the last
        sizes = (tile_m, tile_n, BLOCK_K, share, warps, stages)
        config = TileConfig(*sizes, last_finishes=last)
        if last and not is_whole(spec.n, spec.gated, config):
            continue
        if _spills(spec, gpu, config):
            continue
        needs = cost(spec, config, gpu, m)
        if needs.registers <= MAX_REGISTERS and needs.shared_bytes <= gpu.shared_bytes:
            yield config, needs.seconds


def _spills(spec: GemmSpec, gpu: Gpu, config: TileConfig) -> bool:
    """Where the model underestimates registers: mma.sync, two accumulators, 4 warps.

    Of 64 rows; or of 16, for which the compiler leaves room for four programs, with the scales of
    groups of 32 beside the numbers that normal levels take.
    """
    two_sums = spec.gated and has_two_sums(spec.n, config)
    if gpu.has_wgmma or not two_sums or config.num_warps != 4:
        return False
    many_numbers = spec.levels == NORMAL and dot_width(spec.group_size, spec.k) == _NARROW_DOT
    return config.BLOCK_M >= 64 or (config.BLOCK_M == _TILE_M[0] and many_numbers)


def least_shared_bytes(spec: GemmSpec) -> float:
    """Shared memory that a program of the smallest configuration takes, one that does not spill."""
    assert spec.gpu is not None, "templates refuse specs without a GPU"
    least = ANY_ROWS
    if _spills(spec, spec.gpu, least):
        least = replace(least, BLOCK_N=_TILE_N[1], num_warps=_WARPS[1])
    return cost(spec, least, spec.gpu, 1).shared_bytes


def _rows_of_a_weight(spec: GemmSpec, m: int) -> int:
    """The most rows of x that one weight needs in a tile: for grouped experts, twice the mean."""
    if spec.routing == "gathered":
        return 1
    return ceil(2 * m / mean_experts_hit(spec, m)) if spec.experts else m
