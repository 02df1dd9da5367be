"""The kernels of experts through their operators: configurations, dense, backward, opcheck."""

from bisect import bisect
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.errors import KernelBuildError
from fqcompile.kernels import run as run_module
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.registry import parse_kernel, select_kernel
from fqcompile.kernels.spec import A100, DENSE, H200, GemmSpec
from fqcompile.kernels.template import Routing
from fqcompile.kernels.triton import launch, layout
from fqcompile.kernels.triton import template as template_module
from fqcompile.kernels.triton.template import TRITON_GEMM
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.triton.expert_oracle import (
    ExpertCase,
    ExpertInputs,
    assert_close,
    bounds,
    draw,
    stacked,
)
from tests.kernels.triton.oracle import (
    BF16,
    FP16,
    Case,
    every_format,
    on_device,
    on_every_device,
    running,
)
from tests.strategies import matmul, opcheck_matmul

SPLIT = "triton_gemm:16x64x128x2w4s2"
TABLE = "triton_gemm:m4=16x64x128x1w4s2,dense"
PLAIN = "triton_gemm"
ONE = Case(n=24, k=136, bias=True)
GROUPED = ExpertCase(offsets=(3, 3, 8), one=replace(ONE, levels="normal"))
GATHERED = ExpertCase(ids=(2, -3, 1, 2), one=replace(ONE, bits=8, dtype=BF16, gated=True))
every_routing = pytest.mark.parametrize("case", [GROUPED, GATHERED], ids=["grouped", "gathered"])


def arguments(
    case: ExpertCase, inputs: ExpertInputs, kernel: str, device: str = "cpu"
) -> tuple[Any, ...]:
    one, weight = case.one, stacked(case, inputs, device)
    x, bias = (on_device(t, device) for t in (inputs.x, inputs.bias))
    routing = case.routing(device)
    form = (
        one.bits,
        one.levels,
        min(one.group_size, one.k),
        one.n,
        one.k,
        one.activation,
        one.gated,
        kernel,
    )
    return (x, weight.qweight, weight.scale, bias, None, *form, *routing)


@on_every_device
@every_routing
@pytest.mark.parametrize("kernel", [SPLIT, "triton_gemm:32x128x128x1w4s4", PLAIN])
def test_experts_run_the_configuration_that_their_kernel_names(
    kernel: str, case: ExpertCase, device: str
) -> None:
    """And some tile where none is named, as the backward pass asks for."""
    inputs = draw(case)
    with running(device):
        y = matmul(*arguments(case, inputs, kernel, device))
    assert_close(case, inputs, y.cpu())


@on_every_device
@pytest.mark.parametrize("kernel", ["triton_gemm:32x64x128x1w4s2", SPLIT, TABLE])
def test_many_rows_with_ids_are_sorted_by_expert(kernel: str, device: str) -> None:
    """From two an expert on; those whose id names no expert are NaN."""
    ids = (2, 0, -1, 5, 1, 2, -3, -9, 0, 0)
    case = ExpertCase(ids=ids, experts=3, one=replace(ONE, dtype=BF16))
    y = checked_as_dense(case, kernel, device)
    assert y[case.of_rows < 0].isnan().all()


def test_sorting_rows_waits_for_no_device() -> None:
    """Fake tensors have no values that the host could read."""
    with FakeTensorMode():
        ids = torch.empty(10, dtype=torch.int32, device="cuda")
        order, routing, unknown = launch.sorted_by_expert(ids, 3)
    assert routing.offsets is not None
    assert (order.shape, routing.offsets.shape, unknown.shape) == ((10,), (3,), (10,))


@pytest.mark.parametrize("routed", [False, True], ids=["one", "experts"])
def test_without_memory_for_a_dense_weight_its_codes_are_read(
    routed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*rest: Any) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate 15 GiB")

    monkeypatch.setattr(template_module, "dense_experts", fails)
    monkeypatch.setattr(template_module, "dense_gemm", fails)
    case = replace(GROUPED, offsets=(1, 4, 6) if routed else (6,))
    inputs = draw(case)
    x, qweight, scale, bias, *rest, offsets, ids = arguments(case, inputs, TABLE)
    if not routed:
        qweight, scale, bias, offsets = qweight[0], scale[0], bias[0], None
    with running("cpu"):
        y = matmul(x, qweight, scale, bias, *rest, offsets, ids)
    assert_close(case, inputs, y)
    assert "no memory for a dequantized weight" in caplog.text


