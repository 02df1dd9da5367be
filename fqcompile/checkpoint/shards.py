"""Shards: safetensors files that are written atomically, and memory-mapped for reading."""

import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fqcompile.checkpoint.manifest import SHARD, Manifest, ShardRecord, TensorRecord
from fqcompile.checkpoint.packed_record import PackedRecord, described, to_disk
from fqcompile.errors import CheckpointError
from fqcompile.files.safetensors_file import (
    ALIGNMENT,
    DTYPE_NAMES,
    DTYPES,
    bytes_of,
    consecutive,
    encode_header,
)
from fqcompile.files.trusted import Piece, write_file
from fqcompile.tensor.quantized import QuantizedTensor

# Bytes collected before a shard is written: the most work that a killed run loses, and the most
# memory that waiting tensors take.
SHARD_BYTES = 256 << 20


def shard_name(generation: str, index: int) -> str:
    """The file name of a shard, which no other save uses."""
    return f"{SHARD}{generation}-{index:05d}.safetensors"


class ShardWriter:
    """Collects tensors, and writes them as shards of about `shard_bytes` (SHARD_BYTES).

    Several writers of one save use every `step`-th file number each, starting at `first`.
    """

    def __init__(
        self,
        directory: Path,
        generation: str,
        shard_bytes: int | None = None,
        shards: Sequence[ShardRecord] = (),
        tensors: Mapping[str, TensorRecord] | None = None,
        first: int = 0,
        step: int = 1,
    ) -> None:
        self._directory, self._generation = directory, generation
        self._limit = SHARD_BYTES if shard_bytes is None else shard_bytes
        self._first, self._step = first, step
        self.shards = list(shards)
        self.tensors = dict(tensors or {})
        self._waiting: dict[str, Tensor] = {}
        self._records: dict[str, PackedRecord] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors to one shard; they must not change until it is written.

        Raises:
            CheckpointError: the format has no name for a tensor's type.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(
                    f"{name} is of {tensor.dtype}, which safetensors files cannot hold; cast it to "
                    f"one of {', '.join(DTYPE_NAMES.values())}"
                )
            self._waiting[name] = tensor.detach().cpu().contiguous()

    def add_packed(self, name: str, weight: QuantizedTensor, dtype: torch.dtype) -> PackedRecord:
        """Add a packed weight of this dtype, experts stacked along the rows; return its record."""
        record, tensors = to_disk(name, weight, dtype)
        self.add(tensors)
        self._records[name] = record
        return record

    @property
    def is_full(self) -> bool:
        return sum(t.nbytes for t in self._waiting.values()) >= self._limit

    def flush(self) -> dict[str, TensorRecord]:
        """Write the waiting tensors as a shard; return their records."""
        if not self._waiting:
            return {}
        # Those of odd sizes last: the others stay aligned.
        ordered = dict(
            sorted(self._waiting.items(), key=lambda item: item[1].nbytes % ALIGNMENT != 0)
        )
        forms = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in ordered.items()}
        entries = consecutive(forms)
        header = encode_header(entries, described(self._records))
        pieces: list[Piece] = [header, *map(bytes_of, ordered.values())]
        records = {
            name: TensorRecord(len(self.shards), *entry, hashlib.sha256(piece).hexdigest())
            for (name, entry), piece in zip(entries.items(), pieces[1:], strict=True)
        }
        number = self._first + self._step * len(self.shards)
        file = shard_name(self._generation, number)
        self._write(file, pieces)
        self.shards.append(ShardRecord(file, sum(map(len, pieces)), described=True))
        self.tensors.update(records)
        self._waiting.clear()
        self._records.clear()
        return records

    def _write(self, file: str, pieces: Sequence[Piece]) -> None:
        write_file(self._directory / file, pieces)


class DigestWriter(ShardWriter):
    """Writes nothing: makes only the tensors' records, to compare with the writing rank's."""

    def _write(self, file: str, pieces: Sequence[Piece]) -> None:
        pass


class MappedShards:
    """The tensors of a manifest, in private memory maps: changes are not written back.

    Args:
        verify: compare the checksum of each tensor when it is first read.

    Raises:
        CheckpointError: a file is missing, or has another size or header than was written.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self._directory, self._manifest, self._verify = directory, manifest, verify
        self._verified: set[str] = set()
        self._maps: list[mmap.mmap] = []
        self._starts: list[int] = []
        for index, shard in enumerate(manifest.shards):
            header = manifest.shard_header(index)
            self._maps.append(_mapped(directory / shard.file, shard, header))
            self._starts.append(len(header))

    def packed(self, record: PackedRecord) -> QuantizedTensor:
        """Codes and scales, as views of the mapped file."""
        tensors = self.tensor(record.codes), self.tensor(record.scale)
        return QuantizedTensor.of_rows(*tensors, record.format)

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file.

        Raises:
            CheckpointError: its bytes are damaged, or beyond the end of the file.
        """
        record = self._manifest.tensors[name]
        file = self._directory / self._manifest.shards[record.shard].file
        mapped, start = self._maps[record.shard], self._starts[record.shard] + record.start
        if start + record.nbytes > len(mapped):
            raise CheckpointError(f"{file} ends before tensor {name}; copy it again")
        if not record.nbytes:
            return torch.empty(record.shape, dtype=DTYPES[record.dtype])
        with memoryview(mapped) as whole, whole[start : start + record.nbytes] as part:
            verify = self._verify and name not in self._verified
            if verify and hashlib.sha256(part).hexdigest() != record.sha256:
                raise CheckpointError(
                    f"{file}: tensor {name} is not what was written: its checksum differs; copy "
                    "the file again"
                )
        self._verified.add(name)
        dtype = DTYPES[record.dtype]
        count = record.nbytes // dtype.itemsize
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
        return flat.view(record.shape)

    def release(self, name: str) -> None:
        """Release the pages of a tensor that was copied; they are read again if needed."""
        record = self._manifest.tensors[name]
        start = self._starts[record.shard] + record.start
        first, last = -(-start // mmap.PAGESIZE), (start + record.nbytes) // mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            place = first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE
            self._maps[record.shard].madvise(mmap.MADV_DONTNEED, *place)


def _mapped(path: Path, shard: ShardRecord, header: bytes) -> mmap.mmap:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the whole directory again")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            raise CheckpointError(
                f"{path} has {size} bytes, and {shard.bytes} were written: it was cut short or "
                "changed; copy it again"
            )
        if file.read(len(header)) != header:
            raise CheckpointError(f"the header of {path} is not what was written; copy it again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
