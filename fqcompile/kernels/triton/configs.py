"""Which configurations there are, which of them fit a GPU, and which one the cost model picks."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product

from fqcompile.kernels.gpu import Gpu
from fqcompile.kernels.launch_table import DENSE, Config, LaunchTable, Step
from fqcompile.kernels.roofline import M, crossover, dense
from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import SearchMode
from fqcompile.kernels.tile_config import TileConfig
from fqcompile.kernels.triton.cost import MAX_REGISTERS, cost, steady_seconds
from fqcompile.kernels.triton.launch import has_two_sums
from fqcompile.kernels.triton.layout import BLOCK_K

FAST_CANDIDATES = 12
_TILE_M, _TILE_N = (16, 32, 64, 128), (64, 128, 256)
_WARPS, _STAGES = (4, 8), (3, 4, 5)
_ROWS_OF_A_WARP, _WEIGHTS_OF_A_THREAD = 16, 128
_MOST_SHARES = 64
_LEAST_BLOCKS = 4  # of K in a share: fewer never fill the pipeline
_MANY_ROWS = 4096
_FIRST_STEP = 16  # rows of the smallest tile: up to here the time is that of one row


def launches(spec: GemmSpec) -> LaunchTable:
    """The closed form: the model's fastest for the spec's rows; where they are open, three steps.

    The last step begins where dequantising and cuBLAS become faster, as the model solves it.
    """
    if spec.m_range is None:
        return LaunchTable.of(candidates(spec, spec.m, "fast")[0])
    least, most = spec.m_range
    end = _dense_from(spec)
    bounds = [b for b in (_FIRST_STEP, end) if b is not None and least <= b]
    steps: list[Step] = [(b, _fastest(spec, b)) for b in bounds if most is None or b < most]
    if end is None or (most is not None and most <= end):
        last = _fastest(spec, most or _MANY_ROWS)
    else:
        last = DENSE
    return LaunchTable((*dict(steps).items(), (None, last)))


def candidates(spec: GemmSpec, m: int, mode: SearchMode) -> Sequence[Config]:
    """Fastest first by the model, but those of an unfit shape last.

    For "fast" the best of each tile, then the others, 12 in all.
    """
    return _candidates(spec, m, FAST_CANDIDATES if mode == "fast" else None)


def _fastest(spec: GemmSpec, m: int) -> Config:
    return next((c for c in _candidates(spec, m, None) if c is not DENSE), DENSE)


def _is_unshapely(spec: GemmSpec, config: Config) -> bool:
    """Whether a thread's weights are so few that the loop's fixed cost shows, or so many that it
    spills; asked of tiles for few rows, where memory is to be the limit."""
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
    if (
        m > _FIRST_STEP or not seconds
    ):  # below, to write and read the dense weight is never worth it
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
    """Those that waste no rows, and fit the registers and the shared memory."""
    blocks = -(-spec.k // BLOCK_K)
    shares = [1]
    while shares[-1] < _MOST_SHARES and blocks >= 2 * shares[-1] * _LEAST_BLOCKS:
        shares.append(2 * shares[-1])
    widest = max(_TILE_M[0], 1 << (m - 1).bit_length())
    tiles_m = [tile for tile in _TILE_M if tile <= widest]
    for tile_m, tile_n, share, warps, stages in product(tiles_m, _TILE_N, shares, _WARPS, _STAGES):
        config = TileConfig(tile_m, tile_n, BLOCK_K, share, warps, stages)
        if tile_n < _ROWS_OF_A_WARP * warps:
            continue  # warps would repeat each other's products
        needs = cost(spec, config, gpu, m)
        if needs.registers <= MAX_REGISTERS and needs.shared_bytes <= gpu.shared_bytes:
            yield config


@cache
def _dense_from(spec: GemmSpec) -> int | None:
    """The largest M at which the best of the tiles is as fast as `dense`; None: at any."""
    gpu = spec.gpu
    assert gpu is not None, "templates refuse specs without a GPU"
    ranked = [c for c in _candidates(spec, _MANY_ROWS, None) if c is not DENSE and c.SPLIT_K == 1]
    best = {c.BLOCK_M: c for c in reversed(ranked)}.values()  # of each tile the fastest
    ends = [crossover(steady_seconds(spec, c, gpu), dense(spec, gpu)) for c in best]
    last = max(ends, default=0.0)
    return None if last == float("inf") else max(_FIRST_STEP, int(last))
