"""A made-up kernel and a measurement that needs no GPU: times follow from the configuration."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from fqcompile.kernels.spec import DENSE, H200, Config, GemmSpec, LaunchTable, TileConfig
from fqcompile.kernels.template import DEQUANTIZE, SearchMode, Template
from fqcompile.kernels.tuning.measure import Measure
from fqcompile.kernels.tuning.table import Timing

SPEC = GemmSpec(16, 4096, 14336, 4, 128, torch.bfloat16, torch.bfloat16, "cuda", gpu=H200)
CLOSED = LaunchTable(
    ((16, TileConfig(16, 128, 128)), (128, TileConfig(64, 128, 128)), (None, DENSE))
)


def candidates(
    spec: GemmSpec, m: int, mode: SearchMode, fewest: int | None = None
) -> Sequence[Config]:
    """The heuristic, then 11 more; twice as many in mode "max"."""
    closed = CLOSED.at(m)
    stages = range(2, 14 if mode == "fast" else 26)
    others: list[Config] = [TileConfig(16, 64, 64, num_stages=s) for s in stages]
    return [closed, *others][: 12 if mode == "fast" else 24]


def launches(spec: GemmSpec) -> LaunchTable:
    return CLOSED if spec.m_range else LaunchTable.of(CLOSED.at(spec.m))


TEMPLATE = Template(
    "fake", DEQUANTIZE.layout, lambda spec: None, launches, DEQUANTIZE.run, candidates
)
FAST, MAX = candidates(SPEC, 16, "fast"), candidates(SPEC, 16, "max")


def time_of(config: Config) -> float:
    """The more stages the faster, and the heuristic in between."""
    return 50.0 if config in dict(CLOSED.steps).values() else 60.0 - config.num_stages


@dataclass
class FakeMeasure:
    """make_measure: notes what is set up and tried, raises what `faults` says, may take long."""

    faults: dict[Config, BaseException] = field(default_factory=dict)
    seconds: float = 0.0
    announce: bool = False
    set_up: list[int] = field(default_factory=list)
    tried: list[Config] = field(default_factory=list)

    def __call__(self, template: Template, spec: GemmSpec, m: int) -> Measure:
        self.set_up.append(m)
        assert spec == replace(spec, m=m, m_range=None)

        def measure(config: Config) -> Timing:
            if self.announce:
                print(config, flush=True)
            time.sleep(self.seconds)
            self.tried.append(config)
            if config in self.faults:
                raise self.faults[config]
            us = time_of(config)
            return Timing(us, us - 1, us + 1)

        return measure
