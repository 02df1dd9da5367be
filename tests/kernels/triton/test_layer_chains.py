"""Layers that depend on each other, launched early, give the bits of plain launches.

What no interpreter shows: kernels that overlap. So on a GPU weights are overwritten right before
they are read, memory is given from one layer to the next, and two streams run at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from torch import Tensor

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import TileConfig
from fqcompile.kernels.template import Routing
from fqcompile.kernels.triton import launch
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.triton.oracle import (
    BF16,
    CUDA,
    on_every_device,
    packed,
    random_codes,
    running,
)

CONFIGS = [TileConfig(16, 64, 128, split, 4, 3) for split in (1, 4, 2)]


@dataclass(frozen=True)
class Chain:
    """Square layers, of which the last is of experts. `spare`: other codes for the first one."""

    layers: list[QuantizedTensor]
    experts: QuantizedTensor
    ids: Tensor
    x: Tensor
    spare: Tensor

    def __call__(self) -> Tensor:
        """Each layer reads what the one before wrote, and gives its own input's memory back."""
        first = self.layers[0].qweight
        first.copy_(self.spare)  # the kernel right before the first layer
        x = self.x * 1.5
        for layer, config in zip(self.layers, CONFIGS, strict=True):
            x = launch.dequant_gemm(x, layer, Epilogue(None, x, "silu"), config, 2)
        x = torch.nn.functional.silu(x)
        return launch.expert_gemm(x, self.experts, Routing(ids=self.ids), Epilogue(), CONFIGS[1], 2)


def chain_of(width: int, device: str) -> Chain:
    torch.manual_seed(width)

    def layer() -> QuantizedTensor:
        scale = (torch.randn(width, width // 128) / 8 / width**0.5).to(BF16)
        return packed(random_codes(4, width, width), scale, 4, 128, device=device)

    layers = [layer() for _ in CONFIGS]
    ids = torch.tensor([1, 0, 1], device=device)
    x = torch.randn(3, width).to(BF16).to(device)
    return Chain(layers, QuantizedTensor.stack([layer(), layer()]), ids, x, layer().qweight)


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Chain], Tensor]]:
    """Runs a chain with no kernel launched early."""

    def run(chain: Chain) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(launch, "early_launch", lambda device: {})
            return chain()

    yield run


def skip_where_plain(chain: Chain) -> None:
    if not launch.early_launch(chain.x.device):
        pytest.skip("kernels are not launched early on this GPU")


@on_every_device
def test_a_chain_gives_the_bits_of_plain_launches(
    device: str, plainly: Callable[[Chain], Tensor]
) -> None:
    chain = chain_of(256 if device == "cpu" else 4096, device)
    with running(device):
        skip_where_plain(chain)
        want = plainly(chain)
        for _ in range(1 if device == "cpu" else 200):
            assert torch.equal(chain(), want)
            chain.layers[0].qweight.zero_()  # what an early read would find


@pytest.mark.parametrize("device", [CUDA])
def test_a_captured_chain_gives_the_bits_of_plain_launches(
    device: str, plainly: Callable[[Chain], Tensor]
) -> None:
    """Its programmatic edges hold in every replay; weights and x change in between."""
    chain, graph = chain_of(4096, device), torch.cuda.CUDAGraph()
    skip_where_plain(chain)
    plainly(chain)
    chain()
    with torch.cuda.graph(graph):
        y = chain()
    for _ in range(100):
        chain.x.mul_(-1.01)
        chain.spare.copy_(chain.spare.roll(1, 0))
        chain.layers[0].qweight.zero_()
        graph.replay()
        got = y.clone()
        assert torch.equal(got, plainly(chain))


@pytest.mark.parametrize("device", [CUDA])
def test_chains_on_two_streams_do_not_disturb_each_other(
    device: str, plainly: Callable[[Chain], Tensor]
) -> None:
    chains = [chain_of(width, device) for width in (4096, 2048)]
    skip_where_plain(chains[0])
    wants = [plainly(chain) for chain in chains]
    streams = [torch.cuda.Stream() for _ in chains]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for chain, stream, found in zip(chains, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(chain())
    torch.cuda.synchronize()
    for want, found in zip(wants, results, strict=True):
        assert all(torch.equal(y, want) for y in found)
