"""The Epilogue, which a kernel applies to a product, and the table of supported activations.

An activation consists of a PyTorch form, its derivative, and a Triton form: the fuse pass, the
operator's backward and the Triton kernels all read this table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

from fqcompile.errors import OptionError

aten = torch.ops.aten
HAS_TRITON = find_spec("triton") is not None
_forms: Any = import_module("fqcompile.kernels.triton.epilogue") if HAS_TRITON else None


# Of GPT-OSS's gated unit: silu with a steeper sigmoid, both sides clamped, `up` off by one.
SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT = 1.702, 7.0
# Where clamp passes its gradient on: PyTorch counts the limits themselves in until 2.14.
_within = torch.le if TorchVersion(torch.__version__) < "2.14" else torch.lt


def _same(z: torch.Tensor) -> torch.Tensor:
    return z


def _same_gradient(dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return dy


def _swiglu_oai(z: torch.Tensor) -> torch.Tensor:
    z = z.clamp(max=SWIGLU_OAI_LIMIT)
    return z * torch.sigmoid(z * SWIGLU_OAI_ALPHA)


def _swiglu_oai_backward(dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    alpha, limit = SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT
    sigmoid = torch.sigmoid(z * alpha)
    slope = sigmoid * (1 + z * alpha * (1 - sigmoid))
    return dy * torch.where(_within(z, limit), slope, 0)


def _swiglu_oai_up(z: torch.Tensor) -> torch.Tensor:
    return z.clamp(-SWIGLU_OAI_LIMIT, SWIGLU_OAI_LIMIT) + 1


def _swiglu_oai_up_backward(dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return dy * _within(z.abs(), SWIGLU_OAI_LIMIT)


@dataclass(frozen=True)
class Activation:
    """`forward(z)`, and `backward(dy, z)` = dy * forward'(z), both on the pre-activation z.

    Gated, the result is forward(gate) * up(up); few activations do more to `up` than hand it on.
    `triton_form` is forward's for kernels, in fp32, and `triton_up` that of `up`; None where Triton
    is not installed.
    """

    name: str
    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    triton_form: Any
    up: Callable[[torch.Tensor], torch.Tensor] = _same
    up_backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _same_gradient
    triton_up: Any = _forms and _forms.none


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("none", _same, _same_gradient, _forms and _forms.none),
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
        Activation(
            "swiglu_oai",
            _swiglu_oai,
            _swiglu_oai_backward,
            _forms and _forms.swiglu_oai,
            _swiglu_oai_up,
            _swiglu_oai_up_backward,
            _forms and _forms.swiglu_oai_up,
        ),
    )
}


def activation(name: str) -> Activation:
    """The table's entry of that name.

    Raises:
        OptionError: the activation is unknown; the message lists the known ones.
    """
    if name not in ACTIVATIONS:
        raise OptionError(f"activation={name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Epilogue(NamedTuple):
    """What follows the product z = x @ ŵᵀ [..., rows of the weight]: `act(z + bias) + residual`.

    Gated, z is gate beside up, and it is `act(gate + b_gate) * up(up + b_up) + residual`.

    Attributes:
        bias: [rows of the weight], of experts [E, rows of one].
        residual: [..., N]; rows of experts have none.
    """

    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: str = "none"
    gated: bool = False

    def columns(self, rows: int) -> int:
        """N: the columns of the result, of a weight with so many rows."""
        return rows // 2 if self.gated else rows

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """[..., N] in z's dtype."""
        return self.apply_to_biased(z if self.bias is None else z + self.bias.to(z.dtype))

    def apply_to_biased(self, z: torch.Tensor) -> torch.Tensor:
        """The same for a product that has its bias already."""
        table = activation(self.activation)
        if self.gated:
            gate, up = z.chunk(2, dim=-1)
            z = table.forward(gate) * table.up(up)
        else:
            z = table.forward(z)
        return z if self.residual is None else z + self.residual.to(z.dtype)

    def backward(self, dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """dz from dy [..., N], for z with its bias."""
        table = activation(self.activation)
        if not self.gated:
            return table.backward(dy, z)
        gate, up = z.chunk(2, dim=-1)
        through_gate = table.backward(dy * table.up(up), gate)
        return torch.cat((through_gate, table.up_backward(dy * table.forward(gate), up)), dim=-1)
