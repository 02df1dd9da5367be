"""The activations a kernel may apply: one table with each one's PyTorch form and its derivative.

The reference, the fuse pass, the ops' backward and (by name) the Triton tiles all read this table,
so a new activation is one entry here and one branch in `triton/tiles.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fqcompile.errors import OptionError

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`forward(z)`, and `backward(dy, z)` = dy * forward'(z), both on the pre-activation z."""

    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("none", lambda z: z, lambda dy, z: dy),
        Activation("relu", F.relu, lambda dy, z: aten.threshold_backward(dy, z, 0)),
        Activation("gelu", F.gelu, aten.gelu_backward),
        Activation(
            "gelu_tanh",
            lambda z: F.gelu(z, approximate="tanh"),
            lambda dy, z: aten.gelu_backward(dy, z, approximate="tanh"),
        ),
        Activation("silu", F.silu, aten.silu_backward),
    )
}


def activation(name: str) -> Activation:
    """The table's entry of that name.

    Raises:
        OptionError: no such activation; the text lists those there are.
    """
    if name not in ACTIVATIONS:
        raise OptionError(f"activation={name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def apply_epilogue(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    act: str,
    gated: bool,
) -> torch.Tensor:
    """Bias, activation, gate x up, residual, in z's dtype. z: [..., rows of the weight]."""
    if bias is not None:
        z = z + bias.to(z.dtype)
    forward = activation(act).forward
    if gated:
        gate, up = z.chunk(2, dim=-1)
        z = forward(gate) * up
    else:
        z = forward(z)
    return z if residual is None else z + residual.to(z.dtype)
