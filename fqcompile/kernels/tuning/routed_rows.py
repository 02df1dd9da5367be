"""What a measurement of experts needs beside that of one matrix: a stack, and rows that are routed.

Each row's expert is one of all by chance. A call reads only those that were hit, so the calls of a
measurement hit other experts in turn until all were: what one reads has left the cache by the next.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fqcompile.kernels.spec import GemmSpec
from fqcompile.kernels.template import Layout, Routing
from fqcompile.tensor.quantized import QuantizedTensor


def experts_of(stack: QuantizedTensor, experts: int) -> list[QuantizedTensor]:
    """The experts whose rows lie one after the other in one matrix; views."""
    form = replace(stack.format, rows=stack.rows // experts, experts=experts)
    return QuantizedTensor.of_rows(*stack.tensors, form).unbind()


def packed_stack(weights: Sequence[QuantizedTensor], layout: Layout) -> QuantizedTensor:
    """qweight and scale [E, ...], as the operators of experts take them."""
    return layout.pack(QuantizedTensor.stack(weights))


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
