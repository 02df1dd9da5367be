"""GPTQ checkpoints without act-order: w = (q - z) * s, codes and zero points in 4 bits.

M.qweight int32 [K/8, N]     nibble j of a word is the code of row 8i + j
M.qzeros  int32 [G, N/8]     nibble j is z of column 8i + j; format "gptq" stores z - 1
M.scales  [G, N]             M.g_idx int32 [K] = k // group_size
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fqcompile.checkpoint.safetensors_file import TensorPlace, read_tensor
from fqcompile.errors import CheckpointError
from fqcompile.imports.nibbles import BITS, CODES_PER_WORD, nibbles
from fqcompile.imports.packed_layer import PackedLayer, symmetric
from fqcompile.imports.parts import check_config, check_part, layer_parts
from fqcompile.quant.quantized_weight import QuantizedWeight

_FORMATS = {"gptq": 1, "gptq_v2": 0}  # and what is added to stored zero points


def read_gptq(
    config: Mapping[str, Any], tensors: Mapping[str, TensorPlace], where: str
) -> dict[str, PackedLayer]:
    """The packed layers by name; codes are read later.

    Raises:
        CheckpointError: tensors are missing or do not fit, or the layout has no exact conversion
            (act-order, other bits or formats); file and key are named.
    """
    options = check_config(config, where, bits=("bits", BITS), allowed={"desc_act": (False, None)})
    stored = options.get("checkpoint_format") or "gptq"
    if stored not in _FORMATS:
        raise CheckpointError(
            f"{where}: quantization_config.checkpoint_format is {stored!r}; this reads "
            f"{', '.join(_FORMATS)}"
        )
    found = {}
    for name, places in layer_parts(tensors, ("qweight", "qzeros", "scales"), ("g_idx",)).items():
        rows, n = check_part(name, places, "qweight", ("I32",))
        k = rows * CODES_PER_WORD
        groups, _ = check_part(name, places, "scales", ("F16", "BF16", "F32"), (None, n))
        check_part(name, places, "qzeros", ("I32",), (groups, -(-n // CODES_PER_WORD)))
        _check_order(name, places, k, groups)
        read = partial(_read, name, places, n, k, _FORMATS[stored])
        found[name] = PackedLayer(name, n, k, places, read)
    return found


def _check_order(name: str, places: Mapping[str, TensorPlace], k: int, groups: int) -> None:
    place = places.get("g_idx")
    if place is None:
        return
    index = read_tensor(place)
    if index.shape != (k,) or not torch.equal(index.long(), torch.arange(k) // -(-k // groups)):
        raise CheckpointError(
            f"{place.path}: {name}.g_idx is not k // group_size: its columns are in act-order, "
            "which has no exact conversion; quantise it with desc_act=False"
        )


def _read(
    name: str, places: Mapping[str, TensorPlace], n: int, k: int, added: int
) -> QuantizedWeight:
    scale = read_tensor(places["scales"]).t()
    codes = nibbles(read_tensor(places["qweight"]).t()).reshape(n, k)
    zeros = nibbles(read_tensor(places["qzeros"])).flatten(1)[:, :n].t()
    where = f"{places['qweight'].path}: {name}"
    if added and bool((zeros == 15).any()):
        raise CheckpointError(
            f"{where}.qzeros stores 15, which programs read as zero point 16 or 0: it cannot be "
            "converted exactly; save it with checkpoint_format gptq_v2"
        )
    size = -(-k // scale.shape[1])
    return symmetric(codes.to(torch.int16), zeros.to(torch.int16) + added, scale, size, where)
