"""Keys: what two matmuls must share to share a measurement, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fqcompile.kernels.spec import A100, H200
from fqcompile.kernels.tuning import key
from fqcompile.kernels.tuning.key import (
    M_BUCKETS,
    bucket_name,
    bucket_of,
    fingerprint,
    kernel_source_hash,
    rows_of,
    tuning_key,
)
from tests.kernels.tuning.fake import SPEC


def test_buckets_are_those_of_the_design() -> None:
    expected = {0: 1, 1: 1, 2: 4, 4: 4, 5: 8, 9: 16, 17: 32, 33: 64, 65: 128, 129: 256, 257: 512}
    assert {m: bucket_of(m, SPEC) for m in expected} == expected
    assert bucket_of(512, SPEC) == 512
    assert bucket_of(513, SPEC) is None
    assert [rows_of(bucket, SPEC) for bucket in M_BUCKETS] == list(M_BUCKETS)
    assert rows_of(None, SPEC) > 512
    names = [bucket_name(bucket, SPEC) for bucket in (16, None, 17)]
    assert names == ["M <= 16", "M > 512", "M = 17"]


def test_rows_grouped_by_expert_have_buckets_of_their_own_beyond() -> None:
    """Gathered ones do not: a program has one of them, so what is best for 512 is for more."""
    grouped, gathered = replace(SPEC, **GROUPED), replace(SPEC, experts=8, routing="gathered")
    assert bucket_of(512, grouped) == 512
    assert [bucket_of(m, grouped) for m in (513, 2049, 8193)] == [2048, 8192, None]
    assert rows_of(None, grouped) > 8192
    assert bucket_name(None, grouped) == "M > 8192"
    assert bucket_of(513, gathered) is None
    assert rows_of(None, gathered) == rows_of(None, SPEC)


def test_a_key_names_the_experts_and_how_rows_reach_them() -> None:
    keys = [
        tuning_key(replace(SPEC, experts=experts, routing=routing), "v1")
        for experts in (8, 128)
        for routing in ("grouped", "gathered")
    ]
    assert len({*keys, tuning_key(SPEC, "v1")}) == 5
    assert keys[0].startswith("experts=8 grouped sm_90/132 4096x14336 int4")


GROUPED = {"experts": 8, "routing": "grouped"}


def test_a_key_can_be_read() -> None:
    text = "dense sm_90/132 4096x14336 int4 g128 bfloat16 scale:bfloat16 fragment2_v1 plain"
    assert tuning_key(SPEC, "fragment2_v1") == text


SHARED = {
    "m": 3,
    "m_range": (1, None),
    "has_bias": True,
    "has_residual": True,
    "needs_backward": True,
    "activation": "gelu",
}
APART = {
    "n": 8192,
    "k": 4096,
    "bits": 8,
    "group_size": 64,
    "dtype": torch.float16,
    "scale_dtype": torch.float32,
    "gated": True,
    "gpu": A100,
}


@pytest.mark.parametrize("name", SHARED)
def test_layers_share_a_key_whatever_their(name: str) -> None:
    other = replace(SPEC, **{name: SHARED[name]})
    assert tuning_key(other, "plain") == tuning_key(SPEC, "plain")


@pytest.mark.parametrize("name", APART)
def test_a_key_is_of_one(name: str) -> None:
    other = replace(SPEC, **{name: APART[name]})
    assert tuning_key(other, "plain") != tuning_key(SPEC, "plain")


def test_a_key_is_of_one_layout_and_its_version() -> None:
    assert len({tuning_key(SPEC, name) for name in ("plain", "fragment2_v1", "fragment2_v2")}) == 3


def test_the_fingerprint_names_machine_versions_and_kernels() -> None:
    found = fingerprint(H200, "abc")
    assert found["gpu"] == "NVIDIA H200"
    assert found["kernels"] == "abc"
    assert found["torch"] == torch.__version__
    assert set(found) == {"gpu", "sms", "driver", "cuda", "torch", "triton", "kernels"}
    assert all(isinstance(value, str) and value for value in found.values())


def test_the_source_hash_follows_names_and_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key, "_TRITON_SOURCE", tmp_path)
    seen = []
    for name, text in (("a.py", "x = 1\n"), ("a.py", "x = 2\n"), ("b.py", "")):
        (tmp_path / name).write_text(text)
        kernel_source_hash.cache_clear()
        seen.append(kernel_source_hash())
    kernel_source_hash.cache_clear()
    assert len(set(seen)) == 3


def test_the_drivers_version_is_found_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\n"
    file = tmp_path / "version"
    file.write_text(text)
    monkeypatch.setattr(key, "_NVIDIA_DRIVER", file)
    key._driver.cache_clear()
    assert key._driver() == "570.133.20"
    file.unlink()
    key._driver.cache_clear()
    assert key._driver() == "unknown"
    key._driver.cache_clear()
