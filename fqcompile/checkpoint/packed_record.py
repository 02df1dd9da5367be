"""A packed weight on disk: two tensors in the plain layout, and the record of how to read them."""

import torch

from fqcompile.checkpoint.manifest import PackedRecord
from fqcompile.checkpoint.safetensors_file import DTYPE_NAMES
from fqcompile.checkpoint.shards import ShardWriter
from fqcompile.tensor.quantized import QuantizedWeight


def write_packed(
    writer: ShardWriter,
    name: str,
    weight: QuantizedWeight,
    *,
    dtype: torch.dtype,
    experts: int,
    transposed: bool,
    scale_method: str,
) -> PackedRecord:
    """Give the rows [N, K], or [E * N, K] of a stack, to the writer."""
    rows, k = weight.shape
    record = PackedRecord(
        codes=f"{name}.codes",
        scale=f"{name}.scale",
        dtype=DTYPE_NAMES[dtype],
        bits=weight.bits,
        group_size=weight.group_size,
        rows=rows // max(1, experts),
        k=k,
        experts=experts,
        transposed=transposed,
        scale_method=scale_method,
    )
    writer.add({record.codes: weight.qweight, record.scale: weight.scale})
    return record
