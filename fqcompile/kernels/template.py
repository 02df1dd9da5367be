"""Template: one way to run a quantised matmul, as a value to ask and to call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.tile_config import TileConfig
from fqcompile.quant.quantized_weight import QuantizedWeight

PackedTensors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class PackedLinear:
    """A packed weight with its format, as the op received it. qweight and scale follow `layout`."""

    qweight: torch.Tensor
    scale: torch.Tensor
    bits: int
    group_size: int
    rows: int
    k: int


class LinearFn(Protocol):
    """`act(x @ ŵᵀ + bias) + residual` for x [M, K] with M >= 1; returns [M, N] in x's dtype."""

    def __call__(
        self,
        x: torch.Tensor,
        weight: PackedLinear,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        activation: str,
        gated: bool,
        config: TileConfig | None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Layout:
    """How a kernel wants codes and scales in memory; `pack` makes it from the plain one."""

    name: str
    pack: Callable[[QuantizedWeight], PackedTensors]


@dataclass(frozen=True)
class Template:
    """A kernel family.

    `refuse` is pure and total: None where the template can run the spec, else the reason it cannot.
    `closed_form` gives the launch configuration without measuring (None: nothing to configure).
    """

    name: str
    layout: Layout
    refuse: Callable[[GemmSpec], str | None]
    closed_form: Callable[[GemmSpec], TileConfig | None]
    linear: LinearFn


PLAIN = Layout("plain", lambda w: (w.qweight, w.scale))
