"""The x86 kernel on every path against the float64 oracle: shapes, formats, layouts of x."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.kernels.cpu.stream import STREAM, X86_STREAM
from fqcompile.kernels.cpu.stream_layout import dequantize as dequantize_by_torch
from fqcompile.kernels.epilogue import ACTIVATIONS, Epilogue
from fqcompile.kernels.spec import GemmSpec
from fqcompile.tensor.codes import pack
from fqcompile.tensor.format import INT4, QTYPES, Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.test_op import NORMAL_LEVELS, oracle
from tests.native.paths import NAMES, path
from tests.strategies import Problem, make_problem, matmul

if not NAMES:
    pytest.skip("this processor has none of the kernel's paths", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [{"bits": qtype.bits, "levels": qtype.levels} for qtype in QTYPES.values()]
paths = st.sampled_from(NAMES)


def of_every_form(options: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """These arguments of `make_problem`, with bits and levels of a number format."""
    both = st.tuples(st.sampled_from(FORMS), st.fixed_dictionaries(options))
    return both.map(lambda found: {**found[0], **found[1]})


# What a problem has besides sizes, seed and strides.
FEATURES: dict[str, st.SearchStrategy[Any]] = {
    "activation": st.sampled_from(list(ACTIVATIONS)),
    "gated": st.booleans(),
    "bias": st.booleans(),
    "residual": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "scale_dtype": st.sampled_from(DTYPES),
}
problems = of_every_form(
    FEATURES
    | {
        "leading": st.integers(0, 40).map(lambda m: (m,)),
        "n": st.one_of(st.integers(1, 140), st.sampled_from([63, 64, 65, 128, 192])),
        "k": st.one_of(st.integers(1, 70), st.sampled_from([128, 256, 257, 520, 777])),
        "group_size": st.sampled_from([1, 5, 8, 24, 31, 32, 64, 100, 128, 4096]),
        "strided": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def packed(p: Problem) -> QuantizedTensor:
    rows = p.qweight.shape[0]
    group = min(p.group_size, p.k)
    form = Format(p.bits, group, rows, p.k, levels=p.levels)
    return STREAM.pack(QuantizedTensor(p.qweight, p.scale, form))


def assert_is_oracle(p: Problem) -> None:
    weight = packed(p)
    got = matmul(p.x, weight.qweight, weight.scale, *p.arguments[3:], "x86_stream")
    want, bound = oracle(p)
    assert (got.shape, got.dtype) == (want.shape, p.x.dtype)
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), (
        f"off by {error.max():.3g} where {bound[error > bound].min():.3g} is allowed"
    )


@given(name=paths, threads=st.sampled_from([1, 2]), options=problems)
def test_every_path_is_the_oracle(name: str, threads: int, options: dict[str, Any]) -> None:
    with path(name, threads):
        assert_is_oracle(make_problem(**options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_height_of_a_tile(
    name: str, dtype: torch.dtype, form: dict[str, Any], gated: bool
) -> None:
    """From one row to more than two tiles, over a long K with two sums and a short last group."""
    with path(name):
        for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
            for group in (96, 4096):
                p = make_problem(
                    leading=(m,), n=70, k=600, **form, group_size=group, dtype=dtype, seed=m,
                    bias=True, residual=True, activation="silu", gated=gated,
                )  # fmt: skip
                assert_is_oracle(p)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 5], ids=["whole words", "groups within words"])
@pytest.mark.parametrize(
    ("levels", "sixteenths"), [("uniform", range(-128, 128, 16)), ("normal", NORMAL_LEVELS)]
)
def test_every_code_at_every_place_of_a_word_is_exact(
    name: str, dtype: torch.dtype, group: int, levels: str, sixteenths: Sequence[int]
) -> None:
    """x = I reads ŵ itself, all rows of it and one at a time."""
    codes = torch.arange(65 * 64).view(65, 64).add(torch.arange(65)[:, None]) % 16
    values = torch.tensor(list(sixteenths), dtype=dtype)[codes] / 16
    scale = torch.ones(65, -(-64 // group), dtype=dtype)
    form = Format(4, group, 65, 64, levels=levels)
    plain = QuantizedTensor(pack((codes - 8).to(torch.int8), INT4), scale, form)
    weight, x = STREAM.pack(plain), torch.eye(64, dtype=dtype)
    with path(name):
        for some in (x, *x.split(8), *x[:4].split(1)):
            got = X86_STREAM.run(some, weight, None, Epilogue(), None)
            assert torch.equal(got, values.t()[some.argmax(1)])


@given(name=paths, options=problems, dtype=st.sampled_from(DTYPES))
def test_the_weight_comes_back_as_it_was(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    p = make_problem(**options)
    weight = packed(p)
    form = replace(weight.format, layout="plain")
    plain = QuantizedTensor(p.qweight, p.scale, form).dequantize(dtype)
    assert STREAM.dequantize is not None
    with path(name):
        by_kernel = STREAM.dequantize(weight, dtype)
    assert by_kernel.is_contiguous()
    assert torch.equal(by_kernel, plain)
    assert torch.equal(dequantize_by_torch(weight, dtype), plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, -1.0, 1e-40], ids=["zero", "negative", "denormal"])
def test_scales_of_any_sign_and_size(name: str, dtype: torch.dtype, factor: float) -> None:
    p = make_problem(leading=(3,), n=70, k=72, bits=8, group_size=24, dtype=dtype)
    scale = p.scale * factor
    with path(name):
        assert_is_oracle(replace(p, scale=scale))
        assert_is_oracle(
            replace(p, scale=torch.where(torch.rand(scale.shape) < 0.5, scale, p.scale))
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_far_from_zero(name: str, dtype: torch.dtype, activation: str) -> None:
    """x = I reads the scaled codes: pre-activations from -1024 to 1016, some within 1e-3 of 0."""
    codes = torch.arange(-128, 128, dtype=torch.int8).view(1, -1).repeat(3, 1)
    scale = torch.tensor([[8.0], [0.1], [1e-5]], dtype=dtype)
    p = Problem(
        torch.eye(256, dtype=dtype),
        codes,
        scale,
        None,
        None,
        8,
        "uniform",
        256,
        3,
        256,
        activation,
        False,
    )
    with path(name):
        assert_is_oracle(p)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_stays_in_its_row(name: str) -> None:
    p = make_problem(leading=(9,), n=70, k=40, dtype=torch.bfloat16, activation="silu")
    x = p.x.clone()
    x[4, 7], x[6, 3] = torch.nan, torch.inf
    with path(name):
        got = matmul(x, *packed(p).tensors, *p.arguments[3:], "x86_stream")
    others = [i for i in range(9) if i not in (4, 6)]
    assert bool(got[4].isnan().all())
    assert bool(got[others].isfinite().all())


def test_bias_of_another_type_and_strided() -> None:
    """Which the operator refuses, and its kernel reads."""
    p = make_problem(leading=(2,), n=70, k=40, dtype=torch.bfloat16, bias=True)
    assert p.bias is not None
    wide = torch.stack((p.bias.float(), torch.zeros(70)), 1)
    for bias in (wide[:, 0], p.bias.float(), p.bias.half()):
        with path(NAMES[-1]):
            got = X86_STREAM.run(p.x, packed(p), None, Epilogue(bias), None)
        want, bound = oracle(replace(p, bias=bias))
        assert bool(((got.double() - want).abs() <= bound).all())
    with pytest.raises(RuntimeError, match=r"fp32, bf16 and fp16, not torch\.float64"):
        X86_STREAM.run(p.x, packed(p), None, Epilogue(p.bias.double()), None)


SPEC = GemmSpec(4, 64, 128, 4, 64, torch.bfloat16, torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device_type": "cuda"}, "runs on cpu, not cuda"),
        ({"bits": 3}, "takes int4, normal4, int8, not 3 bits with uniform levels"),
        ({"levels": "log"}, "takes int4, normal4, int8, not 4 bits with log levels"),
        ({"dtype": torch.float64}, "takes fp32, bf16 and fp16, not torch.float64"),
    ],
    ids=str,
)
def test_refusal_says_why(changes: dict[str, Any], text: str) -> None:
    assert X86_STREAM.refuse(replace(SPEC, **changes)) == text


def test_many_rows_with_amx_go_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fqcompile.kernels.cpu.stream._has_amx", lambda: True)
    monkeypatch.setattr("fqcompile.kernels.cpu.stream._PANEL", 1 << 13)
    p = make_problem(
        leading=(70,), n=150, k=40, dtype=torch.bfloat16, bias=True, residual=True, gated=True
    )
    with path(NAMES[-1]):
        assert_is_oracle(p)


def test_unaligned_weights_are_only_slower() -> None:
    """As a memory-mapped file may hand them over."""
    p = make_problem(n=70, k=72, dtype=torch.bfloat16)

    def moved(t: Tensor) -> Tensor:
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)

    weight = packed(p)
    with path(NAMES[0]):
        a = matmul(p.x, weight.qweight, weight.scale, *p.arguments[3:], "x86_stream")
        b = matmul(p.x, moved(weight.qweight), moved(weight.scale), *p.arguments[3:], "x86_stream")
    assert torch.equal(a, b)


def test_strided_weights_are_copied_and_held_while_they_are_read() -> None:
    """The C++ gets addresses alone: a copy that nobody holds would be written over."""
    p = make_problem(n=70, k=4096, leading=(3,), dtype=torch.bfloat16)
    weight = packed(p)
    strided = [torch.stack((t, torch.zeros_like(t)), -1)[..., 0] for t in weight.tensors]
    with path(NAMES[0]):
        a = matmul(p.x, weight.qweight, weight.scale, *p.arguments[3:], "x86_stream")
        b = matmul(p.x, *strided, *p.arguments[3:], "x86_stream")
    assert torch.equal(a, b)
