"""Cases for the Triton family: drawn from a seed, run there, held against fp64 from the codes.

Nothing here unpacks: the weight is built from the codes before they are packed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import Tensor

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.spec import TileConfig
from fqcompile.kernels.triton import launch, layout
from fqcompile.kernels.triton.dependent_launch import EARLY
from fqcompile.tensor.codes import pack
from fqcompile.tensor.format import QTYPES, Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.triton.interpreter import interpreted
from tests.kernels.triton.interpreter_memory import Memory
from tests.kernels.triton.ptx import emulated_ptx

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
FLOATS = (FP16, BF16, FP32)
NARROW = (FP16, BF16)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "swiglu_oai")
CONVERSIONS = ("exponent", "subnormal", "subnormal_prmt")
FORMATS = ((4, "uniform"), (4, "normal"), (8, "uniform"))  # bits and levels
COLUMN = 4096  # more than any K here: one scale per row
GROUPS = (16, 32, 48, 64, 96, 128, 192, 256, 384, COLUMN)
UNEVEN_GROUPS = (272, 320)  # beyond 256, and no multiple of a block
SMALL = TileConfig(16, 64, 128, 1, 4, 2)

# Tensor cores cut sums off where a CPU rounds them to nearest.
U32 = 2.0**-23
STEEPEST = 1.13  # slope of gelu; silu's is 1.0998

every_format = pytest.mark.parametrize(("bits", "levels"), FORMATS)
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])
on_every_device = pytest.mark.parametrize("device", ["cpu", CUDA])


@contextmanager
def running(device: str, order: int | None = None) -> Iterator[Memory | None]:
    """Inside, kernels run: on a GPU, or on the CPU with every access checked, as on an H200.

    order: the seed of a random order of the programs; the order of the grid if None.
    """
    if device != "cpu":
        yield None
        return
    with pytest.MonkeyPatch.context() as patch, interpreted() as memory, emulated_ptx():
        patch.setattr(launch, "early_launch", lambda device: EARLY)
        memory.order = None if order is None else Random(order)
        yield memory


@dataclass(frozen=True)
class Case:
    """`scales` is one of "normal" (both signs), "some zero", "denormal"."""

    m: int = 5
    n: int = 37
    k: int = 300
    bits: int = 4
    group_size: int = 32
    dtype: torch.dtype = FP16
    scale_dtype: torch.dtype = FP16
    scales: str = "normal"
    bias: bool = False
    residual: bool = False
    activation: str = "none"
    gated: bool = False
    kwidth: int = 2
    conversion: str = "subnormal"
    levels: str = "uniform"
    config: TileConfig = SMALL
    seed: int = 0

    @property
    def rows(self) -> int:
        return 2 * self.n if self.gated else self.n


@dataclass(frozen=True)
class Inputs:
    """`w` [rows, K] is the weight in fp64."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    w: Tensor
    bias: Tensor | None
    residual: Tensor | None


def group_of(k: int, group_size: int) -> Tensor:
    """int64 [K]: the group of each column."""
    return torch.arange(k) // group_size


def quantized(
    codes: Tensor, scale: Tensor, bits: int, group_size: int, levels: str = "uniform"
) -> QuantizedTensor:
    rows, k = codes.shape
    form = Format(bits, min(group_size, k), rows, k, levels=levels)
    return QuantizedTensor(pack(codes, form.qtype), scale, form)


def packed(
    codes: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    kwidth: int = 2,
    device: str = "cpu",
    levels: str = "uniform",
) -> QuantizedTensor:
    plain = quantized(codes, scale, bits, group_size, levels)
    qweight, scales = layout.pack(plain, kwidth)
    return QuantizedTensor(qweight.to(device), scales.to(device), plain.format)


def levels_of(codes: Tensor, bits: int, levels: str) -> Tensor:
    """Each code's level in fp64."""
    table = torch.tensor(QTYPES[bits, levels].values, dtype=torch.float64)
    return table[codes.long() + len(table) // 2]


def random_codes(bits: int, rows: int, k: int) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, k)).to(torch.int8)


