"""What stream-K would gain over the best of today's tiles, by the cost model and by simulation.

    python -m bench static --stream-k [--arch 90]

As many programs as the SMs hold, each with the same number of blocks of K, over the ends of tiles:
no SM waits for another. The programs of a tile add their parts as those of a split K do, where the
last one does it; that is what it is compared with.
"""

from collections.abc import Iterator
from math import ceil

from bench.core.results import Row
from bench.core.shapes import SERVED
from bench.static.launches import GPUS
from bench.static.predict import (
    L2_BANDWIDTH,
    LAUNCHED,
    SMALLEST_KERNEL,
    gpu_of_layer,
    plain_layer,
    resident,
    simulated,
    waves,
)
from fqcompile.kernels.roofline import LAUNCH_SECONDS, M, dense, ideal_seconds
from fqcompile.kernels.spec import DENSE, Config, GemmSpec, TileConfig
from fqcompile.kernels.triton.configs import candidates
from fqcompile.kernels.triton.cost import cost
from fqcompile.kernels.triton.layout import BLOCK_K

# Until a program's part of a tile is seen by another: a write, a fence, an atomic and a read go
# through L2 one after the other. An estimate.
_HAND_OVER = 1e-6
STREAMED = (64, 96, 128, 192, 256)  # rows
SIMULATED = (64, 128)  # of them, those that are also simulated: a second each


def streamed(arch: int) -> Iterator[Row]:
    """For each layer and number of rows the best configuration, and the best with stream-K."""
    gpu = GPUS[arch]
    for model, layers in SERVED.items():
        for n, k, gated in layers:
            for m in STREAMED:
                spec = plain_layer(n, k, m, gpu, gated=gated)
                name = f"{model} {n} x {k}{' gated' if gated else ''}"
                yield {"layer": name, "gpu": gpu.name, "m": m} | _stream_k(spec)


def _stream_k(spec: GemmSpec) -> Row:
    tiles = [c for c in candidates(spec, spec.m, "max") if c is not DENSE]
    times: dict[Config, float] = {c: _with_last_program(spec, c) for c in tiles}
    times[DENSE] = float(dense(spec, gpu_of_layer(spec)).subs(M, spec.m))
    best = min(times, key=lambda c: times[c])
    streams = {c: _balanced(spec, c) for c in tiles if c.SPLIT_K == 1}
    stream = min(streams, key=lambda c: streams[c])
    row: Row = {"config": str(best), "model": 1e6 * times[best], "stream_config": str(stream)}
    row |= {"stream": 1e6 * streams[stream], "gain": 1 - streams[stream] / times[best]}
    if best is not DENSE and spec.m in SIMULATED:
        now = simulated(spec, best) + _saved(
            spec, best, SMALLEST_KERNEL[gpu_of_layer(spec).capability]
        )
        row["simulated_gain"] = 1 - _balanced_simulated(spec, stream) / now
    return row


def _saved(spec: GemmSpec, config: TileConfig, kernel: float) -> float:
    """Seconds, negative, if the last program of a tile adds the shares and no kernel does."""
    return _HAND_OVER - kernel if config.SPLIT_K > 1 else 0.0


def _with_last_program(spec: GemmSpec, config: TileConfig) -> float:
    """The cost model's seconds, with shares that stay in L2 and no second kernel."""
    gpu = gpu_of_layer(spec)
    seconds = cost(spec, config, gpu, spec.m).seconds + _saved(spec, config, LAUNCH_SECONDS)
    shares = config.SPLIT_K * spec.m * spec.weight_rows * 8 if config.SPLIT_K > 1 else 0
    return seconds - shares / gpu.bandwidth + shares / L2_BANDWIDTH[gpu.capability]


def _balanced(spec: GemmSpec, config: TileConfig) -> float:
    """The cost model's seconds if no SM waited for another."""
    gpu = gpu_of_layer(spec)
    figures = cost(spec, config, gpu, spec.m)
    waves = figures.programs / gpu.num_sms
    busy = (figures.seconds - LAUNCH_SECONDS) * waves / ceil(waves)
    return max(busy, ideal_seconds(spec, spec.m)) + LAUNCH_SECONDS + _parts(spec, config, 2)


def _parts(spec: GemmSpec, config: TileConfig, held: int) -> float:
    """Seconds to write and read a part of a tile for each program."""
    gpu = gpu_of_layer(spec)
    parts = gpu.num_sms * held * config.BLOCK_M * config.BLOCK_N * 8
    return _HAND_OVER + parts / L2_BANDWIDTH[gpu.capability]


def _balanced_simulated(spec: GemmSpec, config: TileConfig) -> float:
    gpu, held = gpu_of_layer(spec), resident(spec, config)
    blocks = cost(spec, config, gpu, spec.m).programs * ceil(spec.k / BLOCK_K)
    programs = gpu.num_sms * held
    seconds = waves(spec, config, programs, ceil(blocks / programs))
    return LAUNCHED[gpu.capability] + seconds + _parts(spec, config, held)
