"""The two operators against an oracle in float64 that unpacks and multiplies by itself."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.errors import NoKernelError, OptionError
from fqcompile.kernels.epilogue import ACTIVATIONS
from fqcompile.kernels.op import dequantize
from fqcompile.quant.affine import choose_scale, quantize_affine
from fqcompile.tensor.codes import pack
from fqcompile.tensor.format import QTYPES, UNIFORM
from tests.strategies import Problem, make_problem, matmul, problems, weights

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# The steepest slopes: gelu 1.129, silu 1.0998.
STEEPEST = 1.13


# Of codes -8 to 7, in sixteenths.
NORMAL_LEVELS = [-127, -97, -76, -60, -46, -33, -21, -10, 0, 11, 23, 36, 50, 66, 87, 117]


def unpacked(
    qweight: Tensor, scale: Tensor, bits: int, levels: str, group_size: int, k: int
) -> Tensor:
    """ŵ [rows, K] in float64, code by code as codes.py draws them."""
    if bits == 4:
        low = (qweight % 16).double() - 8
        high = (qweight // 16).double() - 8
        codes = torch.stack([low, high], dim=-1).flatten(1)[:, :k]
        if levels == "normal":
            codes = (torch.tensor(NORMAL_LEVELS).double() / 16)[codes.long() + 8]
    else:
        codes = qweight.double()
    columns = torch.arange(k) // group_size
    return codes * scale.double()[:, columns]


def exact_activation(name: str, z: Tensor) -> Tensor:
    if name == "relu":
        return z.clamp(min=0)
    if name == "gelu":
        return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if name == "swiglu_oai":
        clamped = z.clamp(max=7)
        return clamped / (1 + torch.exp(-1.702 * clamped))
    return z / (1 + torch.exp(-z)) if name == "silu" else z


def exact_up(name: str, z: Tensor) -> Tensor:
    """What the other half of a gated layer is multiplied by."""
    return z.clamp(-7, 7) + 1 if name == "swiglu_oai" else z


def oracle(p: Problem) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far a computation in x's dtype may lie from it.

    u is x's unit roundoff. ŵ is rounded to x's dtype, products are summed in fp32 in any order, and
    z is rounded, with the bias once more: ez = (u + 2K 2^-24) Σ|x ŵ| + 2u(|z| + |bias|).
    The activation stretches that by its slope and is rounded; a product of two such values adds
    their errors crosswise and a rounding; the residual is rounded once more. Factor 2 for the terms
    of second order.
    """
    u = UNIT[p.x.dtype]
    w = unpacked(p.qweight, p.scale, p.bits, p.levels, p.group_size, p.k)
    x, bias = p.x.double(), 0 if p.bias is None else p.bias.double()
    z = x @ w.t() + bias
    ez = (u + 2 * p.k * 2.0**-24) * (x.abs() @ w.abs().t()) + 2 * u * (z.abs() + abs(bias))
    if p.gated:
        gate, up, eg, eu = *z.chunk(2, -1), *ez.chunk(2, -1)
        a = exact_activation(p.activation, gate)
        ea = STEEPEST * eg + u * a.abs()
        up = exact_up(p.activation, up)
        eu = eu + u * up.abs()
        y, ey = a * up, ea * up.abs() + a.abs() * eu + ea * eu + u * (a * up).abs()
    else:
        y = exact_activation(p.activation, z)
        ey = STEEPEST * ez + u * y.abs()
    if p.residual is not None:
        y = y + p.residual.double()
        ey = ey + u * y.abs()
    tiny = torch.finfo(p.x.dtype).smallest_normal
    return y, 2 * ey + tiny


def assert_matches_oracle(p: Problem, kernel: str = "dequantize") -> None:
    got = matmul(*p.arguments, kernel)
    want, bound = oracle(p)
    assert got.dtype == p.x.dtype
    assert got.shape == (*p.x.shape[:-1], p.n)
    assert got.is_contiguous()
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), (
        f"off by {error.max():.3g} where {bound[error > bound].min():.3g} is allowed"
    )