def dense_bound(case: ExpertCase, inputs: ExpertInputs) -> tuple[Tensor, Tensor]:
    """Beyond the fused kernel's error: ŵ and z are rounded to bf16, twice with a bias."""
    want, tolerance = bounds(case, inputs)
    own, u = case.of_rows, 2.0**-8
    for row, expert in enumerate(own.tolist()):
        if expert >= 0:
            reach = inputs.x[row].double().abs() @ inputs.w[expert].abs().T
            tolerance[row] += u * (reach + 3 * want[row].abs())
            if inputs.bias is not None:
                tolerance[row] += 2 * u * inputs.bias[expert].double().abs()
    return want, tolerance


def checked_as_dense(case: ExpertCase, kernel: str, device: str = "cpu") -> Tensor:
    """The result in fp64, whose rows of experts are within `dense_bound`."""
    inputs = draw(case)
    with running(device):
        y = matmul(*arguments(case, inputs, kernel, device)).cpu().double()
    want, tolerance = dense_bound(case, inputs)
    assert ((y - want).abs() <= tolerance)[case.of_rows >= 0].all()
    return y


@on_every_device
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@every_format
def test_dense_is_the_stack_dequantized_and_multiplied_by_pytorch(
    bits: int, levels: str, bias: bool, index_dtype: torch.dtype, device: str
) -> None:
    one = replace(ONE, dtype=BF16, bits=bits, levels=levels, bias=bias)
    case = replace(GROUPED, one=one, tail=2, index_dtype=index_dtype)
    checked_as_dense(case, TABLE, device)


def test_dense_applies_the_gate() -> None:
    one = replace(ONE, dtype=BF16, gated=True, activation="swiglu_oai", bias=True)
    case = replace(GROUPED, one=one)
    inputs = draw(case)
    with running("cpu"):
        dense = matmul(*arguments(case, inputs, TABLE))
        fused = matmul(*arguments(case, inputs, SPLIT))
    torch.testing.assert_close(dense.float(), fused.float(), rtol=0.1, atol=0.3)


def test_the_table_decides_by_the_number_of_routed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def tile(x: Tensor, *rest: Any) -> Tensor:
        seen.append(rest[-2])
        return x

    def dense(x: Tensor, *rest: Any) -> Tensor:
        seen.append(DENSE)
        return x

    monkeypatch.setattr(template_module, "expert_gemm", tile)
    monkeypatch.setattr(template_module, "dense_experts", dense)
    for offsets in ((1, 2, 4), (1, 4, 5)):
        case = replace(GROUPED, offsets=offsets)
        matmul(*arguments(case, draw(case), TABLE))
    launches = parse_kernel(TABLE).launches
    assert launches is not None
    assert seen == [launches.at(4), DENSE]


