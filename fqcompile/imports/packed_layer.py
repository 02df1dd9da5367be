"""PackedLayer: a quantised layer of somebody else's checkpoint, not read yet."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fqcompile.checkpoint.safetensors_file import TensorPlace
from fqcompile.errors import CheckpointError
from fqcompile.quant.packing import pack
from fqcompile.quant.qtype import QTYPES
from fqcompile.quant.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class PackedLayer:
    """`read` gives rows [N, K]; `places` are the files' tensors that it is made of."""

    name: str
    n: int
    k: int
    places: Mapping[str, TensorPlace]
    read: Callable[[], QuantizedWeight]

    @property
    def scale_dtype(self) -> str:
        """By its name in safetensors."""
        return next(p.dtype for part, p in self.places.items() if "scale" in part)


def symmetric(
    codes: Tensor, zeros: Tensor, scale: Tensor, group_size: int, where: str
) -> QuantizedWeight:
    """(q - z) * s as codes q - z: as int4 where all fit, else as int8, which is exact too.

    Args:
        codes: q, int8 or int16 [N, K]. zeros: z [N, groups] of the same convention. scale: s.
        where: file and layer, for errors.

    Raises:
        CheckpointError: a difference fits no int8.
    """
    n, k = codes.shape
    spread = zeros.to(torch.int16).repeat_interleave(group_size, 1)[:, :k]
    difference = codes.to(torch.int16) - spread
    low, high = int(difference.min()), int(difference.max())
    qtype = next((q for q in QTYPES.values() if q.qmin <= low and high <= q.qmax), None)
    if qtype is None:
        raise CheckpointError(
            f"{where}: codes less zero points reach from {low} to {high}, which no int8 holds: it "
            "cannot be converted exactly; quantise it symmetrically"
        )
    qweight = pack(difference.to(torch.int8), qtype)
    return QuantizedWeight(qweight, scale.contiguous(), qtype.bits, min(group_size, k), (n, k))
