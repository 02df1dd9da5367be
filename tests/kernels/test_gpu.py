"""What is known of a GPU, and what is derived for one that is not."""

from types import SimpleNamespace

import pytest
import torch

from fqcompile.errors import NoKernelError
from fqcompile.kernels import gpu
from fqcompile.kernels.gpu import A100, H200, Gpu, gpu_of

# As an H200's driver describes it.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    clock_rate=1_980_000,
    memory_clock_rate=3_201_000,
    memory_bus_width=6144,
    shared_memory_per_multiprocessor=228 << 10,
    gcnArchName="",
)


def visible(monkeypatch: pytest.MonkeyPatch, **changes: object) -> Gpu:
    properties = SimpleNamespace(**{**vars(PROPERTIES), **changes})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    gpu._gpu_at.cache_clear()
    try:
        return gpu_of(torch.device("cuda"))
    finally:
        gpu._gpu_at.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_that_is_what_the_error_says() -> None:
    with pytest.raises(NoKernelError, match="device cuda: torch sees no GPU on this machine"):
        gpu_of(torch.device("cuda"))


def test_a_known_gpu_is_taken_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible(monkeypatch) is H200


def test_an_unknown_one_is_derived_from_its_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = visible(monkeypatch, name="NVIDIA H2000")
    assert (found.arch, found.capability, found.num_sms) == ("sm_90", 90, 132)
    assert found.shared_bytes == H200.shared_bytes
    assert found.bandwidth == pytest.approx(H200.bandwidth, rel=0.05)
    assert found.matrix_flops == pytest.approx(H200.matrix_flops, rel=0.15)


def test_clocks_that_are_not_told_are_no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    found = visible(monkeypatch, name="NVIDIA vGPU", clock_rate=0, memory_clock_rate=0)
    assert min(found.clock_hz, found.bandwidth, found.matrix_flops) > 0


def test_amd_has_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    found = visible(monkeypatch, name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+")
    assert (found.arch, found.capability) == ("gfx942", 0)
    assert A100.capability == 80
