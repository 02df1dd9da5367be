"""What is written to a packed weight, or to any view of it, lands or is refused: it never vanishes.

The oracle is a dense tensor of the same values, of which the same views are taken, and to which the
same is written.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fqcompile.errors import FineQuantError
from fqcompile.quant.choose import QuantPlan, quantize_weight
from fqcompile.weights.dense_view import DenseView
from fqcompile.weights.parameter import PackedWeight

View = Callable[[Tensor], Tensor]
# Rounding moves a value by half a step at most, and clamps what lies opposite to the extreme of its
# group by one; the step itself is rounded to fp16, by 2**-11 of 8 steps.
STEPS = 1.01


def make(
    shape: tuple[int, ...], *, transposed: bool = False, bits: int = 4, levels: str = "uniform"
) -> PackedWeight:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plan = QuantPlan(bits, 8, "absmax", torch.float16, 0.0, levels=levels)
    weight = quantize_weight(w, plan).changed(transposed=transposed)
    return PackedWeight.of(weight, torch.float32, "layer.weight")


def plain(w: Tensor) -> Tensor:
    """The values in an ordinary tensor that nothing else holds."""
    return w.clone() if not isinstance(w, PackedWeight) else w.dequantized().clone()


def codes(w: PackedWeight) -> tuple[Tensor, Tensor]:
    """Plain codes and scales [rows, ...], copied."""
    weight = w.quantized()
    qweight, scale = weight.as_rows()
    return qweight.clone(), scale.clone()


@st.composite
def view(draw: st.DrawFn, shape: tuple[int, ...]) -> View:
    """A view that a tensor of this shape has, whatever its strides."""
    dims = len(shape)
    dim = draw(st.integers(-dims, dims - 1))
    length = shape[dim]
    start = draw(st.integers(0, length - 1))
    stop = draw(st.integers(start + 1, length))
    step = draw(st.integers(1, 3))
    other = draw(st.integers(-dims, dims - 1))
    order = draw(st.permutations(range(dims)))
    pieces = draw(st.integers(1, length))
    divisor = draw(st.sampled_from([d for d in range(1, length + 1) if length % d == 0]))
    position = dim % dims
    at = (slice(None),) * position
    views: list[View] = [
        lambda w: w[(*at, slice(start, stop, step))],
        lambda w: w.narrow(dim, start, stop - start),
        lambda w: w.chunk(pieces, dim)[0],
        lambda w: w.tensor_split(pieces, dim)[-1],
        lambda w: w.split(pieces, dim)[-1],
        lambda w: w.unflatten(dim, (divisor, -1)),
        lambda w: w.transpose(dim, other),
        lambda w: w.permute(order),
        lambda w: w.movedim(dim, other),
        lambda w: w.unsqueeze(dim),
        lambda w: w.squeeze(),
        lambda w: w.detach(),
        lambda w: w.data,
        lambda w: w[None],
        lambda w: w.unfold(dim, stop - start, step),
        lambda w: w.expand(2, *shape),
        lambda w: w.view_as(w),
        lambda w: w.swapaxes(dim, other),
        lambda w: w.as_strided(w.size(), w.stride(), w.storage_offset()),
        lambda w: w.reshape(-1) if w.is_contiguous() else w,
    ]
    if dims > 1:
        views += [
            lambda w: w.select(dim, start),
            lambda w: w.unbind(dim)[start],
            lambda w: w.mT,
            lambda w: w.diagonal(0, *order[:2]),
            lambda w: w.hsplit([start, stop])[1] if shape[1] >= stop > start else w,
        ]
    return draw(st.sampled_from(views))


def _foreach(w: Tensor) -> None:
    torch._foreach_mul_([torch.ones(1), w], 2.0)


def _foreach_copy(w: Tensor) -> None:
    torch._foreach_copy_([w], [torch.ones(w.shape)])


def _fused_step(w: Tensor) -> None:
    torch._fused_sgd_(
        [w], [torch.ones(w.shape)], [], weight_decay=0.0, momentum=0.0, lr=0.5, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=True,
    )  # fmt: skip


def _assign(w: Tensor) -> None:
    w[...] = 0.25


def _assign_by_index(w: Tensor) -> None:
    w[torch.tensor([0])] = 0.25


def _assign_by_mask(w: Tensor) -> None:
    w[torch.ones(w.shape, dtype=torch.bool)] = 0.25


def _assign_first(w: Tensor) -> None:
    w[0] = torch.ones(w.shape[1:])


def _first(w: Tensor) -> Tensor:
    return torch.zeros(w.shape, dtype=torch.long)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "copy_": lambda w: w.copy_(torch.arange(w.numel(), dtype=w.dtype).view(w.shape)),
    "copy_ of one value": lambda w: w.copy_(torch.tensor(0.5)),
    "copy_ of itself": lambda w: w.copy_(w.flip(0)),
    "fill_": lambda w: w.fill_(0.5),
    "zero_": lambda w: w.zero_(),
    "add_": lambda w: w.add_(1.0),
    "div_": lambda w: w.div_(4),
    "iadd": lambda w: w.__iadd__(1.0),
    "clamp_": lambda w: w.clamp_(-0.1, 0.1),
    "normal_": lambda w: w.normal_(),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(w.shape, dtype=torch.bool), 0.5),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([0]), 0.5),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([0]), torch.ones(1, *w.shape[1:])),
    "index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.tensor(0.5)),
    "scatter_": lambda w: w.scatter_(0, _first(w), 0.5),
    "scatter_add_": lambda w: w.scatter_add_(0, _first(w), torch.ones(w.shape)),
    "put_": lambda w: w.put_(torch.tensor([0]), torch.tensor([0.5])),
    "out": lambda w: torch.add(torch.ones(w.shape), 1.0, out=w),
    "out of a sum": lambda w: torch.sum(torch.ones(2, *w.shape), 0, out=w),
    "foreach": _foreach,
    "foreach copy": _foreach_copy,
    "fused step": _fused_step,
    "assign": _assign,
    "assign by index": _assign_by_index,
    "assign by mask": _assign_by_mask,
    "assign first": _assign_first,
    "init": lambda w: nn.init.ones_(w),
}
SHAPES = [(12, 16), (3, 8, 16)]


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@given(data=st.data())
def test_any_write_to_any_view_lands_or_is_refused(
    inference: bool, shape: tuple[int, ...], transposed: bool, data: st.DataObject
) -> None:
    w = make(shape, transposed=transposed)
    expected = plain(w).contiguous()
    old = codes(w)
    shown: Tensor = w
    mirror: Tensor = expected
    write = WRITES[data.draw(st.sampled_from(list(WRITES)), label="write")]
    with torch.inference_mode(inference):
        for _ in range(data.draw(st.integers(0, 3), label="views")):
            one = data.draw(view(tuple(mirror.shape)))
            shown, mirror = one(shown), one(mirror)
            assert isinstance(shown, PackedWeight | DenseView)
            assert torch.equal(plain(shown), mirror)
            assert shown.stride() == mirror.stride()
            assert shown.storage_offset() == mirror.storage_offset()
        try:
            write(shown)
        except FineQuantError as error:
            assert "fqcompile.restore(model)" in str(error) and "layer.weight" in str(error)
            assert all(map(torch.equal, codes(w), old)), "refused, and nothing has changed"
            return
        except (RuntimeError, IndexError) as error:
            with pytest.raises(type(error)):
                write(mirror)
            assert all(map(torch.equal, codes(w), old))
            return
        write(mirror)
    assert_near(w, expected, old)
    whole = plain(w).contiguous()
    assert torch.equal(plain(shown), whole.as_strided(*_place(shown))), "it shows what it was given"


def decoded(qweight: Tensor, scale: Tensor) -> Tensor:
    """Rows [N, K] of int4 codes in groups of 8."""
    pairs = torch.stack((qweight & 15, qweight >> 4), -1).flatten(1).float() - 8
    return pairs * scale.float().repeat_interleave(8, 1)


def _place(shown: Tensor) -> tuple[Any, ...]:
    return shown.size(), shown.stride(), shown.storage_offset()


def assert_near(w: PackedWeight, expected: Tensor, old: tuple[Tensor, Tensor]) -> None:
    """Rows that were written to within their steps of what was written, all others as before."""
    rows = (expected.mT if w.format.transposed else expected).reshape(-1, w.format.k)
    before = decoded(*old)
    kept = (rows == before).all(1)
    new = codes(w)
    for now, then in zip(new, old, strict=True):
        assert torch.equal(now[kept].float(), then[kept].float())
    steps = new[1].float().abs().repeat_interleave(8, 1)
    values = (w.dequantized().mT if w.format.transposed else w.dequantized()).reshape(rows.shape)
    assert bool(((values - rows).abs() <= STEPS * steps).all())


UNSAFE: dict[str, View] = {
    "chunk": lambda w: torch.unsafe_chunk(w, 2)[1],
    "split": lambda w: torch.unsafe_split(w, 4)[1],
    "split_with_sizes": lambda w: torch.unsafe_split_with_sizes(w, [4, 4])[1],
    "view": lambda w: torch.ops.aten._unsafe_view(w, [2, 4, 16])[1],
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("form", UNSAFE)
def test_what_is_called_unsafe_is_a_view(form: str, inference: bool) -> None:
    """A dense weight shares its memory with what these return, whatever their schemas say."""
    w = make((8, 16), bits=8)
    new = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    want = w.dequantize()
    with torch.inference_mode(inference):
        UNSAFE[form](want).copy_(new)
        UNSAFE[form](w).copy_(new)
    step = new.abs().max() / 127
    torch.testing.assert_close(w.dequantize(), want, atol=STEPS * step, rtol=0)
    with pytest.raises(FineQuantError, match=r"layer\.weight"):
        UNSAFE[form](w).zero_()


@pytest.mark.parametrize("alias", [lambda w: w.data, lambda w: w.detach()])
def test_assigned_data_of_an_alias_is_its_own(alias: View) -> None:
    """As of a dense tensor, of which only the alias is given other memory."""
    w = nn.Parameter(make((8, 16)), requires_grad=False)
    before, other = w.dequantize(), alias(w)
    other.data = torch.ones(8, 16)
    assert torch.equal(w.dequantize(), before)
    torch.testing.assert_close(other.dequantize(), torch.ones(8, 16), atol=2**-11, rtol=0)
    w.data = torch.ones(8, 16)
    torch.testing.assert_close(w.dequantize(), torch.ones(8, 16), atol=2**-11, rtol=0)


def test_what_cannot_be_written_is_refused_by_name() -> None:
    w = nn.Parameter(make((8, 16)), requires_grad=False)
    before = w.dequantize()
    for write in (
        lambda: setattr(w, "data", torch.empty(0)),
        lambda: w.copy_(torch.full((8, 16), torch.nan)),
    ):
        with pytest.raises(FineQuantError, match=r"layer\.weight.*fqcompile\.restore"):
            write()
    assert torch.equal(w.dequantize(), before)


def test_numbers_are_read_as_of_a_dense_weight() -> None:
    w = make((8, 16))
    dense = w.dequantize()
    assert w.tolist() == dense.tolist() and w[0].tolist() == dense[0].tolist()
    assert f"{w[0, 0]:.3f}" == f"{dense[0, 0]:.3f}" and w[0, 0].item() == dense[0, 0].item()
