"""What is asked of a GPU, and what follows from its answer."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from fqcompile.kernels.spec import H200
from fqcompile.kernels.triton import target
from fqcompile.tensor.format import NORMAL4
from tests.kernels.triton.interpreter import CheckedBuilder, interpreted
from tests.kernels.triton.interpreter_numbers import Handle, rounded, values
from tests.kernels.triton.oracle import BF16, FP16, NARROW, on_every_device, running

CPU = torch.device("cpu")
ARCHES = {"sm_80": 4, "sm_86": 4, "sm_89": 4, "sm_90": 2, "sm_100": 2, "sm_120": 4, "gfx942": 2}


@pytest.mark.parametrize("arch", ARCHES)
def test_kwidth_is_that_of_the_instruction(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(H200, arch=arch)
    for version, want in {(3, 6): ARCHES[arch], (3, 7): ARCHES[arch], (3, 8): 2, (4, 0): 2}.items():
        monkeypatch.setattr(target, "_TRITON", version)
        assert target.kwidth(gpu) == want, version


@pytest.mark.parametrize("hip", [None, "6.4"])
@pytest.mark.parametrize("kept", [True, False])
def test_conversion_follows_the_probe(
    kept: bool, hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(target, "keeps_subnormals", lambda *key: asked.append(key) or kept)
    monkeypatch.setattr(torch.version, "hip", hip)
    kept_form = "subnormal" if hip else "subnormal_prmt"
    chosen = target._probed(CPU, BF16)
    assert chosen == (kept_form if kept else "exponent")
    assert asked == [(CPU, BF16)]


def test_conversion_probes_each_device_and_type_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(target, "keeps_subnormals", lambda *key: asked.append(key) or True)
    monkeypatch.setattr(target, "_CONVERSIONS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    keys = list(itertools.product((CPU, torch.device("cuda", 7)), NARROW))
    for key in keys * 2:
        target.conversion(*key)
    assert asked == keys


def test_nothing_is_probed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "keeps_subnormals", lambda *key: pytest.fail("probed"))
    monkeypatch.setattr(target, "_CONVERSIONS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert target.conversion(torch.device("cuda", 0), BF16) == "exponent"
    assert target._CONVERSIONS == {}


@on_every_device
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_subnormals_are_kept_here(dtype: torch.dtype, device: str) -> None:
    with running(device):
        assert target.keeps_subnormals(torch.device(device), dtype)


def flushed(handle: Any, kind: Any) -> Any:
    """With subnormal numbers of that type replaced by zero."""
    least = {tl.float16: 2.0**-14, tl.bfloat16: 2.0**-126}.get(handle.dtype.scalar)
    if handle.dtype.scalar != kind:
        return handle
    numbers = values(handle).astype(np.float64)
    return rounded(np.where(np.abs(numbers) < least, 0.0, numbers), kind)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("flushing", NARROW, ids=str)
def test_the_probe_notices_a_gpu_that_flushes(
    flushing: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {FP16: tl.float16, BF16: tl.bfloat16}[flushing]
    fma = CheckedBuilder.create_fma
    monkeypatch.setattr(
        CheckedBuilder,
        "create_fma",
        lambda self, *operands: fma(self, *(flushed(handle, kind) for handle in operands)),
    )
    with interpreted():
        assert target.keeps_subnormals(CPU, dtype) == (flushing != dtype)


@pytest.mark.parametrize(
    "level", [7.0, 127.0, 16 * NORMAL4.values[-1]], ids=["int4", "int8", "normal4"]
)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_probe_notices_one_wrong_level_of_every_format(
    dtype: torch.dtype, level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest one, wherever it enters a dot."""
    factor = {FP16: 512, BF16: 64}[dtype]
    largest = level / factor
    dot = CheckedBuilder.create_dot

    def off_by_one(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        numbers = values(a).astype(np.float64)
        numbers = np.where(numbers == largest, largest - 1 / factor, numbers)
        return dot(self, Handle(rounded(numbers, a.dtype.scalar).data, a.dtype), b, *rest)

    monkeypatch.setattr(CheckedBuilder, "create_dot", off_by_one)
    with interpreted():
        assert not target.keeps_subnormals(CPU, dtype)
