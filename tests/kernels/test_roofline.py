"""The least times, against sums done by hand."""

from dataclasses import replace

import pytest
import torch

from fqcompile.kernels import roofline
from fqcompile.kernels.roofline import (
    ideal_seconds,
    least_seconds,
    read_bandwidth,
    weight_bytes,
)
from fqcompile.kernels.spec import H200, GemmSpec

BF16 = torch.bfloat16
SPEC = GemmSpec(1, 1000, 400, 4, 128, BF16, BF16, "cuda", gpu=H200)


def test_bytes_are_those_of_codes_and_scales() -> None:
    assert weight_bytes(SPEC) == 1000 * 400 // 2 + 1000 * 4 * 2
    assert weight_bytes(replace(SPEC, bits=8, group_size=400)) == 1000 * 400 + 1000 * 2
    assert weight_bytes(replace(SPEC, gated=True)) == 2 * weight_bytes(SPEC)


def test_few_rows_take_the_time_of_their_bytes_and_many_that_of_their_flops() -> None:
    moved = weight_bytes(SPEC) + 2 * (400 + 1000)
    assert ideal_seconds(SPEC, 1) == pytest.approx(moved / H200.bandwidth)
    residual = replace(SPEC, has_residual=True)
    assert ideal_seconds(residual, 1) == pytest.approx((moved + 2000) / H200.bandwidth)
    wide = replace(SPEC, n=8192, k=8192)
    assert ideal_seconds(wide, 4096) == pytest.approx(2 * 4096 * 8192**2 / H200.matrix_flops)


def test_on_a_cpu_bytes_are_read_at_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "read_bandwidth", lambda: 20e9)
    here = replace(SPEC, device_type="cpu", gpu=None, m=3)
    moved = weight_bytes(SPEC) + 3 * 2 * (400 + 1000)
    assert least_seconds(here) == pytest.approx(moved / 20e9)
    experts = replace(here, experts=4, routing="gathered", m=2)
    hit = 4 * (1 - (3 / 4) ** 2)
    moved = hit * weight_bytes(SPEC) + 2 * 2 * (400 + 1000)
    assert least_seconds(experts) == pytest.approx(moved / 20e9)
    assert least_seconds(SPEC) == ideal_seconds(SPEC, 1)
    assert least_seconds(replace(here, device_type="cuda")) is None


def test_the_rate_is_measured_once_for_each_number_of_threads() -> None:
    rate = read_bandwidth()
    assert 1e8 < rate < 1e13
    assert read_bandwidth() == rate