@given(problem=problems())
def test_linear_is_the_oracle_within_rounding(problem: Problem) -> None:
    assert_matches_oracle(problem)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_linear_with_everything_at_once(bits: int, gated: bool, activation: str) -> None:
    assert_matches_oracle(
        make_problem(
            leading=(2, 3), bits=bits, gated=gated, activation=activation, bias=True, residual=True
        )
    )


@pytest.mark.parametrize("leading", [(0,), (2, 0, 3), ()], ids=["no rows", "no rows inside", "1-D"])
def test_linear_takes_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    assert_matches_oracle(make_problem(leading=leading, bias=True, residual=True))


@given(w=weights(), bits=st.sampled_from([4, 8]), group=st.sampled_from([1, 5, 32, 4096]))
def test_linear_of_a_quantized_weight_stays_within_half_a_step(
    w: Tensor, bits: int, group: int
) -> None:
    """End to end from a weight: x = I reads ŵ itself. absmax clips nothing, so |w - ŵ| <= s/2."""
    n, k = w.shape
    group = min(group, k)
    scale = choose_scale(w, QTYPES[bits, UNIFORM], group, "absmax", torch.float32)
    qweight = pack(quantize_affine(w, scale, QTYPES[bits, UNIFORM], group), QTYPES[bits, UNIFORM])
    w_hat = matmul(
        torch.eye(k),
        qweight,
        scale,
        None,
        None,
        bits,
        "uniform",
        group,
        n,
        k,
        "none",
        False,
        "dequantize",
    )
    steps = scale.abs()[:, torch.arange(k) // group]
    # The stored scale is absmax/qmax rounded, so the extreme may lie 2^-24 of itself beyond qmax.
    assert bool(((w_hat.t() - w).abs() <= steps * (0.5 + 2**-15)).all())


@given(problem=problems(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_dequantize_rounds_the_exact_product_once(problem: Problem, dtype: torch.dtype) -> None:
    p = problem
    got = dequantize(
        p.qweight,
        p.scale,
        p.bits,
        p.levels,
        p.group_size,
        p.qweight.shape[0],
        p.k,
        dtype,
        "dequantize",
    )
    want = unpacked(p.qweight, p.scale, p.bits, p.levels, p.group_size, p.k)
    assert (got.shape, got.dtype) == (want.shape, dtype)
    # 8 bits times at most 24 bits: the fp32 product may be rounded, and then once to dtype.
    bound = want.abs() * (UNIT[dtype] + 2.0**-24) * 1.01 + torch.finfo(dtype).smallest_normal
    assert bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("levels", "values"),
    [("uniform", range(-8, 8)), ("normal", [n / 16 for n in NORMAL_LEVELS])],
)
def test_dequantize_of_every_int4_byte_is_exact(
    levels: str, values: Sequence[float], dtype: torch.dtype
) -> None:
    qweight = torch.arange(256, dtype=torch.uint8).view(256, 1)
    w = dequantize(qweight, torch.ones(256, 1), 4, levels, 2, 256, 2, dtype, "dequantize")
    assert w.tolist() == [[values[byte % 16], values[byte // 16]] for byte in range(256)]


def test_odd_k_ignores_the_padding_code() -> None:
    p = make_problem(k=33, group_size=32)
    padding = p.qweight.clone()
    padding[:, -1] |= 0xF0
    other = Problem(**{**vars(p), "qweight": padding})
    assert torch.equal(matmul(*p.arguments, "dequantize"), matmul(*other.arguments, "dequantize"))


def test_unknown_kernel_and_activation_are_refused_by_name() -> None:
    p = make_problem()
    with pytest.raises(
        NoKernelError, match=r"kernel 'nothing' is not installed; there are .*dequantize"
    ):
        matmul(*p.arguments, "nothing")
    odd = Problem(**{**vars(p), "activation": "tanh"})
    with pytest.raises(OptionError, match="activation='tanh' is not one of none, relu"):
        matmul(*odd.arguments, "dequantize")
