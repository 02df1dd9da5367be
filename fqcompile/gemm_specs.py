"""The quantised matmuls of a model, as the kernels will see them after fusion."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fqcompile.config import FineQuantConfig
from fqcompile.dry_run import dry_run
from fqcompile.kernels.spec import GemmSpec
from fqcompile.passes.pipeline import Recorder, analyse
from fqcompile.passes.select import gemm_spec


def gemm_specs(
    model: Callable[..., Any], *example_inputs: Any, grad: bool = False, **options: object
) -> list[GemmSpec]:
    """The distinct matmuls that compiling `model` with these options would quantise.

    The model runs once, eagerly, on the example inputs; its weights are not changed.
    `grad`: as calls in grad mode, in which less is fused.
    """
    config = FineQuantConfig.from_options({**options, "autotune": "off"})
    specs: dict[GemmSpec, None] = {}

    def collect(module: fx.GraphModule, args: Sequence[Any]) -> None:
        state = analyse(module, args, config, Recorder())
        specs.update(dict.fromkeys(gemm_spec(state, op) for op in state.packed))

    dry_run(model, example_inputs, {}, collect, grad=grad)
    return list(specs)
