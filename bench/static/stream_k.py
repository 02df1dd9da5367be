"""What stream-K would gain over the best of today's tiles, by the cost model and by simulation.

    python -m bench static --stream-k [--arch 90]

As many programs as the SMs hold, each with the same number of blocks of K, over the ends of tiles:
no SM waits for another. The programs of a tile add their parts as those of a split K do, where the
last one does it; that is what it is compared with.
"""

from collections.abc import Iterator
from math import ceil
from typing import Any

from sympy import Max, Rational

from bench.core.results import Row
from bench.core.shapes import SERVED
from bench.static.launches import GPUS
from bench.static.predict import (
    HAND_OVER,
    L2_BANDWIDTH,
    LAUNCHED,
    gpu_of_layer,
    plain_layer,
    program_of,
    simulated,
    waves,
)
from fqcompile.kernels.roofline import M, dense
from fqcompile.kernels.spec import DENSE, Config, GemmSpec, TileConfig
from fqcompile.kernels.triton.configs import candidates
from fqcompile.kernels.triton.cost import L2_OVER_DRAM, Model, cost, model_of
from fqcompile.kernels.triton.layout import BLOCK_K

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
    gpu = gpu_of_layer(spec)
    times: dict[Config, float] = {c: cost(spec, c, gpu, spec.m).seconds for c in tiles}
    times[DENSE] = float(dense(spec, gpu).subs(M, spec.m))
    best = min(times, key=lambda c: times[c])
    streams = {c: _balanced(spec, c) for c in tiles if c.SPLIT_K == 1}
    stream = min(streams, key=lambda c: streams[c])
    row: Row = {"config": str(best), "model": 1e6 * times[best], "stream_config": str(stream)}
    row |= {"stream": 1e6 * streams[stream], "gain": 1 - streams[stream] / times[best]}
    if best is not DENSE and spec.m in SIMULATED:
        row["simulated_gain"] = 1 - _balanced_simulated(spec, stream) / simulated(spec, best)
    return row


class _Streamed(Model):
    """The cost model of a split of K by any fraction, which gives each SM as much as the others.

    The last program of a tile reads the parts of all that meet there, and a program that goes on in
    another tile begins anew.
    """

    def _finish(self, tiles_m: Any) -> Any:
        programs, tile = self.programs(tiles_m), self.pair * self.tile_m * self.tile_n * 4
        parts = programs + self.sms * (self.split + 1)
        again = programs / self.split / self.sms * self.around / Max(1, self.resident)
        return HAND_OVER + parts * tile / (L2_OVER_DRAM * self.bandwidth) + again


def _balanced(spec: GemmSpec, config: TileConfig) -> float:
    """The cost model's seconds."""
    model = model_of(spec, config, gpu_of_layer(spec))
    tiles_m = ceil(spec.m / config.BLOCK_M)
    programs = model.sms * max(1, int(model.resident))
    split = Rational(programs, int(model.programs(tiles_m)))
    streamed = _Streamed(**vars(model) | {"split": split})
    return float(streamed.seconds(tiles_m, 1).subs(M, spec.m))


def _balanced_simulated(spec: GemmSpec, config: TileConfig) -> float:
    """The same of the machine code; programs that begin anew take what others begin with."""
    gpu, program = gpu_of_layer(spec), program_of(spec, config)
    held, tiles = program.resident, cost(spec, config, gpu, spec.m).programs
    programs = gpu.num_sms * held
    seconds = waves(spec, config, programs, ceil(tiles * ceil(spec.k / BLOCK_K) / programs))
    again = tiles / gpu.num_sms * program.overhead(held, per_byte=1e-9) / held / gpu.clock_hz
    parts = programs + gpu.num_sms * (programs / tiles + 1)
    tile: float = model_of(spec, config, gpu).pair * config.BLOCK_M * config.BLOCK_N * 4
    seconds += HAND_OVER + parts * tile / L2_BANDWIDTH[gpu.capability] + again
    return LAUNCHED[gpu.capability] + seconds
