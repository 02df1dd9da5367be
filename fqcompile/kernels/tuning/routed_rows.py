"""What a measurement of experts needs beside that of one matrix: a stack, and rows that are routed.

Each row's expert is one of all by chance. A call reads only those that were hit, so the calls of a
measurement hit other experts in turn until all were: what one reads has left the cache by the next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import Layout, PackedLinear, Routing
from fqcompile.quant.quantized_weight import QuantizedWeight


def experts_of(stack: QuantizedWeight, experts: int) -> list[QuantizedWeight]:
    """The experts whose rows lie one after the other in one matrix; views."""
    rows, k = stack.shape[0] // experts, stack.shape[1]
    parts = zip(stack.qweight.split(rows), stack.scale.split(rows), strict=True)
    return [
        QuantizedWeight(codes, scale, stack.bits, stack.group_size, (rows, k))
        for codes, scale in parts
    ]


def packed_stack(weights: Sequence[QuantizedWeight], layout: Layout) -> PackedLinear:
    """qweight and scale [E, ...], as the operators of experts take them."""
    one = weights[0]
    qweight, scale = zip(*(layout.pack(weight) for weight in weights), strict=True)
    form = (one.bits, one.group_size, *one.shape)
    return PackedLinear(torch.stack(qweight), torch.stack(scale), *form)


def routings(spec: GemmSpec, m: int, device: torch.device) -> list[Routing]:
    """Of m rows: the experts hit are neighbours, in each routing the ones after those before."""
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(spec.experts, (m,), device=device, generator=generator)
    hit = ids.unique()
    rank, width = torch.searchsorted(hit, ids), hit.numel()
    starts = range(0, spec.experts - width + 1, width)
    return [_routing(rank + start, spec) for start in starts]


def _routing(ids: Tensor, spec: GemmSpec) -> Routing:
    if spec.routing == "gathered":
        return Routing(ids=ids)
    counts = torch.bincount(ids, minlength=spec.experts)
    return Routing(offsets=counts.cumsum(0).to(torch.int32))