def random_scale(case: Case) -> Tensor:
    scale = torch.randn(case.rows, -(-case.k // case.group_size))
    if case.scales == "denormal":
        return (scale.double() * torch.finfo(case.scale_dtype).smallest_normal).to(case.scale_dtype)
    if case.scales == "some zero":
        scale[torch.rand(scale.shape) < 0.5] = 0
        scale[0] = 0
    return (scale / (1 << (case.bits - 1))).to(case.scale_dtype)


def inside_nans(values: Tensor) -> Tensor:
    """The same values as strided rows of a matrix of NaN, so that reading past a row shows."""
    rows, columns = values.shape
    around = torch.full((rows + 2, columns + 3), torch.nan, dtype=values.dtype)
    around[1:-1, 1:-2] = values
    return around[1:-1, 1:-2]


def draw(case: Case) -> Inputs:
    """x and residual are rows inside NaNs; bias has a stride."""
    torch.manual_seed(case.seed)
    codes, scale = random_codes(case.bits, case.rows, case.k), random_scale(case)
    return Inputs(
        x=inside_nans(torch.randn(case.m, case.k).to(case.dtype)),
        codes=codes,
        scale=scale,
        w=levels_of(codes, case.bits, case.levels)
        * scale.double()[:, group_of(case.k, case.group_size)],
        bias=torch.randn(2 * case.rows).to(case.dtype)[::2] if case.bias else None,
        residual=inside_nans(torch.randn(case.m, case.n).to(case.dtype)) if case.residual else None,
    )


def on_device(t: Tensor | None, device: str) -> Tensor | None:
    """The same view of the same storage, elsewhere (`.to` would make the rows contiguous)."""
    if t is None or device == "cpu":
        return t
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def run(case: Case, inputs: Inputs, device: str = "cpu", order: int | None = None) -> Tensor:
    """What the family computes, every element of it written by a kernel; order as in `running`."""
    weight = packed(
        inputs.codes, inputs.scale, case.bits, case.group_size, case.kwidth, device, case.levels
    )
    x, bias, residual = (on_device(t, device) for t in (inputs.x, inputs.bias, inputs.residual))
    with pytest.MonkeyPatch.context() as patch, running(device, order) as memory:
        patch.setattr(launch, "conversion", lambda device, dtype: case.conversion)
        epilogue = Epilogue(bias, residual, case.activation, case.gated)
        y = launch.dequant_gemm(x, weight, epilogue, case.config, case.kwidth)
        assert memory is None or memory.unwritten(y) == 0
    assert (y.dtype, y.shape) == (case.dtype, (case.m, case.n))
    return y.cpu()


def activate(z: Tensor, name: str) -> Tensor:
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))
    table = {
        "none": z,
        "relu": z.clamp(min=0),
        "gelu": z * 0.5 * (1 + torch.erf(z / 2**0.5)),
        "gelu_tanh": z * 0.5 * (1 + tanh),
        "silu": z / (1 + torch.exp(-z)),
        "swiglu_oai": z.clamp(max=7) / (1 + torch.exp(-1.702 * z.clamp(max=7))),
    }
    return table[name]


def of_up(z: Tensor, name: str) -> Tensor:
    return z.clamp(-7, 7) + 1 if name == "swiglu_oai" else z


def expected(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The result in fp64 and how far a right kernel may be from it.

    Products of x with level / factor are exact in fp32: 11 + 8 bits at most. Each then
    goes through at most K - 1 sums, whatever their order and however K is shared out, one fma or
    product with its scale, and the sum with the bias; each of them is off by u = 2^-23 of the sum
    of the magnitudes, (K + 4) u (sum |x||w| + |bias|) with the terms of second order. Below the
    normal numbers of fp32 a scaled sum is off by 2^-150 instead, once for each of up to K / 16
    groups and once at the end, and is multiplied with the factor (2^6 for bf16, 2^9) afterwards.
    Activations have slopes below 1.13 and errors below 2^-20 |z|, the GPU's approximate exponential
    included; what becomes of up is one rounding more. The epilogue's product and sums are one each.
    Then one rounding to the output type, whose subnormals have a fixed spacing.
    """
    x, w, zero = inputs.x.double(), inputs.w, torch.zeros((), dtype=torch.float64)
    bias = zero if inputs.bias is None else inputs.bias.double()
    residual = zero if inputs.residual is None else inputs.residual.double()
    z = x @ w.T + bias
    tiny = (case.k / 16 + 2) * 2.0**-150 * (2**6 if case.dtype == BF16 else 2**9)
    dz = (case.k + 4) * U32 * (x.abs() @ w.abs().T + bias.abs()) + tiny
    gate, up = z.chunk(2, -1) if case.gated else (z, torch.ones(()))
    d_gate, d_up = dz.chunk(2, -1) if case.gated else (dz, zero)
    a = activate(gate, case.activation)
    if case.activation != "none":
        d_gate = STEEPEST * d_gate + 2.0**-20 * gate.abs()
    if case.gated:
        up = of_up(up, case.activation)
    y = a * up + residual
    dy = d_gate * up.abs() + (a.abs() + d_gate) * d_up
    dy = dy + 5 * U32 * ((a * up).abs() + residual.abs())
    out = torch.finfo(case.dtype)
    return y, dy + (y.abs() + dy) * out.eps / 2 + out.smallest_normal * out.eps / 2


def assert_close(case: Case, inputs: Inputs, y: Tensor) -> None:
    want, tolerance = expected(case, inputs)
    excess = ((y.double() - want).abs() / tolerance).nan_to_num(nan=torch.inf)
    assert not (excess > 1).any(), f"{excess.max():.3g} times the tolerance: {case}"


def check(case: Case, device: str = "cpu") -> None:
    inputs = draw(case)
    assert_close(case, inputs, run(case, inputs, device))
