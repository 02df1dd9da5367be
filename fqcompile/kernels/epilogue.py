"""The activations a kernel may apply: one table of PyTorch form, its derivative, and Triton form.

The reference, the fuse pass, the ops' backward and the Triton kernels all read this table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from fqcompile.errors import OptionError

aten = torch.ops.aten
HAS_TRITON = find_spec("triton") is not None
_forms: Any = import_module("fqcompile.kernels.triton.activations") if HAS_TRITON else None


@dataclass(frozen=True)
class Activation:
    """`forward(z)`, and `backward(dy, z)` = dy * forward'(z), both on the pre-activation z.

    `triton_form` is forward's for kernels, in fp32; None where Triton is not installed.
    """

    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    triton_form: Any


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("none", lambda z: z, lambda dy, z: dy, _forms and _forms.none),
        Activation(
            "relu",
            F.relu,
            lambda dy, z: aten.threshold_backward(dy, z, 0),
            _forms and _forms.relu,
        ),
        Activation("gelu", F.gelu, aten.gelu_backward, _forms and _forms.gelu),
        Activation(
            "gelu_tanh",
            lambda z: F.gelu(z, approximate="tanh"),
            lambda dy, z: aten.gelu_backward(dy, z, approximate="tanh"),
            _forms and _forms.gelu_tanh,
        ),
        Activation("silu", F.silu, aten.silu_backward, _forms and _forms.silu),
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
