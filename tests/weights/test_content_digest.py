"""content_digest: equal exactly where type, shape and bytes are, but for transposed views."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.tensor import chunks
from fqcompile.weights import fingerprint as module
from fqcompile.weights.fingerprint import content_digest, mixed_sum
from tests.quant.strategies import matrices


def content(w: Tensor) -> tuple[object, ...]:
    """What the digest stands for: numpy's copy of the values, byte by byte."""
    raw = torch.empty(w.shape, dtype=w.dtype).copy_(w).view(torch.uint8)
    return w.dtype, tuple(w.shape), raw.numpy().tobytes()


@given(matrices(), matrices())
def test_two_tensors_have_one_digest_where_their_contents_are_equal(a: Tensor, b: Tensor) -> None:
    one, other = a.contiguous(), b.contiguous()
    assert (content_digest(one) == content_digest(other)) is (content(a) == content(b))
    if content_digest(a) != content_digest(one):
        assert a.t().is_contiguous()
        assert content_digest(a) not in (content_digest(other), content_digest(a.t()))


@given(matrices(), st.data())
def test_no_bit_may_change(w: Tensor, data: st.DataObject) -> None:
    w = torch.empty(w.shape, dtype=w.dtype).copy_(w)
    changed = w.clone()
    raw = changed.view(-1).view(torch.uint8)
    at = data.draw(st.integers(0, len(raw) - 1), label="byte")
    raw[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    assert content_digest(changed) != content_digest(w)


def test_the_same_bytes_of_another_type_or_shape_are_another_content() -> None:
    raw = torch.arange(96, dtype=torch.int16)
    shapes = ((8, 12), (12, 8), (1, 96), (96, 1), (2, 4, 12), (4, 2, 12), (8, 1, 12))
    forms = [raw.view(dtype).view(s) for dtype in (torch.bfloat16, torch.float16) for s in shapes]
    assert len({content_digest(w) for w in forms}) == len(forms)


def test_one_value_has_a_name_whatever_its_strides() -> None:
    value = torch.tensor([[1.0, 2.0]])[:, ::2]
    assert value.stride() == (2, 2)
    assert content_digest(value) == content_digest(torch.ones(1, 1))
    assert content_digest(torch.ones(3, 1).t()[:, :1]) == content_digest(torch.ones(1, 1))


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8)])
def test_a_square_matrix_and_its_transpose_in_the_same_memory_are_two_contents(
    shape: tuple[int, ...],
) -> None:
    w = torch.randn(shape)
    assert content_digest(w.mT) != content_digest(w)


def test_zeros_of_either_sign_are_two_contents() -> None:
    assert content_digest(torch.zeros(2, 2)) != content_digest(-torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(1500, 1000), (3, 700, 1000)])
def test_pieces_and_threads_are_not_seen(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several pieces each: a change in any is seen, their order too, and threads are not."""
    w = torch.randn(shape)
    whole = content_digest(w)
    turned = w.mT.contiguous().mT
    strided = torch.stack([w, w], dim=-1)[..., 0]
    assert content_digest(strided) == whole
    assert content_digest(turned) != whole
    assert content_digest(turned.clone(memory_format=torch.preserve_format)) == content_digest(
        turned
    )
    for places in itertools.product(*([0, size // 2, size - 1] for size in shape)):
        changed = w.clone()
        changed[places] += 1
        assert content_digest(changed) != whole, places
        assert content_digest(changed.mT.contiguous().mT) != content_digest(turned), places
    assert content_digest(w.flip(0)) != whole
    chunks._pool.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert content_digest(w) == whole
    chunks._pool.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5), (2, 3, 4, 5), (300, 1000)])
def test_the_mixed_sum_is_of_the_bytes_and_their_places(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 1 << 16)
    w = torch.randn(shape).to(dtype)
    found = mixed_sum(w)
    assert mixed_sum(w.clone()) == mixed_sum(w.flip(0).flip(0)) == found
    others = [-w, w * 2, w.flip(-1)] if w.numel() > 1 else []
    for element in range(min(w.numel(), 3)):
        changed = w.clone()
        changed.view(-1)[-1 - element] += 1
        others.append(changed)
    sums = [mixed_sum(other) for other in others]
    assert found not in sums
    assert len(set(sums)) == len(sums)
