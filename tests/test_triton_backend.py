"""Whole models through the backend with the Triton family, whose kernels the interpreter runs.

The graphs are captured on the CPU; `select` is told that their tensors lie on a GPU.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton", reason="Triton is not installed")

from triton import OutOfResources

import fqcompile
from fqcompile.kernels import op
from fqcompile.kernels import run as run_module
from fqcompile.kernels.spec import A100, DENSE, H200, GemmSpec, Gpu, LaunchTable
from fqcompile.kernels.triton import template
from fqcompile.kernels.triton.target import kwidth
from fqcompile.kernels.tuning.launches import tuned_launches
from fqcompile.kernels.tuning.table import Timing, TunedTable
from fqcompile.passes import select
from tests.helpers import assert_close, assert_quantized_like_oracle, finequant, frozen, report
from tests.kernels.triton.interpreter import interpreted
from tests.kernels.triton.ptx import emulated_ptx
from tests.strategies import matmul

BF16 = torch.bfloat16


class Block(nn.Module):
    """An attention-free decoder block: siblings, gate and up, residuals, a bias."""

    def __init__(self, width: int = 128, hidden: int = 192) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width // 2)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.q(x) * self.k(x).sum(-1, keepdim=True)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`on(gpu)`: from here on select takes the CPU for that GPU; kernels are interpreted."""
    original = select.gemm_spec

    def pretend(gpu: Gpu) -> None:
        def gemm_spec(*args: Any) -> GemmSpec:
            return replace(original(*args), device_type="cuda", gpu=gpu)

        monkeypatch.setattr(select, "gemm_spec", gemm_spec)

    with emulated_ptx(), interpreted():
        yield pretend


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_a_block_computes_what_its_dequantized_weights_say(
    on: Any, gpu: Gpu, bits: int, dtype: torch.dtype
) -> None:
    on(gpu)
    model, x = frozen(Block()).to(dtype), torch.randn(3, 5, 128, dtype=dtype)
    actual = finequant(model, bits=bits, min_elements=1)(x)
    assert_quantized_like_oracle(model, actual, lambda m: m(x), depth=4)
    # mma.sync wants its operands in another order where Triton is older than 3.8.
    (family,) = {str(site.kernel).split(":")[0] for site in report().sites}
    assert family in ("triton_gemm", "triton_gemm_kw4")
    assert (family == "triton_gemm") == (kwidth(gpu) == 2)


def test_rows_left_open_take_one_kernel_each_of_three(on: Any) -> None:
    """One graph and one packed weight for decoding, larger batches, and dense prefill."""
    on(replace(H200, clock_hz=H200.clock_hz / 3))  # so slow that dense soon pays
    model = frozen(nn.Linear(256, 320)).to(BF16)
    compiled = finequant(model, dynamic=True, min_elements=1, granularity=64)
    for rows in (3, 800, 1500):
        x = torch.randn(rows, 256, dtype=BF16)
        assert_quantized_like_oracle(model, compiled(x), lambda m, x=x: m(x), depth=2)
    (site,) = report().sites
    launches = LaunchTable.parse(str(site.kernel).partition(":")[2])
    assert len({launches.at(rows) for rows in (3, 800, 1500)}) == 3
    assert launches.at(1500) is DENSE


def test_a_llama_decodes_through_aot_autograd(on: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, tie_word_embeddings=False,
    )  # fmt: skip
    on(H200)
    model = frozen(transformers.LlamaForCausalLM(config)).to(BF16)
    tokens = torch.arange(6)[None]
    compiled = finequant(model, inner_backend="aot_eager", min_elements=1)
    actual = compiled(tokens, use_cache=False).logits
    assert_quantized_like_oracle(
        model, actual, lambda m: m(tokens, use_cache=False).logits, depth=8
    )
    gated = [site for site in report().sites if "gate" in site.name]
    assert all(str(site.kernel).startswith("triton_gemm:") for site in gated)


