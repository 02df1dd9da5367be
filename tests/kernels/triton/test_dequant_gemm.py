"""The GEMM against fp64 dequantise-then-multiply: in the interpreter, and on a GPU if there is."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from fqcompile.errors import NoKernelError
from fqcompile.kernels.tile_config import TileConfig
from fqcompile.kernels.triton.dequant_gemm import closed_form_config, dequant_gemm
from tests.kernels.triton.interpreter import interpreted

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FLOATS = (FP16, BF16, FP32)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
SMALL = TileConfig(16, 16, 32)
U32 = 2.0**-24

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])
on_every_device = pytest.mark.parametrize("device", ["cpu", CUDA])


@dataclass(frozen=True)
class Case:
    m: int = 5
    n: int = 37
    k: int = 131
    bits: int = 4
    group_size: int = 32
    dtype: torch.dtype = FP16
    scale_dtype: torch.dtype = FP16
    bias: bool = False
    residual: bool = False
    activation: str = "none"
    gated: bool = False
    config: TileConfig | None = None
    seed: int = 0

    @property
    def rows(self) -> int:
        return 2 * self.n if self.gated else self.n


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The plain layout, byte by byte. An odd row ends in a nibble that no result may depend on."""
    if bits == 8:
        return codes.to(torch.int8)
    rows, k = codes.shape
    packed = torch.full((rows, (k + 1) // 2), 0xF0, dtype=torch.int64)
    packed[:, : k // 2] = (codes[:, 1::2] + 8) * 16
    packed += codes[:, 0::2] + 8
    return packed.to(torch.uint8)


def random_weight(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qweight, scale (of both signs) and, from the codes themselves, the weight in fp64."""
    half = 2 ** (case.bits - 1)
    codes = torch.randint(-half, half, (case.rows, case.k))
    groups = -(-case.k // case.group_size)
    scale = (torch.randn(case.rows, groups) / half).to(case.scale_dtype)
    group_of = torch.arange(case.k) // case.group_size
    return pack(codes, case.bits), scale, codes.double() * scale.double()[:, group_of]


def inside_nans(values: torch.Tensor) -> torch.Tensor:
    """The same values as strided rows of a matrix of NaN, so that reading past a row shows."""
    rows, columns = values.shape
    around = torch.full((rows + 2, columns + 3), torch.nan, dtype=values.dtype)
    around[1:-1, 1:-2] = values
    return around[1:-1, 1:-2]


def activate(z: torch.Tensor, name: str) -> torch.Tensor:
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))
    table = {
        "none": z,
        "relu": z.clamp(min=0),
        "gelu": z * 0.5 * (1 + torch.erf(z / 2**0.5)),
        "gelu_tanh": z * 0.5 * (1 + tanh),
        "silu": z / (1 + torch.exp(-z)),
    }
    return table[name]


def expected(
    case: Case, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in fp64 and how far a right kernel may be from it.

    z: a fp32 sum of K products in any order, each also rounded (fp32 x) and scaled, and the bias:
    (K + 4) u (sum |x||w| + |bias|), u = 2^-24. Activations have slopes below 1.13 and errors below
    2^-20 |z|, the GPU's approximate exponential included. Then one rounding to the output type,
    whose subnormals have a fixed spacing.
    """
    z = x @ w.T + bias
    dz = (case.k + 4) * U32 * (x.abs() @ w.abs().T + bias.abs())
    gate, up = z.chunk(2, -1) if case.gated else (z, torch.ones(()))
    d_gate, d_up = dz.chunk(2, -1) if case.gated else (dz, torch.zeros(()))
    a = activate(gate, case.activation)
    if case.activation != "none":
        d_gate = 1.13 * d_gate + 2.0**-20 * gate.abs()
    y = a * up + residual
    dy = d_gate * up.abs() + (a.abs() + d_gate) * d_up
    dy = dy + 4 * U32 * ((a * up).abs() + residual.abs())
    out = torch.finfo(case.dtype)
    return y, dy + (y.abs() + dy) * out.eps / 2 + out.smallest_normal * out.eps / 2


def check(case: Case, device: str = "cpu") -> None:
    torch.manual_seed(case.seed)
    qweight, scale, w = random_weight(case)
    x = inside_nans(torch.randn(case.m, case.k).to(case.dtype))
    bias = torch.randn(case.rows).to(case.dtype) if case.bias else None
    residual = inside_nans(torch.randn(case.m, case.n).to(case.dtype)) if case.residual else None
    y = run(case, x, qweight, scale, bias, residual, device)
    zero = torch.zeros((), dtype=torch.float64)
    want, tolerance = expected(
        case,
        x.double(),
        w,
        zero if bias is None else bias.double(),
        zero if residual is None else residual.double(),
    )
    assert y.dtype == case.dtype
    assert y.shape == (case.m, case.n)
    excess = (y.double() - want).abs() / tolerance
    assert not (excess.isnan() | (excess > 1)).any(), f"{excess.max()} of the tolerance: {case}"


def run(
    case: Case,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    config = case.config or closed_form_config(
        case.m, case.n, case.k, case.bits, case.group_size, case.gated
    )
    with interpreted() if device == "cpu" else nullcontext():
        y = dequant_gemm(
            to_device(x, device),
            to_device(qweight, device),
            to_device(scale, device),
            None if bias is None else to_device(bias, device),
            None if residual is None else to_device(residual, device),
            bits=case.bits,
            group_size=case.group_size,
            n=case.n,
            k=case.k,
            activation=case.activation,
            gated=case.gated,
            config=config,
        )
    return y.cpu()


def to_device(t: torch.Tensor, device: str) -> torch.Tensor:
    """The same view of the same storage, elsewhere (`.to` would make the rows contiguous)."""
    if device == "cpu":
        return t
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@on_every_device
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_gemm_is_right_for_every_type(
    bits: int, dtype: torch.dtype, scale_dtype: torch.dtype, device: str
) -> None:
    check(Case(bits=bits, dtype=dtype, scale_dtype=scale_dtype), device)


@on_every_device
@pytest.mark.parametrize("k", [131, 144, 1])
@pytest.mark.parametrize("group_size", [1, 7, 16, 32, 48, 128, 131, 999])
@pytest.mark.parametrize("bits", [4, 8])
def test_gemm_is_right_for_every_group_size(
    bits: int, group_size: int, k: int, device: str
) -> None:
    check(Case(bits=bits, group_size=group_size, k=k), device)


@on_every_device
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gemm_applies_every_epilogue(
    activation: str, bias: bool, residual: bool, gated: bool, device: str
) -> None:
    case = Case(n=19, k=40, activation=activation, bias=bias, residual=residual, gated=gated)
    check(replace(case, config=SMALL), device)
    check(replace(case, config=SMALL, dtype=BF16, bits=8), device)


@on_every_device
@pytest.mark.parametrize("m", [0, 1, 16, 17, 33])
@pytest.mark.parametrize("n", [0, 1, 16, 50])
def test_gemm_is_right_for_every_number_of_rows_and_columns(m: int, n: int, device: str) -> None:
    check(Case(m=m, n=n, k=20, config=SMALL, gated=True, bias=True), device)


@on_every_device
def test_gemm_of_nothing_is_the_epilogue_of_the_bias(device: str) -> None:
    check(Case(k=0, group_size=32, bias=True, residual=True, activation="silu"), device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    k = draw(st.integers(1, 150), label="k")
    groups = st.one_of(st.just(k), st.sampled_from((16, 32, 48, 128)), st.integers(1, k))
    return Case(
        m=draw(st.integers(0, 20), label="m"),
        n=draw(st.integers(1, 40), label="n"),
        k=k,
        bits=draw(st.sampled_from((4, 8)), label="bits"),
        group_size=draw(groups, label="group_size"),
        dtype=draw(st.sampled_from(FLOATS), label="dtype"),
        scale_dtype=draw(st.sampled_from(FLOATS), label="scale_dtype"),
        bias=draw(st.booleans(), label="bias"),
        residual=draw(st.booleans(), label="residual"),
        activation=draw(st.sampled_from(ACTIVATIONS), label="activation"),
        gated=draw(st.booleans(), label="gated"),
        config=draw(
            st.none()
            | st.builds(
                TileConfig,
                BLOCK_M=st.just(16),
                BLOCK_N=st.sampled_from((16, 32)),
                BLOCK_K=st.sampled_from((16, 32, 64)),
            ),
            label="config",
        ),
        seed=draw(st.integers(0, 9), label="seed"),
    )


@settings(max_examples=60, deadline=None)
@given(cases())
def test_gemm_is_right_for_any_case(case: Case) -> None:
    check(case)


def test_split_k_is_refused_with_its_value() -> None:
    config = TileConfig(16, 16, 16, SPLIT_K=4)
    with pytest.raises(NoKernelError, match="SPLIT_K=4"):
        check(Case(config=config))
