"""find_or_quantize: what an earlier start has made of the same weight, or made now and kept.

A weight is found by its content and all else that its codes depend on, never by its name:

    w, options, scale type, versions of the quantiser and of torch  ──►  key
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fqcompile.config import SiteOptions
from fqcompile.quant.choose import choose_and_quantize
from fqcompile.weights.disk_cache import disk_cache
from fqcompile.weights.entry_file import Entry
from fqcompile.weights.fingerprint import Values, values_of

log = logging.getLogger("fqcompile")

# So many are named, found, read and checked in .4 ms, and quantised in 1.3 (int8) or 7 (int4); for
# fewer there is little to gain from a file.
LEAST_WEIGHTS = 1 << 16

# Another version of the quantiser may choose other codes, and does not find these.
_HERE = Path(__file__).parent
_FOLDERS = (_HERE.parent / "tensor", _HERE.parent / "quant")
_SOURCES = [
    *(p for folder in _FOLDERS for p in sorted(folder.glob("*.py"))),
    _HERE / "entry_file.py",
]
VERSION = sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()


def find_or_quantize(
    w: Tensor, options: SiteOptions, scale_dtype: torch.dtype, values: Values | None = None
) -> Entry:
    """`choose_and_quantize` where its result is not on disk; w is [N, K] or [E, N, K].

    `values` are those of w where the caller knows them. What is made of w is kept only if w still
    has them: another thread may write to it meanwhile, and codes of its values must not be found
    under the name of the old ones.

    Weights on a GPU are quantised there each time: to name them, all their bytes would go to the
    host and through its cores first.
    """
    make = partial(choose_and_quantize, w, options, scale_dtype)
    found = disk_cache()
    worth_it = w.device.type == "cpu" and w.dim() in (2, 3) and w.numel() >= LEAST_WEIGHTS
    if found is None or not worth_it:
        return make()
    before = values or values_of(w)
    key = entry_key(before.digest, options, scale_dtype)
    return found.get_or_make(key, make, lambda: values_of(w) == before)


def entry_key(digest: str, options: SiteOptions, scale_dtype: torch.dtype) -> str:
    """Equal where the same version makes the same codes and scales of weights of this digest."""
    chosen = {f.name: getattr(options, f.name) for f in fields(SiteOptions)}
    parts = [VERSION, torch.__version__, chosen, str(scale_dtype), digest]
    return sha256(json.dumps(parts).encode()).hexdigest()


@contextmanager
def use_logged() -> Iterator[None]:
    """Says afterwards how many weights were found on disk."""
    found = disk_cache()
    before = (found.hits, found.misses) if found else (0, 0)
    yield
    if found:
        hits, misses = found.hits - before[0], found.misses - before[1]
        if hits or misses:
            log.info(
                "%d of %d weights were found quantised in %s", hits, hits + misses, found.directory
            )
