"""AWQ checkpoints of version "gemm": w = (q - z) * s, codes and zero points in 4 bits.

M.qweight int32 [K, N/8]     M.qzeros int32 [G, N/8]     M.scales [G, N]
nibbles 0 .. 7 of a word are columns 0 2 4 6 1 3 5 7 of its eight
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import TensorPlace, read_tensor
from fqcompile.interop.assemble import ForeignLayer, symmetric
from fqcompile.interop.gptq import (
    BITS,
    CODES_PER_WORD,
    MIDDLE,
    check_groups,
    check_options,
    check_part,
    layer_parts,
    nibbles,
)
from fqcompile.tensor.quantized import QuantizedTensor

_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
# Config keys of the packing order; programs use any of them.
_VERSION_KEYS = ("version", "format", "checkpoint_format")
# Keys of AutoAWQ's own files, and what transformers calls them.
_OWN_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}


def read_awq(
    config: Mapping[str, Any], tensors: Mapping[str, TensorPlace], where: str
) -> dict[str, ForeignLayer]:
    """The packed layers by name; codes are read later.

    Raises:
        CheckpointError: tensors are missing or do not fit, or the version packs in another order;
            file and key are named.
    """
    options: Mapping[str, Any] = config["quantization_config"]
    bits, size_key = (own if own in options else key for own, key in _OWN_KEYS.items())
    gemm = ("gemm", "GEMM", None)
    allowed: dict[str, Sequence[object]] = dict.fromkeys(_VERSION_KEYS, gemm)
    allowed["zero_point"] = (True, False, None)
    check_options(options, where, bits=(bits, BITS), allowed=allowed)
    found = {}
    for name, places in layer_parts(tensors, ("qweight", "qzeros", "scales"), (), where).items():
        k, words = check_part(name, places, "qweight", ("I32",))
        n = words * CODES_PER_WORD
        groups, _ = check_part(name, places, "scales", ("F16", "BF16", "F32"), (None, n))
        check_part(name, places, "qzeros", ("I32",), (groups, words))
        size = check_groups(name, places["scales"], k, options, size_key, where)
        middle = where if options.get("zero_point") is False else None
        read = partial(_read, name, places, size, middle)
        found[name] = ForeignLayer(name, n, k, places, read)
    return found


def _read(
    name: str, places: Mapping[str, TensorPlace], size: int, symmetric_by: str | None
) -> QuantizedTensor:
    """`symmetric_by`: the config that declares all zero points to be the middle."""
    codes, zeros = (_columns(read_tensor(places[part])) for part in ("qweight", "qzeros"))
    scale = read_tensor(places["scales"]).t()
    where = f"{places['qweight'].path}: {name}"
    if symmetric_by is not None and bool((zeros != MIDDLE).any()):
        low, high = map(int, zeros.aminmax())
        raise CheckpointError(
            f"{where}.qzeros stores {low} to {high}, and quantization_config.zero_point in "
            f"{symmetric_by} is False: it would be {MIDDLE} throughout; say "
            '"zero_point": true there if it was quantized so'
        )
    return symmetric(codes.t().to(torch.int16), zeros.t(), scale, size, where)


def _columns(words: Tensor) -> Tensor:
    """int32 [R, N/8] -> uint8 [R, N]."""
    found = nibbles(words)
    result = torch.empty_like(found)
    result[..., list(_COLUMNS)] = found
    return result.flatten(1)
