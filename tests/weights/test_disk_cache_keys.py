"""What a weight is found by on disk, and where it is not looked for."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fqcompile.config import SiteOptions
from fqcompile.errors import UnquantizableWeight
from fqcompile.quant.choose import choose_and_quantize
from fqcompile.weights import disk_cache as module
from fqcompile.weights.disk_cache import DiskCache, disk_cache, entry_key, find_or_quantize
from fqcompile.weights.fingerprint import content_digest
from fqcompile.weights.recipe import IDENTITY
from fqcompile.weights.store import WeightStore
from tests.weights.test_disk_cache_entries import assert_same

BF16 = torch.bfloat16
W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
OTHER_OPTIONS = {
    "bits": 8, "levels": "uniform", "granularity": 32, "alpha": 0.8, "min_group_size": 64,
    "error_budget": 0.5, "scale_method": "absmax",
}  # fmt: skip


def test_a_key_depends_on_the_weight_and_every_option() -> None:
    assert set(OTHER_OPTIONS) == {f.name for f in fields(SiteOptions)}
    changed = W.clone()
    changed[-1, -1] += 1
    weights = (W, changed, W.half(), W.view(96, 64))
    keys = [entry_key(content_digest(w), SiteOptions(), BF16) for w in weights]
    options = [SiteOptions(**{n: v}) for n, v in OTHER_OPTIONS.items()]  # type: ignore[arg-type]
    keys += [entry_key(content_digest(W), option, BF16) for option in options]
    keys.append(entry_key(content_digest(W), SiteOptions(), torch.float16))
    assert len(set(keys)) == len(keys)
    assert entry_key(content_digest(W.clone()), SiteOptions(bits=4), BF16) == keys[0]


@pytest.mark.parametrize(("owner", "name"), [(module, "VERSION"), (torch, "__version__")])
def test_another_version_finds_nothing(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = entry_key(content_digest(W), SiteOptions(), BF16)
    monkeypatch.setattr(owner, name, "another")
    assert entry_key(content_digest(W), SiteOptions(), BF16) != before


def test_the_version_is_of_all_that_makes_codes_and_files() -> None:
    package = Path(module.__file__).parent.parent
    folders = (package / "tensor", package / "quant")
    made = {p.name for folder in folders for p in folder.iterdir() if p.suffix == ".py"}
    files = {"disk_cache.py", "safetensors_file.py"}
    native = {"quantize.cpp", "rounding.h", "sums.h", "vectors.h"}
    assert {path.name for path in module._SOURCES} == made | native | files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DiskCache:
    """That of this process, switched on, in a directory of its own, for weights of any size."""
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FQCOMPILE_CACHE_SIZE", "1")
    monkeypatch.setattr(module, "LEAST_WEIGHTS", 1)
    found = disk_cache()
    assert found is not None
    assert disk_cache() is found
    assert (found.directory, found.limit) == (tmp_path / "weights", 2**30)
    return found


@pytest.mark.parametrize("shape", [(64, 96), (3, 20, 33)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_is_found_as_it_was_quantized(
    shape: tuple[int, ...], bits: int, cache: DiskCache
) -> None:
    w, options = torch.randn(shape), SiteOptions(bits=bits)
    made = find_or_quantize(w, options, torch.float16)
    found = find_or_quantize(w.clone().requires_grad_(), options, torch.float16)
    assert (cache.hits, cache.misses) == (1, 1)
    assert_same(found, made)
    assert_same(found, choose_and_quantize(w, options, torch.float16))


def test_weights_of_errors_are_part_of_the_key(cache: DiskCache) -> None:
    w, heavy = torch.randn(64, 96), torch.ones(96)
    heavy[:8] = 100
    for h in (None, torch.ones(96), heavy):
        for _ in range(2):
            found = find_or_quantize(w, SiteOptions(), torch.float16, h)
            assert_same(found, choose_and_quantize(w, SiteOptions(), torch.float16, h))
    assert (cache.hits, cache.misses) == (3, 3)


def test_small_weights_are_no_files(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_WEIGHTS", W.numel() + 1)
    find_or_quantize(W, SiteOptions(), BF16)
    assert (cache.misses, cache.usage().entries) == (0, 0)


@pytest.mark.parametrize("w", [torch.empty(8, 8, device="meta"), torch.zeros(8)])
def test_what_cannot_be_named_is_refused_as_without_a_cache(w: Tensor, cache: DiskCache) -> None:
    with pytest.raises(UnquantizableWeight):
        find_or_quantize(w, SiteOptions(), BF16)
    assert cache.misses == 0


def test_zero_switches_it_off(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FQCOMPILE_CACHE_SIZE", "0")
    assert disk_cache() is None
    find_or_quantize(W, SiteOptions(), BF16)
    assert cache.misses == 0
    monkeypatch.delenv("FQCOMPILE_CACHE_SIZE")
    default = disk_cache()
    assert default is not None
    assert default.limit == 16 * 2**30


@pytest.mark.parametrize("text", ["16GiB", "-1", "inf", "nan"])
def test_what_is_no_size_is_said_and_keeps_nothing(
    text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FQCOMPILE_CACHE_SIZE", text)
    assert disk_cache() is None
    assert disk_cache() is None
    (said,) = [r.message for r in caplog.records]
    assert f"FQCOMPILE_CACHE_SIZE is {text!r}" in said
    assert "a number of GiB" in said


def test_a_weight_in_training_is_not_kept_again(cache: DiskCache) -> None:
    store, w = WeightStore(), W.clone()
    plans = [store.plan(IDENTITY, (w,), SiteOptions(), BF16)]
    for step in range(3):
        w.mul_(2.0 + step)
        plans.append(store.plan(IDENTITY, (w,), SiteOptions(), BF16))
    assert (cache.hits, cache.misses, cache.usage().entries) == (0, 1, 1)
    assert plans[0] == WeightStore().plan(IDENTITY, (W.clone(),), SiteOptions(), BF16)
    assert cache.hits == 1


@pytest.mark.parametrize("meanwhile", ["copy_", "data", "there and back"])
def test_codes_of_new_values_are_not_kept_under_the_name_of_the_old(
    meanwhile: str, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread loads a state dict while the weight is quantized."""
    w, old, new = W.clone(), W.clone(), W.flip(0)
    make = choose_and_quantize

    def written_meanwhile(w: Tensor, *args: Any) -> Any:
        (w.data if meanwhile == "data" else w).copy_(new)
        result = make(w, *args)
        if meanwhile == "there and back":
            w.copy_(old)
        return result

    monkeypatch.setattr(module, "choose_and_quantize", written_meanwhile)
    find_or_quantize(w, SiteOptions(), BF16)
    assert (cache.misses, cache.usage().entries) == (1, 0)