def test_a_kernel_that_does_not_build_is_replaced_aloud(
    on: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on(H200)

    def out_of_shared_memory(*args: Any, **kwargs: Any) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(template, "dequant_gemm", out_of_shared_memory)
    monkeypatch.setattr(run_module, "BROKEN", {})
    model, x = frozen(nn.Linear(128, 128)).to(BF16), torch.randn(4, 128, dtype=BF16)
    compiled = finequant(model, min_elements=1)
    with caplog.at_level("WARNING", "fqcompile"):
        for _ in range(2):
            assert_quantized_like_oracle(model, compiled(x), lambda m: m(x), depth=2)
    (record,) = caplog.records
    assert "triton_gemm:16x" in record.getMessage()
    assert "OutOfResources: out of resource: shared memory" in record.getMessage()
    assert next(iter(run_module.BROKEN.values())).startswith("OutOfResources")


def test_autotune_measures_when_compiling_and_says_so(
    on: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on(H200)
    measured: list[str] = []

    def make_measure(*_: Any) -> Any:
        def measure(config: object) -> Timing:
            measured.append(str(config))
            time = 1.0 if str(config).startswith("16x64") else 2.0
            return Timing(time, time, time)

        return measure

    table = TunedTable.load(tmp_path / "table.json", {})
    choose = partial(tuned_launches, make_measure=make_measure, table=table)
    monkeypatch.setattr(select, "tuned_launches", choose)
    model, x = frozen(nn.Linear(256, 256)).to(BF16), torch.randn(4, 256, dtype=BF16)
    finequant(model, autotune="fast", min_elements=1)(x)
    assert 2 < len(measured) <= 12
    (site,) = report().sites
    assert str(site.kernel).startswith("triton_gemm:16x64")
    assert any("(searched)" in line for record in report().passes for line in record.matched)


def test_rows_that_depend_on_other_sizes_or_on_data_have_kernels(on: Any) -> None:
    on(H200)
    weight = torch.randn(128, 128, dtype=BF16)
    x, y = torch.randn(9, 128, dtype=BF16), torch.randn(4, 128, dtype=BF16)

    def rest(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x[y.shape[0] :], weight)

    def some(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x[x[:, 0] > 0], weight)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for function in (rest, some):
            finequant(function, dynamic=True, min_elements=1)(x, y)
            assert str(fqcompile.reports()[-1].sites[0].kernel).startswith("triton_gemm:")


def test_explaining_measures_nothing(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on(H200)
    monkeypatch.setattr(
        "fqcompile.kernels.tuning.launches.search", lambda *args: pytest.fail("it measured")
    )
    model, x = frozen(nn.Linear(256, 256)).to(BF16), torch.randn(4, 256, dtype=BF16)
    plan = fqcompile.explain(model, x, autotune="max", min_elements=1)
    assert str(plan.sites[0].kernel).startswith("triton_gemm:16x")


def test_fake_cuda_tensors_trace_through_the_op_without_a_gpu() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(5, 256, dtype=BF16, device="cuda")
        packed = torch.empty(20, 2, 16, 16, dtype=torch.int32, device="cuda")
        scale = torch.empty(2, 512, 1, dtype=BF16, device="cuda")

        def call(x: torch.Tensor) -> torch.Tensor:
            formats = (4, "normal", 128, 320, 256, "silu", False, "triton_gemm:16x128x128x1w4s4")
            return matmul(x, packed, scale, None, None, *formats)

        traced = make_fx(call)(x)
        y = traced(x)
    assert (y.shape, y.dtype, y.device) == ((5, 320), BF16, torch.device("cuda:0"))
    assert op.matmul in {node.target for node in traced.graph.nodes}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_on_a_gpu_under_inductor(mode: str) -> None:
    model = frozen(Block(512, 768)).to(BF16).cuda()
    compiled = finequant(model, inner_backend="inductor", mode=mode, dynamic=False)
    for rows in (1, 16, 600):
        x = torch.randn(rows, 512, dtype=BF16, device="cuda")
        for _ in range(3):
            actual = compiled(x).clone()
        expected = fqcompile.fake_quantize_(copy.deepcopy(model), fqcompile.reports()[-1])(x)
        assert_close(actual, expected, k=768, depth=4)
