"""Matmuls named by their shape: the N x K of a matrix, or the E x N x K of a stack of experts."""

import re
from dataclasses import replace
from typing import Literal

import torch

from fqcompile.errors import OptionError
from fqcompile.kernels.gpu import Gpu
from fqcompile.kernels.spec import GemmSpec

Routing = Literal["grouped", "gathered"]
ROUTINGS: tuple[Routing, ...] = ("grouped", "gathered")
DEFAULT_GROUP = 128
_SHAPE = re.compile(r"(?:(\d+)x)?(\d+)x(\d+)")


def specs_of_shape(
    text: str,
    bits: int,
    group: int | str | None,
    dtype: torch.dtype,
    gated: bool,
    routing: Routing | None,
    device_type: str,
    gpu: Gpu | None,
) -> list[GemmSpec] | None:
    """The matmul that `text` names, of experts one for each routing; None where it names none.

    `group` is a size along K, "column", or None for 128; scales are of the activations' dtype.

    Raises:
        OptionError: a side is empty.
    """
    shape = _SHAPE.fullmatch(text)
    if shape is None:
        return None
    experts, n, k = (int(side or 0) for side in shape.groups())
    if not n or not k or (shape[1] and not experts):
        raise OptionError(f"shape {text!r} has an empty side; E, N and K are at least 1")
    size = k if group == "column" else min(k, int(group or DEFAULT_GROUP))
    spec = GemmSpec(1, n, k, bits, size, dtype, dtype, device_type, gated=gated, gpu=gpu)
    if not experts:
        return [spec]
    asked = ROUTINGS if routing is None else (routing,)
    return [replace(spec, experts=experts, routing=one) for one in asked]
