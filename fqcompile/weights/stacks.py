"""A stack of experts in a kernel's layout: both tensors begin with [E, ...]; and back."""

from collections.abc import Sequence

import torch

from fqcompile.kernels.cpu.huge_pages import in_huge_pages
from fqcompile.kernels.template import PLAIN, Layout, PackedLinear, PackedTensors, expert_of
from fqcompile.quant.quantized_weight import QuantizedWeight


def pack_stack(weight: QuantizedWeight, experts: int, layout: Layout) -> PackedTensors:
    """Rows [E * N, K] in `layout`, expert by expert; one matrix where `experts` is 0."""
    if not experts:
        return layout.pack(weight)
    if layout is PLAIN:  # already one expert after the other
        views = [t.unflatten(0, (experts, -1)) for t in (weight.qweight, weight.scale)]
        return views[0], views[1]
    return _pack_each(weight.split(experts), layout)


def _pack_each(experts: Sequence[QuantizedWeight], layout: Layout) -> PackedTensors:
    """Into one tensor each from the start: a second copy of all experts would be large."""
    first = layout.pack(experts[0])
    qweight, scale = (in_huge_pages(t.new_empty((len(experts), *t.shape))) for t in first)
    for i, expert in enumerate(experts):
        qweight[i], scale[i] = layout.pack(expert)
    return qweight, scale


def unpack_stack(packed: PackedLinear, experts: int, layout: Layout) -> QuantizedWeight:
    """Rows [N, K] or [E * N, K] in the plain layout: what `pack_stack` was given."""
    unpack = layout.unpack
    assert unpack is not None, f"layout {layout.name} cannot be undone: it must not be chosen"
    if not experts:
        return unpack(packed)
    if layout is PLAIN:
        flat = packed._replace(
            qweight=packed.qweight.flatten(0, 1), scale=packed.scale.flatten(0, 1)
        )
        return unpack(flat._replace(rows=experts * packed.rows))
    each = [unpack(expert_of(packed, expert)) for expert in range(experts)]
    qweight = torch.cat([weight.qweight for weight in each])
    scale = torch.cat([weight.scale for weight in each])
    shape = (experts * packed.rows, packed.k)
    return QuantizedWeight(qweight, scale, packed.bits, packed.group_size, shape)
