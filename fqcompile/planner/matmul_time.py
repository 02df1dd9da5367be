"""Seconds of one matmul: by the models that choose our kernels, or the roofline."""

from functools import cache

from fqcompile.kernels.launch_table import DENSE
from fqcompile.kernels.registry import HAS_TRITON
from fqcompile.kernels.roofline import M, dense, ideal
from fqcompile.kernels.spec import GemmSpec
from fqcompile.planner.devices import Device
from fqcompile.planner.weight_format import PLAIN_BITS

if HAS_TRITON:
    from fqcompile.kernels.triton.configs import candidates
    from fqcompile.kernels.triton.cost import cost


@cache
def matmul_seconds(spec: GemmSpec, device: Device, hit: float | None = None) -> float:
    """Of spec.m rows; `hit`: how many experts they read.

    A quantised weight on a GPU takes what the cost model says of the configuration that it ranks
    first, which is what `select` chooses. Weights of 16 bits, a CPU, and a machine without Triton:
    the roofline, and a launch.
    """
    if spec.gpu is None or spec.bits == PLAIN_BITS or not HAS_TRITON:
        return float(ideal(spec, device, hit).subs(M, spec.m)) + device.launch_seconds
    config = candidates(spec, spec.m, "fast")[0]
    if config is DENSE:
        return float(dense(spec, spec.gpu).subs(M, spec.m))
    return cost(spec, config, spec.gpu, spec.m, hit).seconds
