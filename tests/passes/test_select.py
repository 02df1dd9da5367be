"""select: the kernel stands on the node, and its layout on what fills the node's inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fqcompile.native import library as native_library
from fqcompile.passes.op_nodes import argument
from fqcompile.passes.select import gemm_spec
from tests.passes.graphs import run_passes, weight

W = [weight(64, 64, i) for i in range(2)]
X = torch.randn(2, 3, 64)


@pytest.fixture
def without_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "refusal", lambda: "no C++ compiler")


@pytest.mark.skipif(native_library.refusal() is not None, reason=str(native_library.refusal()))
def test_our_kernel_reads_its_own_layout() -> None:
    run = run_passes(lambda x: F.linear(x, W[0]), X, until="select")
    (op,) = run.linears
    assert argument(op, "kernel") == "x86_stream"
    assert run.state.packed[op].layout.name == "x86_stream_1"


@pytest.mark.usefixtures("without_our_kernel")
def test_kernel_and_layout_follow_the_spec() -> None:
    layer = nn.Linear(64, 64).bfloat16()
    run = run_passes(layer, X.bfloat16(), until="select", levels="uniform")
    (op,) = run.linears
    assert argument(op, "kernel") == "aten_int4pack"
    assert run.state.packed[op].layout.name == "aten_int4_cpu"
    assert run.state.matched == [f"{op.name}: aten_int4pack"]
    assert run.outputs()[0].dtype == torch.bfloat16


@pytest.mark.usefixtures("without_our_kernel")
def test_fp32_reads_the_plain_layout() -> None:
    run = run_passes(lambda x: F.linear(x, W[0]), X, until="select")
    (op,) = run.linears
    assert argument(op, "kernel") == "dequantize"
    assert run.state.packed[op].layout.name == "plain"


def test_spec_is_what_the_graph_says() -> None:
    run = run_passes(
        lambda x, r: F.silu(F.linear(x, W[0])) * F.linear(x, W[1]) + r, X, torch.randn(2, 3, 64)
    )
    spec = gemm_spec(run.state, run.linears[0])
    assert (spec.m, spec.n, spec.k, spec.bits, spec.group_size) == (6, 64, 64, 4, 32)
    assert (spec.activation, spec.gated, spec.has_bias, spec.has_residual) == (
        "silu",
        True,
        False,
        True,
    )
    assert (spec.dtype, spec.scale_dtype, spec.device_type) == (torch.float32, torch.float16, "cpu")
    assert (spec.m_range, spec.gpu, spec.needs_backward) == (None, None, False)


def test_open_rows_and_gradients_are_seen() -> None:
    run = run_passes(lambda x: F.linear(x, W[0]), X, dynamic=True, grad=True)
    spec = gemm_spec(run.state, run.linears[0])
    assert (spec.m, spec.m_range, spec.needs_backward) == (6, (4, None), True)
