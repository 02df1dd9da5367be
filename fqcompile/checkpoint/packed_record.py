"""How a packed weight lies in a file: as two tensors, and a record that says how to read them.

    NAME.codes [all rows, bytes of a row]        "__metadata__": {"format": "pt", "finequant":
    NAME       [all rows, groups]: scales            {"version": 1, "weights": {NAME: {...}}}}

The records of a file's weights are in its own header, so that whoever gets the file can open it:
`from_pretrained` of transformers, also of files that its `save_pretrained` wrote. Who does not read
records finds a NAME of another shape than the model's, and fails; a NAME that is missing would be
filled with random values.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import DTYPE_NAMES, DTYPES, PT, TensorPlace, read_header
from fqcompile.files.untrusted import check_name, checked, parse_json, shown
from fqcompile.quant.checks import WEIGHT_DTYPES
from fqcompile.tensor.format import QTYPES, UNIFORM, Format, num_groups, packed_columns
from fqcompile.tensor.quantized import QuantizedTensor


class _Method(StrEnum):
    FINEQUANT = "finequant"


# The key of the metadata, and `quant_method` of a config.json; diffusers reads its `value`.
METHOD = _Method.FINEQUANT
_VERSION = 1


class Stored(Protocol):
    """What a header says of a tensor: its dtype by the name of safetensors, and its shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class PackedRecord:
    """A packed weight: the tensors of its codes and scales, and how to read them.

    `rows` and `k` describe one of the `experts` (0: not a stack); `dtype` is the dtype of the
    dense weight.
    """

    codes: str
    scale: str
    dtype: str
    bits: int
    group_size: int
    rows: int
    k: int
    experts: int
    transposed: bool
    scale_method: str
    levels: str = UNIFORM

    @property
    def format(self) -> Format:
        """The format of the tensors in the file."""
        of_matrix = (self.bits, self.group_size, self.rows, self.k)
        stack = (self.experts, self.transposed, self.scale_method)
        return Format(*of_matrix, *stack, levels=self.levels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.format.shape

    @property
    def all_rows(self) -> int:
        return self.rows * max(1, self.experts)

    def problem(self, tensors: Mapping[str, Stored]) -> str | None:
        """Why the tensors do not match the record, or None."""
        qtype = QTYPES.get((self.bits, self.levels))
        if qtype is None or not 1 <= self.group_size <= max(1, self.k):
            kind = f"{self.bits} bits, {self.levels} levels"
            return f"{kind}, in groups of {self.group_size} of {self.k}"
        if DTYPES.get(self.dtype) not in WEIGHT_DTYPES:
            return f"dtype {self.dtype!r}"
        codes, scale = tensors.get(self.codes), tensors.get(self.scale)
        if codes is None or scale is None:
            return "its codes or scales are not there"
        expected = (self.all_rows, packed_columns(qtype, self.k))
        if codes.shape != expected or DTYPES[codes.dtype] != qtype.storage_dtype:
            return f"codes {codes.dtype} {list(codes.shape)}, expected {list(expected)}"
        expected = (self.all_rows, num_groups(self.k, self.group_size))
        if scale.shape != expected or DTYPES[scale.dtype] not in WEIGHT_DTYPES:
            return f"scales {scale.dtype} {list(scale.shape)}, expected {list(expected)}"
        return None


@dataclass(frozen=True)
class _Described:
    version: int
    weights: Mapping[str, PackedRecord]


def to_disk(
    name: str, weight: QuantizedTensor, dtype: torch.dtype
) -> tuple[PackedRecord, dict[str, Tensor]]:
    """The record of a weight of this dtype, and its two tensors by name.

    Raises:
        CheckpointError: no file has packed weights of this dtype.
    """
    if dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"packed weight {name} has dtype {dtype}, and files have packed weights of "
            f"{', '.join(map(str, WEIGHT_DTYPES))}: call model.float() first, say"
        )
    form = weight.format
    record = PackedRecord(
        codes=f"{name}.codes",
        scale=name,
        dtype=DTYPE_NAMES[dtype],
        bits=form.bits,
        group_size=form.group_size,
        rows=form.rows,
        k=form.k,
        experts=form.experts,
        transposed=form.transposed,
        scale_method=form.scale_method,
        levels=form.levels,
    )
    return record, dict(zip((record.codes, record.scale), weight.as_rows(), strict=True))


def described(records: Mapping[str, PackedRecord]) -> dict[str, str]:
    """The metadata of a file that holds these weights, or none."""
    content = asdict(_Described(_VERSION, records))
    return {**PT, METHOD: json.dumps(content, sort_keys=True, separators=(",", ":"))}


def read_packed(paths: Iterable[Path]) -> tuple[dict[str, TensorPlace], dict[str, PackedRecord]]:
    """All tensors of a model's untrusted files, and the records of its packed weights.

    Raises:
        CheckpointError: a file is damaged, or its records contradict the tensors or were written by
            a later version.
    """
    headers = {path: read_header(path) for path in paths}
    tensors = {name: t for header in headers.values() for name, t in header.tensors.items()}
    texts = {
        path: header.metadata[METHOD]
        for path, header in headers.items()
        if isinstance(header.metadata, dict) and METHOD in header.metadata
    }
    if not texts:
        raise CheckpointError(
            f"{', '.join(map(str, headers))}: no metadata says by a key {METHOD} how weights are "
            "packed; save the model again"
        )
    found: dict[str, PackedRecord] = {}
    owners: dict[str, str] = {}  # tensors -> the weight that they are part of
    for path, text in texts.items():
        where = f"{METHOD} in the metadata of {path}"
        for name, record in _records(text, where).items():
            check_name(name, where)
            if found.get(name) == record:
                continue  # all files of `save_pretrained` say the same
            problem = (
                "another file describes it otherwise"
                if name in found
                else record.problem(tensors) or _taken(name, record, tensors, owners)
            )
            if problem is not None:
                raise CheckpointError(
                    f"{where}: packed weight {name}: {shown(problem)}; save the model again"
                )
            found[name] = record
            owners |= {record.codes: name, record.scale: name}
    return tensors, found


def _taken(
    name: str, record: PackedRecord, tensors: Mapping[str, Stored], owners: Mapping[str, str]
) -> str | None:
    """Why a weight and its tensors are not each other's alone, or None."""
    other = next((owners[part] for part in (record.codes, record.scale) if part in owners), None)
    if other is not None:
        return f"its codes or scales are those of {other}"
    if name in tensors and name not in (record.codes, record.scale):
        return "a dense tensor has its name"
    return None


def _records(text: Any, where: str) -> Mapping[str, PackedRecord]:
    content = parse_json(text if isinstance(text, str) else "", where)
    version = content.get("version") if isinstance(content, dict) else None
    if version != _VERSION:
        raise CheckpointError(
            f"{where} has version {shown(repr(version))}, and this fqcompile reads {_VERSION}: "
            "install the fqcompile that wrote it, or save the model again"
        )
    return checked(_Described, content, where).weights
