"""A packed weight on disk: two tensors in the plain layout, and the record of how to read them."""

import torch

from fqcompile.checkpoint.manifest import PackedRecord
from fqcompile.checkpoint.safetensors_file import DTYPE_NAMES
from fqcompile.checkpoint.shards import ShardWriter
from fqcompile.tensor.quantized import QuantizedTensor


def write_packed(
    writer: ShardWriter, name: str, weight: QuantizedTensor, dtype: torch.dtype
) -> PackedRecord:
    """Give the rows, of a stack those of all experts, to the writer; `dtype` is the weight's."""
    form = weight.format
    record = PackedRecord(
        codes=f"{name}.codes",
        scale=f"{name}.scale",
        dtype=DTYPE_NAMES[dtype],
        bits=form.bits,
        group_size=form.group_size,
        rows=form.rows,
        k=form.k,
        experts=form.experts,
        transposed=form.transposed,
        scale_method=form.scale_method,
    )
    codes, scale = weight.as_rows()
    writer.add({record.codes: codes, record.scale: scale})
    return record
