"""What Triton's launcher makes of real arguments, compiled for a GPU that is not there.

It turns 1 and None into constants and notes which integers and addresses 16 divides, so unlike
shapes compile unlike kernels. The driver is a stub; nothing is launched.
"""

import sys
from collections.abc import Iterator
from types import FrameType

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import driver

from bench.launch_overhead.stub_driver import StubDriver, as_on_an_h200
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import TileConfig
from fqcompile.kernels.template import Routing
from fqcompile.kernels.triton import launch
from fqcompile.kernels.triton.layout import pack
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.triton.oracle import quantized, random_codes

BF16 = torch.bfloat16


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    """In place for one test; kernels that another one compiled count their launches too."""
    monkeypatch.setattr(launch, "conversion", lambda device, dtype: "subnormal_prmt")
    monkeypatch.setattr(driver, "_active", driver._active)
    with as_on_an_h200() as stub:
        yield stub


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stub would take the GPU's place")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 16, 128), (5, 1000, 4064), (2, 37, 300)])
@pytest.mark.parametrize(
    ("bits", "group_size", "gated", "split"),
    [(4, 16, False, 1), (4, 128, True, 1), (8, 32, True, 2)],
)
def test_every_shape_compiles(
    stub: StubDriver, m: int, n: int, k: int, bits: int, group_size: int, gated: bool, split: int
) -> None:
    rows = 2 * n if gated else n
    scale = torch.ones(rows, -(-k // group_size), dtype=BF16)
    plain = quantized(random_codes(bits, rows, k), scale, bits, group_size)
    weight = QuantizedTensor(*pack(plain, 2), Format(bits, group_size, rows, k))
    x, bias = torch.randn(m, k, dtype=BF16), torch.randn(rows, dtype=BF16)
    config = TileConfig(16, 128, 128, split)
    before = stub.launches
    for end in ((bias, torch.randn(m, n, dtype=BF16)), (None, None)):
        y = launch.dequant_gemm(x, weight, Epilogue(*end, "silu", gated), config, 2)
        assert y.shape == (m, n)
    finished = split > 1 or (gated and n % 16)
    assert stub.launches - before == (4 if finished else 2)
    assert launch.dequantize(weight, BF16, 2).shape == (rows, k)
    assert stub.launches - before == (5 if finished else 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stub would take the GPU's place")
@pytest.mark.parametrize(("m", "n", "k", "experts"), [(1, 1, 1, 1), (5, 1000, 4064, 3)])
@pytest.mark.parametrize(
    ("bits", "group_size", "gated", "split"),
    [(4, 16, False, 1), (4, 128, True, 1), (8, 4096, True, 2)],
)
def test_every_shape_of_experts_compiles(
    stub: StubDriver, m: int, n: int, k: int, experts: int, bits: int, group_size: int,
    gated: bool, split: int,
) -> None:  # fmt: skip
    rows = 2 * n if gated else n
    scale = torch.ones(rows, -(-k // group_size), dtype=BF16)
    tensors = pack(quantized(random_codes(bits, rows, k), scale, bits, group_size), 2)
    stacks = (torch.stack([t] * experts) for t in tensors)
    weight = QuantizedTensor(*stacks, Format(bits, min(group_size, k), rows, k))
    x, bias = torch.randn(m, k, dtype=BF16), torch.randn(experts, rows, dtype=BF16)
    config = TileConfig(16, 128, 128, split)
    before = stub.launches
    for routing in (
        Routing(ids=torch.zeros(m, dtype=torch.int64)),
        Routing(torch.full((experts,), m, dtype=torch.int32)),
    ):
        epilogue = Epilogue(bias, None, "swiglu_oai", gated)
        y = launch.expert_gemm(x, weight, routing, epilogue, config, 2)
        assert y.shape == (m, n)
    finished = split > 1 or (gated and n % 16)
    assert stub.launches - before == (4 if finished else 2)
    assert launch.dequantize(weight, BF16, 2).shape == (experts, rows, k)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stub would take the GPU's place")
@pytest.mark.parametrize("last", [False, True])
def test_a_launch_calls_few_functions_of_ours(stub: StubDriver, last: bool) -> None:
    """Outside of CUDA graphs each takes a tenth of a microsecond of every layer."""
    plain = quantized(random_codes(4, 64, 1024), torch.ones(64, 8, dtype=BF16), 4, 128)
    weight = QuantizedTensor(*pack(plain, 2), Format(4, 128, 64, 1024))
    x, config = torch.randn(1, 1024, dtype=BF16), TileConfig(16, 64, 128, 2, last_finishes=last)
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("fqcompile."):
            called.append(frame.f_code.co_name)

    for profile in (None, note):
        sys.setprofile(profile)
        try:
            launch.dequant_gemm(x, weight, Epilogue(), config, 2)
        finally:
            sys.setprofile(None)
    whole = ["dequant_gemm", "columns", "with_whole_rows", "device_of", "is_whole", "_gemm"]
    assert called[:6] == whole
    assert called[6:] == (["meeting_place", "counters"] if last else ["_finish", "cdiv"])
