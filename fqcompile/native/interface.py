"""What Python and the C++ both have to know: schemas, the numbers of dtypes, the values of levels.

Python tells the C++ by `DEFINITIONS`, flags of its compiler. So the C++ can define the operators
where it is loaded alone, and no line of this is written twice.
"""

import json
from array import array

import torch

from fqcompile.tensor.format import NORMAL, QTYPES, UNIFORM
from fqcompile.torch_compat import is_operator


class _Numbers(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise RuntimeError(f"the x86 kernel takes fp32, bf16 and fp16, not {dtype}")


# As enumerated in vectors.h.
DTYPES = _Numbers({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
# The levels of 16 codes; none where codes are their own.
_LEVELS = {q.levels: array("f", q.values) for q in QTYPES.values() if q.levels != UNIFORM}
LEVELS_AT = {UNIFORM: 0} | {name: found.buffer_info()[0] for name, found in _LEVELS.items()}

_MATMUL = (
    "(Tensor x, Tensor qweight, Tensor scale, Tensor? bias, Tensor? residual, int bits, "
    "str levels, int group_size, int n, int k, str activation, bool gated, str kernel, "
    "Tensor? offsets, Tensor? ids, bool zero_rest) -> Tensor"
)
# The operators of the namespace `fqcompile`; operator.cpp reads their arguments by position.
SCHEMAS = {
    "matmul": _MATMUL,
    "matmul.inference": _MATMUL,
    "matmul_backward": "(Tensor dz, Tensor qweight, Tensor scale, int bits, str levels, "
    "int group_size, int rows, int k, str kernel, Tensor? offsets, Tensor? ids) -> Tensor",
    "dequantize": "(Tensor qweight, Tensor scale, int bits, str levels, int group_size, int rows, "
    "int k, ScalarType dtype, str kernel) -> Tensor",
    "rows": "(Tensor qweight, Tensor scale, Tensor ids, int bits, str levels, int group_size, "
    "int rows, int k, ScalarType dtype, str kernel) -> Tensor",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, "
    "float softcap, bool causal, bool nan_if_hidden) -> Tensor",
}
DEFINITIONS = (
    f"-DFQCOMPILE_SCHEMAS={','.join(json.dumps(name + of) for name, of in SCHEMAS.items())}",
    f"-DFQCOMPILE_NORMAL_LEVELS={','.join(f'{value}f' for value in _LEVELS[NORMAL])}",
)


def define(library: torch.library.Library, name: str) -> None:
    """Define an operator, unless the C++ was loaded before this package and has done so."""
    if not is_operator(f"{library.ns}::{name}"):
        library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
