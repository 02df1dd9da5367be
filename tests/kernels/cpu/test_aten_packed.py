"""PyTorch's packed CPU kernels as templates: exact where they apply, and why elsewhere not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fqcompile.kernels.cpu.aten_packed import ATEN_INT4_CPU, INT4PACK, INT8PACK
from fqcompile.kernels.spec import GemmSpec
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.test_op import assert_matches_oracle, oracle
from tests.strategies import make_problem, matmul

BF16 = torch.bfloat16
INT4 = GemmSpec(4, 64, 128, 4, 64, BF16, BF16, "cpu")
INT8 = GemmSpec(4, 7, 48, 8, 48, BF16, BF16, "cpu")

REFUSALS = [
    (INT4PACK, replace(INT4, device_type="cuda"), "runs on cpu, not cuda"),
    (INT4PACK, replace(INT4, bits=8), "takes 4-bit weights, not 8-bit"),
    (
        INT4PACK,
        replace(INT4, dtype=torch.float16),
        "takes bf16 activations and scales, not torch.float16 and",
    ),
    (INT4PACK, replace(INT4, scale_dtype=torch.float32), "and torch.float32"),
    (
        INT4PACK,
        replace(INT4, group_size=16),
        "takes groups of (32, 64, 128, 256) that divide K=128, not 16",
    ),
    (INT4PACK, replace(INT4, k=96), "that divide K=96, not 64"),
    (INT4PACK, replace(INT4, n=72), "takes a multiple of 64 weight rows, not 72"),
    (INT4PACK, replace(INT4, needs_backward=True), "cannot be dequantized for a backward pass"),
    (
        INT4PACK,
        replace(INT4, m=65),
        "slower than dequantizing above 64 rows; the example has 65",
    ),
    (INT8PACK, replace(INT8, group_size=32), "takes one scale per column, not groups of 32"),
    (INT8PACK, replace(INT8, bits=4), "takes 8-bit weights, not 4-bit"),
    (INT8PACK, replace(INT8, device_type="cuda"), "runs on cpu, not cuda"),
    (
        INT8PACK,
        replace(INT8, k=33, group_size=33),
        "reads K in blocks of 16 and beyond its end for K=33",
    ),
]


@pytest.mark.parametrize(("template", "spec", "text"), REFUSALS, ids=[t for *_, t in REFUSALS])
def test_refusal_says_why(template: object, spec: GemmSpec, text: str) -> None:
    assert text in (template.refuse(spec) or "")


def test_what_they_take_is_not_refused() -> None:
    assert INT4PACK.refuse(INT4) is None
    assert INT4PACK.refuse(replace(INT4, n=32, gated=True)) is None
    assert INT8PACK.refuse(INT8) is None


epilogues = {
    "activation": st.sampled_from(["none", "relu", "gelu", "silu"]),
    "gated": st.booleans(),
    "bias": st.booleans(),
    "residual": st.booleans(),
    "strided": st.booleans(),
    "leading": st.sampled_from([(1,), (2, 3), (70,), ()]),
    "seed": st.integers(0, 99),
}


def before_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN (bytes of ones) behind the last, so that reading on is seen."""
    rest = torch.full((4096,), -1, dtype=torch.int8).view(tensor.dtype)
    if tensor.is_floating_point():
        rest.fill_(torch.nan)
    return torch.cat([tensor.flatten(), rest])[: tensor.numel()].view(tensor.shape)


@given(n=st.integers(1, 20), k=st.integers(1, 70), options=st.fixed_dictionaries(epilogues))
def test_int8_is_the_oracle_and_reads_nothing_else(
    n: int, k: int, options: dict[str, object]
) -> None:
    p = make_problem(
        n=n, k=16 * -(-k // 16), bits=8, group_size=16 * -(-k // 16), dtype=BF16, **options
    )
    spec = replace(INT8, n=n, k=p.k, group_size=p.k, gated=p.gated)
    assert INT8PACK.refuse(spec) is None
    packed = {name: before_nan(getattr(p, name)) for name in ("x", "qweight", "scale")}
    assert_matches_oracle(replace(p, **packed), "aten_int8pack")


@given(
    n=st.sampled_from([64, 128]),
    k=st.sampled_from([64, 128, 320]),
    group_size=st.sampled_from([32, 64]),
    options=st.fixed_dictionaries(epilogues),
)
def test_int4_in_its_own_layout_is_the_oracle(
    n: int, k: int, group_size: int, options: dict[str, object]
) -> None:
    p = make_problem(n=n, k=k, group_size=group_size, dtype=BF16, **options)
    rows = p.qweight.shape[0]
    packed = ATEN_INT4_CPU.pack(QuantizedTensor(p.qweight, p.scale, Format(4, group_size, rows, k)))
    got = matmul(p.x, *packed.tensors, *p.arguments[3:], "aten_int4pack")
    want, bound = oracle(p)
    assert got.shape == want.shape
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"off by {error.max():.3g}"
