"""Run the kernel that a node names; if it does not build on this machine, dequantize instead."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fqcompile.errors import KernelBuildError
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.registry import KernelChoice, parse_kernel
from fqcompile.kernels.spec import Config
from fqcompile.kernels.template import Layout, Routing, Run, one_by_one
from fqcompile.tensor.quantized import QuantizedTensor

log = logging.getLogger("fqcompile")
# Kernels that failed to build, with the reason: they are not tried or reported again. The oldest
# entries are dropped, because a process may see an unbounded number of sizes.
BROKEN: dict[tuple[Any, ...], str] = {}
_MOST_BROKEN = 1024


def run_matmul(
    x: Tensor, weight: QuantizedTensor, routing: Routing | None, epilogue: Epilogue, kernel: str
) -> Tensor:
    """The matmul [M, N] for x [M, K], M >= 1, by the kernel named; see `template.Run`.

    Raises:
        IndexError: on a CPU, the routing names an expert or a row that does not exist.
        KernelBuildError: the kernel does not build here, and its layout cannot be dequantized.
    """
    choice = parse_kernel(kernel)
    config = None if choice.launches is None else choice.launches.at(x.shape[0])
    if not BROKEN or _build(choice, config, x, weight, epilogue) not in BROKEN:
        try:
            return choice.template.run(x, weight, routing, epilogue, config)
        except KernelBuildError as error:
            if choice.template.layout.dequantize is None:
                raise
            _note_broken(choice, config, x, weight, epilogue, error)
    return _plainly(choice.template.layout)(x, weight, routing, epilogue, None)


def _note_broken(
    choice: KernelChoice,
    config: Config | None,
    x: Tensor,
    weight: QuantizedTensor,
    epilogue: Epilogue,
    error: KernelBuildError,
) -> None:
    while len(BROKEN) >= _MOST_BROKEN:
        BROKEN.pop(next(iter(BROKEN)), None)
    BROKEN[_build(choice, config, x, weight, epilogue)] = str(error)
    log.warning(
        "kernel %s does not build here: %s; its layers are dequantized and multiplied by "
        "PyTorch instead, which is slower",
        choice.template.name if config is None else f"{choice.template.name}:{config}",
        error,
    )


def _build(
    choice: KernelChoice,
    config: Config | None,
    x: Tensor,
    weight: QuantizedTensor,
    epilogue: Epilogue,
) -> tuple[Any, ...]:
    """The properties that a kernel is compiled for."""
    formats = (x.dtype, weight.scale.dtype, weight.format, epilogue.activation, epilogue.gated)
    return (choice.template.name, config, x.device, *formats)


def _plainly(layout: Layout) -> Run:
    dequantize = layout.dequantize
    assert dequantize is not None, "checked before"

    def multiply(x: Tensor, weight: QuantizedTensor, epilogue: Epilogue) -> Tensor:
        z = F.linear(x, dequantize(weight, x.dtype), epilogue.bias)
        return epilogue.apply_to_biased(z)

    return one_by_one(multiply)


def run_backward(dz: Tensor, weight: QuantizedTensor, routing: Routing, kernel: str) -> Tensor:
    """dz[m] @ ŵ[e(m)] [M, K], one expert's ŵ at a time; zero for rows without an expert."""
    dx = dz.new_zeros(dz.shape[0], weight.format.k)
    for expert, rows in routing.rows_of_experts(weight.qweight.shape[0], dz.shape[0]):
        w_hat = dequantize_weight(weight.expert(expert), dz.dtype, kernel)
        dx[rows] = dz[rows] @ w_hat
    return dx


def dequantize_weight(weight: QuantizedTensor, dtype: torch.dtype, kernel: str) -> Tensor:
    """ŵ [rows, K] in `dtype`, from the layout of the kernel named.

    Raises:
        KernelBuildError: that layout cannot be dequantized.
    """
    layout = parse_kernel(kernel).template.layout
    if layout.dequantize is None:
        raise KernelBuildError(f"layout {layout.name!r} cannot be dequantized")
    return layout.dequantize(weight, dtype)
