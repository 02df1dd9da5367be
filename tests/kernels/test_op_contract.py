"""What PyTorch asks of an operator: schema, fake, autograd and autocast agree with the call."""

import copy

import pytest
import torch
from torch import Tensor

from fqcompile.kernels import op
from fqcompile.kernels.op import dequantize
from tests.kernels.test_op import exact_activation, exact_up, unpacked
from tests.strategies import Problem, make_problem, matmul, opcheck_matmul

SAMPLES = {
    "int4 plain": make_problem(),
    "int8 3-D with bias": make_problem(leading=(2, 3), bits=8, bias=True),
    "gated with everything": make_problem(
        leading=(2, 3), gated=True, activation="silu", bias=True, residual=True
    ),
    "normal levels": make_problem(levels="normal", activation="gelu", bias=True),
    "no rows": make_problem(leading=(0,), activation="relu", bias=True),
    "bf16 gelu": make_problem(dtype=torch.bfloat16, activation="gelu", residual=True),
    "strided x": make_problem(strided=True, activation="gelu_tanh", residual=True),
}


@pytest.mark.parametrize("problem", SAMPLES.values(), ids=list(SAMPLES))
def test_linear_passes_opcheck(problem: Problem) -> None:
    opcheck_matmul(*problem.arguments, "dequantize")


def test_linear_passes_opcheck_with_gradients() -> None:
    p = make_problem(activation="silu", gated=True, bias=True, residual=True)
    arguments = [
        a.requires_grad_() if isinstance(a, Tensor) and i in (0, 3, 4) else a
        for i, a in enumerate(p.arguments)
    ]
    opcheck_matmul(*arguments, "dequantize")


@pytest.mark.parametrize(("bits", "levels"), [(4, "uniform"), (4, "normal"), (8, "uniform")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_passes_opcheck(bits: int, levels: str, dtype: torch.dtype) -> None:
    p = make_problem(bits=bits, levels=levels)
    torch.library.opcheck(
        dequantize, (p.qweight, p.scale, bits, levels, 32, 5, 40, dtype, "dequantize")
    )


def gradients(p: Problem, *, exact: bool) -> list[Tensor]:
    """Of sum(y * probe) for x, bias and residual; exact: autograd through the fp64 composition."""
    leaves = [t.double() if exact else t for t in (p.x, p.bias, p.residual) if t is not None]
    x, bias, residual = leaves = [t.detach().clone().requires_grad_() for t in leaves]
    if exact:
        w = unpacked(p.qweight, p.scale, p.bits, p.levels, p.group_size, p.k)
        z = x @ w.t() + bias
        gate, up = z.chunk(2, -1) if p.gated else (z, torch.ones(()))
        y = exact_activation(p.activation, gate) * exact_up(p.activation, up) + residual
    else:
        y = matmul(x, *p.arguments[1:3], bias, residual, *p.arguments[5:], "dequantize")
    probe = torch.randn(p.residual.shape, generator=torch.Generator().manual_seed(7))
    (y * probe.to(y.dtype)).sum().backward()
    return [t.grad for t in leaves]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("levels", ["uniform", "normal"])
def test_backward_is_that_of_the_composition(levels: str, activation: str, gated: bool) -> None:
    p = make_problem(
        leading=(2, 3), n=6, k=37, levels=levels, activation=activation, gated=gated,
        bias=True, residual=True,
    )  # fmt: skip
    names = ("x", "bias", "residual")
    for name, got, want in zip(
        names, gradients(p, exact=False), gradients(p, exact=True), strict=True
    ):
        # Sums of at most 40 terms of about unit size, twice: 2 * 40 * 2^-24 * 40 < 2^-12.
        assert got.shape == want.shape, name
        assert float((got.double() - want).abs().max()) <= 2**-12, name


def test_only_what_needs_a_gradient_gets_one() -> None:
    p = make_problem(bias=True, residual=True, activation="relu")
    bias = p.bias.clone().requires_grad_()
    matmul(*p.arguments[:3], bias, *p.arguments[4:], "dequantize").sum().backward()
    assert bias.grad is not None
    assert p.x.grad is None


def test_backward_through_a_kernel_with_a_configuration_reads_the_plain_layout() -> None:
    """The pre-activation is recomputed without it: it was tuned for the fused form."""
    p = make_problem(activation="silu")
    x = p.x.clone().requires_grad_()
    matmul(x, *p.arguments[1:], "dequantize:16x64x64x1w4s3").sum().backward()
    want = gradients(make_problem(activation="silu", bias=True, residual=True), exact=True)[0]
    assert x.grad.shape == want.shape
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_linear(dtype: torch.dtype) -> None:
    p = make_problem(leading=(2, 3), bias=True, residual=True)
    with torch.autocast("cpu", dtype):
        got = matmul(*p.arguments, "dequantize")
        like = torch.nn.functional.linear(p.x, torch.zeros(5, 40), p.bias)
    cast = copy.copy(vars(p)) | {
        name: getattr(p, name).to(dtype) for name in ("x", "bias", "residual")
    }
    assert got.dtype == like.dtype == dtype
    assert torch.equal(got, matmul(*Problem(**cast).arguments, "dequantize"))


def test_autocast_leaves_the_packed_weight_and_gradients_in_place() -> None:
    p = make_problem(bias=True, residual=True)
    x = p.x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        matmul(x, *p.arguments[1:], "dequantize").float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert p.scale.dtype == torch.float32


def test_compiled_linear_is_one_graph_for_every_number_of_rows() -> None:
    p = make_problem(bias=True)
    graphs: list[object] = []

    def backend(module: torch.fx.GraphModule, inputs: list[object]) -> object:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(
        lambda x: matmul(x, *p.arguments[1:], "dequantize"), backend=backend, dynamic=True
    )
    for m in (6, 7, 11):
        x = torch.randn(m, 40)
        torch.testing.assert_close(compiled(x), matmul(x, *p.arguments[1:], "dequantize"))
    assert len(graphs) == 1


def test_no_argument_has_a_default() -> None:
    """Inductor writes defaults as keywords into the code of every call, which costs 1 us each."""
    for operator in (op.matmul, op.matmul_inference):
        assert [a.name for a in operator._schema.arguments if a.has_default_value()] == []
