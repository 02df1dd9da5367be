"""The C++ quantizer gives bit for bit what PyTorch's operations give, on every path."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fqcompile.config import SiteOptions
from fqcompile.errors import UnquantizableWeight
from fqcompile.quant import native_quantizer
from fqcompile.quant.choose import QuantPlan, choose_and_quantize
from fqcompile.quant.granularity import estimate_errors
from fqcompile.tensor.format import INT8, NORMAL4, QType
from fqcompile.tensor.quantized import QuantizedTensor
from tests.native.paths import NAMES, path
from tests.quant.strategies import (
    KINDS,
    METHODS,
    SCALE_DTYPES,
    group_sizes,
    matrices,
    matrix,
    qtypes,
)

if not NAMES:
    pytest.skip("this processor has none of the kernel's paths", allow_module_level=True)

T = TypeVar("T")
paths = st.sampled_from(NAMES)
threads = st.sampled_from([1, 2])


def by_pytorch(make: Callable[[], T]) -> T:
    """What `make` returns where the C++ takes no weight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_quantizer, "takes", lambda w: False)
        return make()


def assert_same(
    one: tuple[QuantPlan, QuantizedTensor], other: tuple[QuantPlan, QuantizedTensor]
) -> None:
    assert one[0] == other[0] and one[1].format == other[1].format
    for mine, theirs in zip(one[1].tensors, other[1].tensors, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@st.composite
def error_weights(draw: st.DrawFn, k: int) -> torch.Tensor | None:
    """None, or h [K] of any spread, with zeros here and there or throughout a group."""
    kind = draw(st.sampled_from(["none", "spread", "zeros", "zero groups", "denormal"]))
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    h = torch.randn(k, generator=generator).mul(3).exp()
    if kind == "zeros":
        h *= torch.rand(k, generator=generator) < 0.5
    elif kind == "zero groups":
        h[k // 3 : k // 3 + 40] = 0
    elif kind == "denormal":
        h *= 1e-41
    return h


@given(
    name=paths,
    threads=threads,
    w=matrices(),
    factor=st.sampled_from([1.0, 1.0, 1e-3, 1e-41, 1e30]),
    qtype=qtypes,
    granularity=st.one_of(st.sampled_from(["adaptive", "range", "column"]), group_sizes),
    method=st.sampled_from(METHODS),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    data=st.data(),
)
def test_codes_scales_and_errors(
    name: str,
    threads: int,
    w: torch.Tensor,
    factor: float,
    qtype: QType,
    granularity: int | str,
    method: str,
    scale_dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    w = (w * factor).clamp(torch.finfo(w.dtype).min, torch.finfo(w.dtype).max)
    h = data.draw(error_weights(w.shape[1]), label="h")
    size = min(granularity, w.shape[1]) if isinstance(granularity, int) else granularity
    options = SiteOptions(
        bits=qtype.bits, levels=qtype.levels, granularity=size, scale_method=method
    )

    def quantized() -> tuple[QuantPlan, QuantizedTensor] | str:
        try:
            return choose_and_quantize(w, options, scale_dtype, h)
        except UnquantizableWeight as error:
            return str(error)

    with path(name, threads):
        found = quantized()
    expected = by_pytorch(quantized)
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected
    else:
        assert_same(found, expected)


@given(paths, st.sampled_from(KINDS), qtypes, st.integers(0, 99), st.data())
@example(NAMES[0], "outlier", NORMAL4, 0, None)
def test_estimates_of_every_candidate(
    name: str, kind: str, qtype: QType, seed: int, data: st.DataObject | None
) -> None:
    """Groups from one weight to a whole row, short last ones, segments that are not full."""
    w = matrix(kind, 5, 777, seed).to(torch.bfloat16)
    h = None if data is None else data.draw(error_weights(777), label="h")
    sizes = (777, 512, 100, 64, 33, 32, 16, 5, 1)
    options = SiteOptions(bits=qtype.bits, levels=qtype.levels)
    with path(name):
        found = estimate_errors(w, sizes, options, h)
    assert found == by_pytorch(lambda: estimate_errors(w, sizes, options, h))


@pytest.mark.parametrize("qtype", [NORMAL4, INT8], ids=lambda qtype: qtype.name)
def test_threads_and_pieces_change_nothing(qtype: QType, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.stack([matrix("heavy", 300, 2050, seed) for seed in range(2)])
    h = matrix("gaussian", 2, 2050).exp()
    options = SiteOptions(bits=qtype.bits, levels=qtype.levels)
    results = []
    for workers, call in ((1, 64.0), (2, 64.0), (2, 0.1)):
        monkeypatch.setattr(native_quantizer, "_CALL", call)
        with path(NAMES[0], workers):
            results.append(choose_and_quantize(w, options, torch.float16, h))
    for other in results[1:]:
        assert_same(results[0], other)
    for same in (w.transpose(1, 2).contiguous().transpose(1, 2), w.repeat(1, 1, 2)[..., :2050]):
        assert_same(results[0], choose_and_quantize(same, options, torch.float16, h))


def test_where_there_is_no_compiler_pytorch_quantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix("gaussian", 8, 256)
    with path(NAMES[0]):
        found = choose_and_quantize(w, SiteOptions(), torch.float16)
    monkeypatch.setattr(native_quantizer.native, "loaded", lambda: "no C++ compiler")
    assert not native_quantizer.takes(w)
    assert_same(found, choose_and_quantize(w, SiteOptions(), torch.float16))


def test_what_the_other_type_and_device_are_left_to_pytorch() -> None:
    assert not native_quantizer.takes(torch.zeros(2, 2, dtype=torch.float64))
    assert not native_quantizer.takes(torch.zeros(2, 2, device="meta"))
