"""The disk cache of quantized weights, which makes the next start of the same model faster.

A weight is found by its content and everything else its codes depend on, never by its name:

    w, h, options, scale type, versions of the quantizer and of torch  ──►  key
    key  ──►  <cache directory>/weights/<key>.safetensors

    qweight, scale      the plain layout, which does not depend on the machine
    __metadata__.plan   how the weight was quantized, as JSON
    __metadata__.digest SHA-256 over the key, the plan, and the types, shapes and bytes of both

Files are replaced atomically under a lock, so processes may share them. If the size limit would be
exceeded, the least recently used files are deleted. A file whose digest does not match is deleted
and counts as missing. If the directory cannot be written, or others may write to it, a warning is
logged once and nothing is stored.

FQCOMPILE_CACHE_SIZE is the limit in GiB; 0 disables the cache.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fqcompile.config import SiteOptions
from fqcompile.errors import CorruptEntry
from fqcompile.files.safetensors_file import (
    DTYPE_NAMES,
    bytes_of,
    consecutive,
    encode_header,
    read_header,
    read_tensor,
)
from fqcompile.files.trusted import (
    Piece,
    cache_directory,
    check_trusted,
    replace_file,
    warn_unusable,
    writing,
)
from fqcompile.kernels.cpu.huge_pages import in_huge_pages
from fqcompile.quant.choose import QuantPlan, choose_and_quantize
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.fingerprint import Values, content_digest, values_of

log = logging.getLogger("fqcompile")

SIZE = "FQCOMPILE_CACHE_SIZE"
_DEFAULT_GIB = 16.0
# This many weights are hashed, found, read and checked in 0.4 ms, and quantized in 1.3 ms (int8) or
# 7 ms (int4); for fewer, a file gains little.
LEAST_WEIGHTS = 1 << 16

# A digest of the quantizer's source: other versions may choose other codes and must not find these.
_PACKAGE = Path(__file__).parent.parent
_SOURCES = (
    *(p for name in ("tensor", "quant") for p in sorted((_PACKAGE / name).glob("*.py"))),
    *(_PACKAGE / "native" / name for name in ("quantize.cpp", "rounding.h", "sums.h", "vectors.h")),
    Path(__file__),
    _PACKAGE / "files" / "safetensors_file.py",
)
VERSION = sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()

Entry = tuple[QuantPlan, QuantizedTensor]

_CORRUPT = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError
)  # fmt: skip


def encoded(key: str, entry: Entry) -> list[Piece]:
    """The pieces of the file that stores this weight (on a CPU) under `key`."""
    plan, weight = entry
    scale_dtype = str(plan.scale_dtype).removeprefix("torch.")
    about = {**vars(plan), "scale_dtype": scale_dtype, "k": weight.k}
    text = json.dumps(about)
    # The wider type first, so that each value is aligned to its size.
    qweight, scale = weight.as_rows()
    tensors = {"scale": scale.contiguous(), "qweight": qweight.contiguous()}
    digest = _digest(key, text, tensors["qweight"], tensors["scale"])
    forms = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    header = encode_header(consecutive(forms), {"plan": text, "digest": digest})
    return [header, *map(bytes_of, tensors.values())]


def read_entry(path: Path, key: str) -> Entry:
    """The weight that was written for `key`, copied out of the file.

    Raises:
        CorruptEntry: the file is truncated, damaged, or was written for another key.
        OSError: the file cannot be read or does not exist.
    """
    try:
        places, metadata = read_header(path)
        qweight, scale = (read_tensor(places[name], in_huge_pages) for name in ("qweight", "scale"))
        text = metadata["plan"]
        if metadata["digest"] != _digest(key, text, qweight, scale):
            raise CorruptEntry("its digest is that of other content")
        return _entry(json.loads(text), qweight, scale)
    except _CORRUPT as error:
        raise CorruptEntry(f"{path}: {type(error).__name__}: {error}") from error


def _digest(key: str, plan: str, qweight: Tensor, scale: Tensor) -> str:
    parts = [key, plan, content_digest(qweight), content_digest(scale)]
    return sha256("\0".join(parts).encode()).hexdigest()


def _entry(about: dict[str, Any], qweight: Tensor, scale: Tensor) -> Entry:
    k = about.pop("k")
    about["scale_dtype"] = getattr(torch, about["scale_dtype"])
    about["expert_errors"] = tuple(about["expert_errors"])
    plan = QuantPlan(**about)
    experts = len(plan.expert_errors)
    form = plan.form(qweight.shape[0] // max(1, experts), k, experts)
    return plan, QuantizedTensor.of_rows(qweight, scale, form)


class Usage(NamedTuple):
    """The number of entries in a cache, and their bytes."""

    entries: int
    nbytes: int


class DiskCache:
    """The quantized weights in `directory`, at most `limit` bytes in all.

    Files that this process has used are not evicted: a model larger than the limit finds a part of
    its weights at the next start, instead of none.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self.hits = self.misses = 0
        self._used: set[Path] = set()
        self._writable = True
        self._warned = False

    def get_or_make(
        self, key: str, make: Callable[[], Entry], is_of_key: Callable[[], bool] = lambda: True
    ) -> Entry:
        """The weight stored for `key`; else the result of `make()`, stored if `is_of_key()`."""
        path = self.directory / f"{key}.safetensors"
        entry = self._find(path, key)
        if entry is not None:
            self.hits += 1
            return entry
        entry = make()
        self.misses += 1
        if self._writable and is_of_key():
            self._keep(path, key, entry)
        return entry

    def usage(self) -> Usage:
        sizes = [size for _, size, _ in self._files()]
        return Usage(len(sizes), sum(sizes))

    def _find(self, path: Path, key: str) -> Entry | None:
        try:
            check_trusted(path)
            entry = read_entry(path, key)
        except FileNotFoundError:
            return None
        except CorruptEntry as error:
            log.info("a quantized weight on disk is not used: %s", error)
            with suppress(OSError):
                path.unlink()
            return None
        except OSError as error:
            warn_unusable(self.directory, error)
            return None
        self._used.add(path)
        with suppress(OSError):  # fails in a directory that this user may only read
            os.utime(path)
        return entry

    def _keep(self, path: Path, key: str, entry: Entry) -> None:
        pieces = encoded(key, entry)
        try:
            with writing(self.directory):
                # Processes that start together make the same weights at the same time.
                if not path.exists():
                    if not self._make_room(sum(map(len, pieces))):
                        return
                    replace_file(path, pieces)
                self._used.add(path)
        except OSError as error:
            self._writable = False
            warn_unusable(self.directory, error)

    def _make_room(self, size: int) -> bool:
        """Evict the least recently used files until `size` bytes fit; none if they never can."""
        files = sorted(self._files())
        others = [(path, nbytes) for _, nbytes, path in files if path not in self._used]
        excess = sum(nbytes for _, nbytes, _ in files) + size - self.limit
        if excess > sum(nbytes for _, nbytes in others):
            if not self._warned:
                log.warning(
                    "the weights of this process need more than the limit of %.3g GiB for %s: the "
                    "next start quantizes the rest again; raise %s (in GiB)",
                    self.limit / 2**30,
                    self.directory,
                    SIZE,
                )
            self._warned = True
            return False
        for path, nbytes in others:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= nbytes
        return True

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of each file; other processes may delete some."""
        for path in self.directory.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                about = path.stat()
                yield about.st_mtime_ns, about.st_size, path


def disk_cache() -> DiskCache | None:
    """The cache that the environment configures, one per process; None if it is disabled."""
    limit = _limit(os.environ.get(SIZE) or str(_DEFAULT_GIB))
    return _cache(cache_directory() / "weights", limit) if limit else None


@cache
def _cache(directory: Path, limit: int) -> DiskCache:
    return DiskCache(directory, limit)


@cache
def _limit(gib: str) -> int:
    """The limit in bytes; an invalid size is logged once and disables the cache."""
    try:
        size = float(gib)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        log.warning(
            "%s is %r; allowed: a number of GiB from 0 (off) up. No weights are stored.", SIZE, gib
        )
        return 0
    return int(size * 2**30)


def find_or_quantize(
    w: Tensor,
    options: SiteOptions,
    scale_dtype: torch.dtype,
    h: Tensor | None = None,
    values: Values | None = None,
) -> Entry:
    """The result of `choose_and_quantize`, from disk if it is there; w is [N, K] or [E, N, K].

    `values` are the values of w if the caller has computed them. The result is stored only if w
    still has these values afterwards: another thread may write to it meanwhile, and codes of the
    new values must not be stored under the key of the old ones.

    Weights on a GPU are always quantized again: for a key, all their bytes would have to be copied
    to the host and hashed there.
    """
    make = partial(choose_and_quantize, w, options, scale_dtype, h)
    found = disk_cache()
    worth_it = w.device.type == "cpu" and w.dim() in (2, 3) and w.numel() >= LEAST_WEIGHTS
    if found is None or not worth_it:
        return make()
    before = values or values_of(w)
    key = entry_key(before.digest, options, scale_dtype, h)
    return found.get_or_make(key, make, lambda: values_of(w) == before)


def entry_key(
    digest: str, options: SiteOptions, scale_dtype: torch.dtype, h: Tensor | None = None
) -> str:
    """A key that is equal only if the same version makes the same codes and scales."""
    chosen = {f.name: getattr(options, f.name) for f in fields(SiteOptions)}
    parts = [VERSION, torch.__version__, chosen, str(scale_dtype), digest]
    if h is not None:
        parts.append(sha256(bytes_of(h.cpu().contiguous())).hexdigest())
    return sha256(json.dumps(parts).encode()).hexdigest()
