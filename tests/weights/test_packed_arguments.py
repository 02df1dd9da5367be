"""A matmul with a PackedWeight takes what that with the dense weight takes, and refuses the rest.

The dense call decides: whatever shapes and types are drawn, both raise, or both give one result.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines the operator)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cpu.guarded import at_end_of_page
from tests.tiers import examples
from tests.weights.test_packed_weight import assert_near, dense, make

N, K, E, M = 70, 48, 3, 4
FP32, BF16 = torch.float32, torch.bfloat16
# Sizes at and around those of the layer: what is one less, one more, one, none, and another's.
near_k = st.sampled_from([K, K, K, K - 1, K + 1, 1, N])
near_e = st.sampled_from([E, E, E, E - 1, E + 1, 1])
batches = st.sampled_from([[], [M], [M], [1], [0], [2, M], [1, M]])
biases = st.sampled_from(
    [None, (N,), (N,), (N - 1,), (N + 1,), (1,), (), (M, N), (1, N), (M, 1), (2, M, N), (K,)]
)
types = st.sampled_from([FP32, FP32, FP32, BF16, torch.float64, torch.int32])


def values(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Before a page that nothing may touch."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return at_end_of_page(t) if t.numel() else t


def ids(*numbers: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return at_end_of_page(torch.tensor(numbers, dtype=dtype)) if numbers else torch.empty(0).int()


def outcome(call: Callable[[Tensor], Tensor], w: Tensor) -> Tensor | type[Exception]:
    try:
        return call(w)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        return type(error)


def assert_as_dense(call: Callable[[Tensor], Tensor], w: Any, *, defined: Any = ...) -> None:
    """Both raise, or both give equal results; of those the rows that are `defined`."""
    for inference in (False, True):
        with torch.inference_mode(inference):
            want, got = outcome(call, dense(w)), outcome(call, w)
        if isinstance(want, Tensor):
            assert isinstance(got, Tensor), f"raises {got}; the dense call gives {want.shape}"
            assert got.dtype == want.dtype and got.shape == want.shape
            assert_near(got[defined], want[defined], K)
        else:
            assert isinstance(got, type) and issubclass(got, RuntimeError | IndexError)


def add(bias: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else values(*bias, dtype=dtype)


@given(batches, near_k, types, biases, types)
@settings(max_examples=examples(150))
def test_linear(
    batch: list[int], k: int, dtype: torch.dtype, bias: tuple[int, ...] | None, of_bias: torch.dtype
) -> None:
    x, b = values(*batch, k, dtype=dtype), add(bias, of_bias)
    assert_as_dense(lambda w: F.linear(x, w, b), make(N, K))


@given(batches, near_k, types)
def test_matmul_and_mm(batch: list[int], k: int, dtype: torch.dtype) -> None:
    x, w = values(*batch, k, dtype=dtype), make(N, K, transposed=True)
    assert_as_dense(lambda w: x @ w, w)
    assert_as_dense(lambda w: torch.mm(x, w), w)
    assert_as_dense(lambda w: x @ w.t(), make(N, K))


@pytest.mark.parametrize(
    "x", [values(), values(K - 1), values(M, K)[:, : K - 1]], ids=["scalar", "row", "view"]
)
def test_a_scalar_a_row_and_a_view_of_a_wide_x(x: Tensor) -> None:
    for call in (lambda w: F.linear(x, w), lambda w: x @ w.t()):
        assert_as_dense(call, make(N, K))
        with pytest.raises(RuntimeError):
            call(make(N, K))


@given(batches, near_k, biases.filter(lambda b: b is not None), types)
@settings(max_examples=examples(60))
def test_addmm(batch: list[int], k: int, bias: tuple[int, ...], dtype: torch.dtype) -> None:
    x, b = values(*batch, k), values(*bias, dtype=dtype)
    assert_as_dense(lambda w: torch.addmm(b, x, w), make(N, K, transposed=True))


@given(near_e, st.sampled_from([0, 1, M]), near_k, types, st.booleans())
@settings(max_examples=examples(60))
def test_bmm(experts: int, rows: int, k: int, dtype: torch.dtype, left: bool) -> None:
    dtype = dtype if rows else FP32  # of nothing, PyTorch's bmm does not look at the type
    x, w = values(experts, rows, k, dtype=dtype), make(E, N, K, transposed=not left)
    call = (lambda w: torch.bmm(w, x.mT)) if left else (lambda w: torch.bmm(x, w))
    assert_as_dense(call, w)
    assert_as_dense(lambda w: w @ x.mT if left else x @ w, w)
    for flat in (values(rows, k), values(k), values(1, experts, rows, k)):
        assert_as_dense(lambda w, x=flat: torch.bmm(w, x) if left else torch.bmm(x, w), w)


@given(
    near_e,
    near_k,
    st.sampled_from([(N,), (E, 1, N), (E, M, N), (1, M, N), (), (M, 1), (N - 1,), (2, E, M, N)]),
    types,
)
@settings(max_examples=examples(60))
def test_baddbmm(experts: int, k: int, bias: tuple[int, ...], dtype: torch.dtype) -> None:
    x, b = values(experts, M, k), values(*bias, dtype=dtype)
    assert_as_dense(lambda w: torch.baddbmm(b, x, w), make(E, N, K, transposed=True))


@given(st.lists(st.integers(-E - 1, E), min_size=1, max_size=5), st.integers(1, 5), near_k)
@settings(max_examples=examples(60))
def test_gathered(routing: list[int], pairs: int, k: int) -> None:
    chosen, x = ids(*routing, dtype=torch.int64), values(pairs, 2, k)
    assert_as_dense(lambda w: torch.bmm(x, w[chosen]), make(E, N, K, transposed=True))
    assert_as_dense(lambda w: torch.bmm(w[chosen], x.mT), make(E, N, K))


@given(
    st.lists(st.integers(0, 3), min_size=E - 1, max_size=E + 1),
    st.integers(0, 3),
    near_k,
    st.sampled_from([torch.int32, torch.int32, torch.int64, FP32]),
)
@settings(max_examples=examples(80))
def test_grouped(counts: list[int], beyond: int, k: int, dtype: torch.dtype) -> None:
    ends = torch.tensor(counts).cumsum(0)
    x, offsets = values(int(ends[-1]) + beyond, k), ids(*ends.tolist(), dtype=dtype)
    w = make(E, N, K, transposed=True)
    assert_as_dense(lambda w: torch._grouped_mm(x, w, offs=offsets), w, defined=slice(ends[-1]))
    for shape in ((1, *x.shape), x.shape[:1]):
        assert_as_dense(lambda w, s=shape: torch._grouped_mm(values(*s), w, offs=offsets), w)


def test_what_is_refused_names_the_layers_sizes() -> None:
    w, stack = make(N, K), make(E, N, K, transposed=True)
    with pytest.raises(RuntimeError, match=r"x has 47 columns; the weight has K=48.*N=70"):
        F.linear(values(M, K - 1), w)
    with pytest.raises(RuntimeError, match=r"2 offsets for 3 experts|batch sizes"):
        torch._grouped_mm(values(M, K), stack, offs=ids(1, 4))
    with pytest.raises(RuntimeError, match=r"\[2, 48\] but got: \[3, 48\]"):
        torch.bmm(values(2, M, K), stack)


@given(
    st.lists(st.integers(0, 3), min_size=E - 1, max_size=E + 1),
    st.integers(0, 3),
    near_k,
    st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=examples(60))
def test_the_fallback_of_transformers(
    counts: list[int], beyond: int, k: int, dtype: torch.dtype
) -> None:
    """All of its rows are defined: those beyond the last offset are zeros."""
    ends = torch.tensor(counts).cumsum(0)
    assume(k == K or ends[-1] > 0)  # the dense one multiplies nothing then, and sees no K
    x, offsets = values(int(ends[-1]) + beyond, k), ids(*ends.tolist(), dtype=dtype)
    call = torch.ops.transformers.grouped_mm_fallback
    assert_as_dense(lambda w: call(x, w, offsets), make(E, N, K, transposed=True))


@pytest.mark.parametrize("inference", [False, True])
def test_a_nested_tensor_is_multiplied_as_by_a_dense_weight(inference: bool) -> None:
    w = make(N, K)
    x = torch.nested.nested_tensor([values(3, K), values(2, K)])
    with torch.inference_mode(inference):
        got, want = F.linear(x, w), F.linear(x, dense(w))
    for one, other in zip(got.unbind(), want.unbind(), strict=True):
        assert_near(one, other, K)
