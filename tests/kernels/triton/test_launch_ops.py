"""The family through its operators: tables of configurations, backward, opcheck, torch.compile.

On the CPU `conversion` probes the interpreter, and so chooses what an NVIDIA GPU takes.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.kernels.op import dequantize
from fqcompile.kernels.triton import launch
from fqcompile.kernels.triton.template import TRITON_GEMM
from tests.kernels.triton.oracle import (
    BF16,
    FP16,
    STEEPEST,
    Case,
    Inputs,
    activate,
    assert_close,
    draw,
    every_format,
    on_device,
    on_every_device,
    quantized,
    running,
)
from tests.strategies import matmul, opcheck_matmul

SPLIT = "triton_gemm:16x64x128x2w4s2"
TABLE = "triton_gemm:m4=16x64x128x1w4s2,dense"
DENSE = "triton_gemm"
UNIT = {FP16: 2.0**-11, BF16: 2.0**-8}


@dataclass(frozen=True)
class Call:
    """A call of fqcompile::matmul; `x`, `bias` and `residual` may be replaced."""

    case: Case
    inputs: Inputs
    x: Tensor
    qweight: Tensor
    scale: Tensor
    bias: Tensor | None
    residual: Tensor | None

    def arguments(self, kernel: str) -> tuple[Any, ...]:
        c = self.case
        group_size = min(c.group_size, c.k)
        tensors = (self.x, self.qweight, self.scale, self.bias, self.residual)
        return (*tensors, c.bits, c.levels, group_size, c.n, c.k, c.activation, c.gated, kernel)

    def __call__(self, kernel: str) -> Tensor:
        y: Tensor = matmul(*self.arguments(kernel))
        return y


def call_of(case: Case, device: str = "cpu") -> Call:
    inputs = draw(case)
    weight = quantized(inputs.codes, inputs.scale, case.bits, case.group_size, case.levels)
    qweight, scale = (t.to(device) for t in TRITON_GEMM.layout.pack(weight).tensors)
    x, bias, residual = (on_device(t, device) for t in (inputs.x, inputs.bias, inputs.residual))
    return Call(case, inputs, x, qweight, scale, bias, residual)


EVERYTHING = Case(
    m=3, n=20, k=130, bits=8, dtype=BF16, bias=True, residual=True, activation="silu", gated=True
)
CASES = {
    "int4 fp16": Case(m=3, n=20, k=130, bias=True),
    "int8 bf16 gated": EVERYTHING,
    "normal4 bf16 gated": replace(EVERYTHING, bits=4, levels="normal"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@on_every_device
@every_case
def test_linear_runs_the_configuration_that_its_kernel_names(case: Case, device: str) -> None:
    for kernel in (SPLIT, "triton_gemm:16x128x128x1w4s4"):
        call = call_of(case, device)
        with running(device) as memory:
            y = call(kernel)
            assert memory is None or memory.unwritten(y) == 0
        assert_close(case, call.inputs, y.cpu())


def test_the_table_decides_by_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(launch, "_gemm", lambda x, *rest: seen.append(("tile", x.shape[0])))
    monkeypatch.setattr(
        launch,
        "dequantize",
        lambda weight, dtype, kwidth: seen.append(("dense", dtype)) or torch.zeros(20, 130).half(),
    )
    for m in (1, 4, 5):
        call_of(replace(CASES["int4 fp16"], m=m))(TABLE)
    assert seen == [("tile", 1), ("tile", 4), ("dense", FP16)]


def dense_products(inputs: Inputs, u: float) -> tuple[Tensor, Tensor]:
    """x ŵᵀ + bias in fp64, and how far it may be off with ŵ and the result rounded to u."""
    x, bias = inputs.x.double(), inputs.bias.double()
    z = x @ inputs.w.T + bias
    return z, 2 * u * (x.abs() @ inputs.w.abs().T + z.abs() + bias.abs())


@on_every_device
@every_case
def test_dense_is_the_dequantized_weight_times_x(case: Case, device: str) -> None:
    """Beyond the fused kernel's error: ŵ is rounded to 16 bits, and so are z and gate * up."""
    case = replace(case, m=5)
    call = call_of(case, device)
    with running(device):
        y = call(TABLE)
        assert torch.equal(y, call(DENSE))
    y, inputs, u = y.cpu().double(), call.inputs, UNIT[case.dtype]
    z, dz = dense_products(inputs, u)
    gate, up = z.chunk(2, -1) if case.gated else (z, torch.ones(()))
    d_gate, d_up = dz.chunk(2, -1) if case.gated else (dz, torch.zeros(()))
    a = activate(gate, case.activation)
    residual = 0 if inputs.residual is None else inputs.residual.double()
    want = a * up + residual
    d_a = STEEPEST * d_gate + u * a.abs()
    bound = d_a * up.abs() + (a.abs() + d_a) * d_up + u * (a * up).abs() + 2 * u * want.abs()
    assert ((y - want).abs() <= bound).all()


@on_every_device
@pytest.mark.parametrize("leading", [(), (2, 3), (1, 1, 4)], ids=str)
def test_linear_takes_any_leading_dimensions(leading: tuple[int, ...], device: str) -> None:
    rows = int(torch.tensor(leading).prod()) if leading else 1
    case = Case(m=rows, n=20, k=130, residual=True)
    call = call_of(case, device)
    view = replace(
        call, x=call.x.reshape(*leading, 130), residual=call.residual.reshape(*leading, 20)
    )
    with running(device):
        y = view(SPLIT)
    assert y.shape == (*leading, 20)
    assert_close(case, call.inputs, y.reshape(rows, 20).cpu())


