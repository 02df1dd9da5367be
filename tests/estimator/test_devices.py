"""Published figures, spot-checked against data sheets by hand; names that are not known."""

import pytest

from fqcompile.errors import EstimateError
from fqcompile.estimator.devices import DEVICES, device_called

# GB, GB/s of memory, dense bf16 TFLOP/s, GB/s between GPUs in one direction: as published.
PUBLISHED = {
    "h100": (80, 3350, 989, 450),
    "a100-40": (40, 1555, 312, 300),
    "l40s": (48, 864, 362, 32),
    "b200": (180, 8000, 2250, 900),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_device_reaches_a_stated_share_of_what_is_published(name: str) -> None:
    memory, bandwidth, flops, link = PUBLISHED[name]
    device = device_called(name)
    assert device.memory == memory * 1e9
    assert device.bandwidth == pytest.approx(0.9 * bandwidth * 1e9)
    assert device.matrix_flops == pytest.approx(0.8 * flops * 1e12)
    assert device.link.bandwidth == pytest.approx(0.8 * link * 1e9)
    assert device.gpu is not None
    assert (device.gpu.bandwidth, device.gpu.matrix_flops) == (
        device.bandwidth,
        device.matrix_flops,
    )


def test_an_unknown_name_lists_those_that_are_known() -> None:
    with pytest.raises(EstimateError, match=r"h200.*a100-80.*l40s"):
        device_called("tpu")
    assert all(device.source for device in DEVICES.values())