def test_dense_for_gathered_rows_is_told_and_computed_another_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No selection writes that; a table is a file."""
    monkeypatch.setattr(run_module, "BROKEN", {})
    case = replace(GATHERED, ids=(0, 1, 2, 0, 1), one=ONE)
    checked_as_dense(case, TABLE)
    assert "take rows that are grouped" in caplog.text


@pytest.mark.parametrize("error", [template_module.OutOfResources(1, 2, "shared memory")])
@every_routing
def test_what_does_not_build_is_named(
    case: ExpertCase, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*rest: Any) -> Tensor:
        raise error

    monkeypatch.setattr(template_module, "expert_gemm", fails)
    inputs = draw(case)
    one = case.one
    epilogue = Epilogue(inputs.bias, None, one.activation, one.gated)
    ends = (case.routing(), epilogue, one.config)
    with pytest.raises(KernelBuildError, match="OutOfResources"):
        TRITON_GEMM.run(inputs.x, stacked(case, inputs), *ends)
    monkeypatch.setattr(template_module, "expert_gemm", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TRITON_GEMM.run(inputs.x, stacked(case, inputs), *ends)


@every_routing
def test_experts_pass_opcheck(case: ExpertCase) -> None:
    case = replace(case, one=replace(case.one, n=3, k=20))
    x, qweight, scale, bias, *form = arguments(case, draw(case), SPLIT)
    with running("cpu"):
        opcheck_matmul(x, qweight, scale, bias, *form)
        leaves = [t.detach().clone().requires_grad_() for t in (x, bias) if t is not None]
        x, bias = (*leaves, None)[:2]
        opcheck_matmul(x, qweight, scale, bias, *form)


@on_every_device
@every_routing
def test_backward_is_each_experts_own(case: ExpertCase, device: str) -> None:
    case = replace(case, one=replace(case.one, activation="silu", dtype=FP16, bits=4))
    inputs = draw(case)
    x, *rest = arguments(case, inputs, SPLIT, device)
    leaf = x.detach().clone().requires_grad_()
    with running(device):
        matmul(leaf, *rest).sum().backward()
    exact = inputs.x.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, expert in enumerate(case.of_rows.tolist()):
        z = inputs.w[expert] @ exact[row]
        z = z if inputs.bias is None else z + inputs.bias[expert].double()
        gate, up = z.chunk(2) if case.one.gated else (z, torch.ones(()))
        total = total + (torch.nn.functional.silu(gate) * up).sum()
    (want,) = torch.autograd.grad(total, exact)
    error = float((leaf.grad.cpu().double() - want).norm() / want.norm())
    assert error < 4 * 2.0**-11  # three roundings to fp16, spread over many terms


EXPERTS = GemmSpec(
    64, 768, 2048, 4, 128, BF16, BF16, "cuda", gated=True, gpu=H200, experts=128, routing="grouped"
)


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.arch)
@pytest.mark.parametrize("routing", ["grouped", "gathered"])
def test_the_family_is_chosen_for_experts_on_a_gpu(routing: str, gpu: Any) -> None:
    choice = select_kernel(replace(EXPERTS, routing=routing, gpu=gpu))
    assert choice.template.name.startswith("triton_gemm")
    assert choice.launches is not None


def test_the_limit_of_bytes_is_that_of_one_expert() -> None:
    many = replace(EXPERTS, experts=4096, n=14336, k=4096)
    assert TRITON_GEMM.refuse(many) is None
    assert "4 GiB of codes" in str(TRITON_GEMM.refuse(replace(many, n=1 << 20)))


@pytest.mark.parametrize("rows", [1, 255, 257, 4096, 1 << 20])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_matrix_has_offsets_of_31_bits(rows: int, bits: int) -> None:
    """Of codes and of scales, which are filled up to 256 rows, and of tiles beyond the last row."""
    spec = replace(EXPERTS, n=rows, gated=False, bits=bits, group_size=16)
    taken = bisect(
        range(1 << 34), 0, key=lambda k: TRITON_GEMM.refuse(replace(spec, k=k)) is not None
    )
    most = range(1 << 34)[taken - 1]
    assert most * rows > 1 << 23
    for shape in layout.shapes(bits, 16, rows + 256, most):
        assert prod(shape) <= 1 << 31


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stack_of_more_than_2_gib_is_read_at_its_end() -> None:
    experts, n, k = 300, 4096, 4096
    template = TRITON_GEMM
    codes = torch.zeros(experts, n // 16, k // 128, 16, 16, dtype=torch.int32, device="cuda")
    codes[-1] = 0x11111111 * 9 - (1 << 32)  # code 9, so 1
    scale = torch.ones(experts, k // 128, 4096, 1, dtype=BF16, device="cuda")
    weight = QuantizedTensor(codes, scale, Format(4, 128, n, k))
    x = torch.ones(3, k, dtype=BF16, device="cuda")
    offsets = torch.zeros(experts, dtype=torch.int32, device="cuda")
    offsets[-1] = 3
    for routing in (Routing(offsets), Routing(ids=torch.full((3,), -1, device="cuda"))):
        y = template.run(x, weight, routing, Epilogue(), None)
        assert torch.equal(y, torch.full_like(y, float(k)))