@on_every_device
@pytest.mark.parametrize(("m", "n"), [(0, 20), (3, 0), (0, 0)])
def test_linear_of_nothing_is_empty(m: int, n: int, device: str) -> None:
    call = call_of(Case(m=m, n=20, k=130), device)
    if n == 0:
        call = replace(call, qweight=call.qweight[:0], scale=call.scale[:, :0])
    without_columns = replace(call, case=replace(call.case, n=n))
    with running(device):
        y = without_columns(SPLIT)
    assert (y.shape, y.dtype) == ((m, n), FP16)


@on_every_device
@every_format
def test_dequantize_gives_the_weight_back(bits: int, levels: str, device: str) -> None:
    case = Case(n=20, k=130, bits=bits, levels=levels)
    call = call_of(case, device)
    with running(device):
        form = (bits, levels, case.group_size, 20, 130)
        w = dequantize(call.qweight, call.scale, *form, BF16, DENSE)
    assert torch.equal(w.cpu(), call.inputs.w.float().bfloat16())


def with_grad(call: Call) -> Call:
    leaves = {
        name: t.detach().clone().requires_grad_()
        for name in ("x", "bias", "residual")
        if (t := getattr(call, name)) is not None
    }
    return replace(call, **leaves)


@every_case
def test_linear_passes_opcheck(case: Case) -> None:
    call = call_of(replace(case, m=2, n=3, k=20))
    with running("cpu"):
        opcheck_matmul(*call.arguments(SPLIT))
        opcheck_matmul(*with_grad(call).arguments(TABLE))


def test_dequantize_passes_opcheck() -> None:
    call = call_of(Case(n=3, k=20))
    arguments = (call.qweight, call.scale, 4, "uniform", 20, 3, 20, FP16, DENSE)
    with running("cpu"):
        torch.library.opcheck(dequantize, arguments)


def exact_gradients(call: Call, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of x, bias and residual, by autograd in fp64, each with how far it may be off.

    With a gate z is computed again, by way of the dequantized weight, and is off by ez. That
    changes a slope by at most ez (curvatures are below 1) and a value by 1.13 ez; then the slope or
    value, up and two products are rounded. In dx = dz ŵ both factors are rounded, and the result; a
    bias gets a sum that PyTorch takes in fp32 and rounds.
    """
    case, inputs, u = call.case, call.inputs, UNIT[call.case.dtype]
    x, bias = (t.double().requires_grad_() for t in (inputs.x, inputs.bias))
    z = x @ inputs.w.T + bias
    gate, up = z.chunk(2, -1) if case.gated else (z, torch.ones((), dtype=torch.float64))
    dy = dy.double()
    out = dy * activate(gate, case.activation) * up
    dz, *exact = torch.autograd.grad(out.sum(), [z, x, bias])
    off = torch.zeros_like(dz)
    if case.gated:
        ez, eup = dense_products(inputs, u)[1].chunk(2, -1)
        of_gate = dy.abs() * (up.abs() * ez + STEEPEST * eup)
        off = torch.cat([of_gate, STEEPEST * dy.abs() * ez], -1) + 4 * u * dz.abs()
    of_x = (off + 3 * u * dz.abs()) @ inputs.w.abs()
    of_bias = (off + 2 * u * dz.abs()).sum(0)
    return [*zip([*exact, dy], [of_x, of_bias, torch.zeros(())], strict=True)]


@on_every_device
@pytest.mark.parametrize("kernel", [SPLIT, TABLE])
@pytest.mark.parametrize(
    "case", [Case(m=3, n=20, k=130, bias=True, residual=True), EVERYTHING], ids=["plain", "gated"]
)
def test_backward_is_that_of_the_composition(case: Case, kernel: str, device: str) -> None:
    call = call_of(case, device)
    leaves = with_grad(call)
    dy = torch.randn(case.m, case.n).to(case.dtype)
    with running(device):
        leaves(kernel).backward(dy.to(device))
    for leaf, (want, bound) in zip(
        (leaves.x, leaves.bias, leaves.residual), exact_gradients(call, dy), strict=True
    ):
        assert leaf.grad.dtype == case.dtype
        assert ((leaf.grad.cpu().double() - want).abs() <= bound).all()


@on_every_device
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_calls_are_the_same_bits(backend: str, device: str) -> None:
    """For any number of rows, with gradients, in one graph."""
    _, qweight, scale, bias, _, *format_ = call_of(EVERYTHING, device).arguments(SPLIT)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return torch.tanh(matmul(x, qweight, scale, bias, residual, *format_)) * 2

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    with running(device):
        for m in (2, 3, 5):
            x, residual = (torch.randn(m, s).bfloat16().to(device) for s in (130, 20))
            results = []
            for function in (block, compiled):
                leaves = [t.clone().requires_grad_() for t in (x, residual)]
                y = function(*leaves)
                y.sum().backward()
                results.append([y.detach(), *(leaf.grad for leaf in leaves)])
            for got, want in zip(*results, strict=True):
                assert torch.equal(got, want)
