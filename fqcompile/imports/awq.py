"""AWQ checkpoints of version "gemm": w = (q - z) * s, codes and zero points in 4 bits.

M.qweight int32 [K, N/8]     M.qzeros int32 [G, N/8]     M.scales [G, N]
nibbles 0 .. 7 of a word are columns 0 2 4 6 1 3 5 7 of its eight
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fqcompile.checkpoint.safetensors_file import TensorPlace, read_tensor
from fqcompile.errors import CheckpointError
from fqcompile.imports.nibbles import BITS, CODES_PER_WORD, nibbles
from fqcompile.imports.packed_layer import PackedLayer, symmetric
from fqcompile.imports.parts import check_config, check_part, layer_parts
from fqcompile.quant.quantized_weight import QuantizedWeight

_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def read_awq(
    config: Mapping[str, Any], tensors: Mapping[str, TensorPlace], where: str
) -> dict[str, PackedLayer]:
    """The packed layers by name; codes are read later.

    Raises:
        CheckpointError: tensors are missing or do not fit, or the version packs in another order;
            file and key are named.
    """
    key = "w_bit" if "w_bit" in config["quantization_config"] else "bits"
    check_config(config, where, bits=(key, BITS), allowed={"version": ("gemm", "GEMM", None)})
    found = {}
    for name, places in layer_parts(tensors, ("qweight", "qzeros", "scales"), ()).items():
        k, words = check_part(name, places, "qweight", ("I32",))
        n = words * CODES_PER_WORD
        groups, _ = check_part(name, places, "scales", ("F16", "BF16", "F32"), (None, n))
        check_part(name, places, "qzeros", ("I32",), (groups, words))
        if k % groups:
            raise CheckpointError(
                f"{places['scales'].path}: {name}.scales has {groups} groups for K = {k}"
            )
        found[name] = PackedLayer(name, n, k, places, partial(_read, name, places))
    return found


def _read(name: str, places: Mapping[str, TensorPlace]) -> QuantizedWeight:
    codes, zeros = (_columns(read_tensor(places[part])) for part in ("qweight", "qzeros"))
    scale = read_tensor(places["scales"]).t()
    size = codes.shape[0] // scale.shape[1]
    where = f"{places['qweight'].path}: {name}"
    return symmetric(codes.t().to(torch.int16), zeros.t(), scale, size, where)


def _columns(words: Tensor) -> Tensor:
    """int32 [R, N/8] -> uint8 [R, N]."""
    found = nibbles(words)
    result = torch.empty_like(found)
    result[..., list(_COLUMNS)] = found
    return result.flatten(1)
