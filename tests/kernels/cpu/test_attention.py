"""fqcompile::attention against softmax(scale q kᵀ + mask) v in float64, on every path."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.kernels.cpu.attention import Options, _impl, attention, plain_attention
from fqcompile.native import library as native_library
from tests.children import in_child
from tests.kernels.cpu.guarded import at_end_of_page, at_start_of_page
from tests.native.paths import NAMES, path

if not NAMES:
    pytest.skip("this processor has none of the kernel's paths", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U = 2.0**-24
ROUNDING = {torch.float32: U, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 0.25
    softcap: float = 0.0
    causal: bool = False
    nan_if_hidden: bool = False

    @property
    def options(self) -> Options:
        return Options(self.scale, self.softcap, self.causal, self.nan_if_hidden)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.q, self.k, self.v, self.mask, self.sinks, *self.options)


def oracle(p: Problem) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far the kernel may be from it.

    An fp32 sum of D products is within D u Σ|q k| of its value, in any order; scale, softcap, mask
    and the subtraction of the largest score add few u of their operands, the exponential 4 u, the
    hyperbolic tangent 16 u.
    So weight j is off by a factor of 1 ± (δ_j + c): c has one u for each key summed up, 6 for each
    block of 64 whose largest score replaces an earlier one, and 2^-8 where weights are rounded to
    bf16 (2^-9 of a weight, and of the sum of weights). The quotient Σ w v / Σ w is off by
    Σ w (|v| + |o|) (δ + c), and its own rounding.
    """
    repeats, keys = p.q.shape[1] // p.k.shape[1], p.k.shape[2]
    q, k, v = (t.double() for t in (p.q, p.k, p.v))
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) * p.scale
    size = torch.einsum("bhsd,bhtd->bhst", q.abs(), k.abs()) * p.scale
    if p.softcap:
        scores = torch.tanh(scores / p.softcap) * p.softcap
    added = torch.zeros_like(scores)
    if p.causal:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(keys)
        added = added.masked_fill(columns > rows, -torch.inf)
    elif p.mask is not None and p.mask.dtype == torch.bool:
        added = added.masked_fill(~p.mask, -torch.inf)
    elif p.mask is not None:
        added = added + p.mask.double()
    total = scores + added
    if p.sinks is not None:  # a key more, of no value
        ends = p.sinks.double().expand(*total.shape[:-1], 1)
        none = torch.zeros_like(ends)
        total, scores = torch.cat([total, ends], -1), torch.cat([scores, none], -1)
        size, added = torch.cat([size, none], -1), torch.cat([added, ends], -1)
        v, keys = torch.cat([v, v.new_zeros(*v.shape[:2], 1, v.shape[3])], 2), keys + 1
    hidden = (total == -torch.inf).all(-1, keepdim=True)
    top = total.amax(-1, keepdim=True) if keys else total.sum(-1, keepdim=True)
    weights = (total - top.masked_fill(hidden, 0)).exp()
    divisor = weights.sum(-1, keepdim=True)
    weights = weights / divisor.masked_fill(hidden, 1)
    want = weights @ v
    moved = (total - top).masked_fill(weights == 0, 0).nan_to_num(0).abs()
    finite = added.masked_fill(weights == 0, 0)
    delta = (q.shape[3] + 4) * U * size + 4 * U * (scores.abs() + finite.abs() + moved)
    delta += 16 * U * scores.abs() * bool(p.softcap)
    blocks = keys // 64 + 4
    c = (keys + 6 * blocks + 8) * U + (2**-8 if p.q.dtype == torch.bfloat16 else 0)
    error = weights * (delta + c)
    bound = error @ v.abs() + error.sum(-1, keepdim=True) * want.abs()
    bound = 1.05 * bound + ROUNDING[p.q.dtype] * want.abs() + 1e-7 * float(p.q.dtype != DTYPES[0])
    if p.nan_if_hidden and p.k.shape[2]:
        want = want.masked_fill(hidden, torch.nan)
    return want, bound + 1e-30


def assert_right(p: Problem) -> None:
    got, (want, bound) = attention(*p.arguments), oracle(p)
    by_python = _impl(*p.arguments)
    assert got.equal(by_python) or got.isnan().any()
    assert got.stride() == by_python.stride() or not got.numel()
    assert got.shape == want.shape and got.dtype == p.q.dtype
    assert got.transpose(1, 2).is_contiguous()
    assert bool((got.isnan() == want.isnan()).all())
    error = (got.double() - want).abs().nan_to_num(0)
    assert bool((error <= bound).all()), f"off by {float((error - bound).max()):.3g}"


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(
    batch: int = 1,
    shared: int = 1,
    repeats: int = 4,
    rows: int = 1,
    keys: int = 100,
    width: int = 64,
    v_width: int = 64,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Problem:
    return Problem(
        random(1, batch, shared * repeats, rows, width, dtype=dtype),
        random(2, batch, shared, keys, width, dtype=dtype),
        random(3, batch, shared, keys, v_width, dtype=dtype),
        **options,
    )


@st.composite
def masks(draw: st.DrawFn, p: Problem) -> Tensor | None:
    """None, booleans or numbers, of 1 to 4 dimensions, each of which may be broadcast."""
    full = (*p.q.shape[:3], p.k.shape[2])
    shape = [n if draw(st.booleans()) else 1 for n in full[:3]] + [full[3]]
    shape = shape[draw(st.integers(0, 3)) :]
    kind = draw(st.sampled_from(["none", "bool", "number", "-inf", "least", "tail"]))
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < draw(
        st.sampled_from([0.0, 0.02, 0.5, 1.0])
    )
    if kind == "tail":
        seen = (torch.arange(full[3]) < draw(st.integers(0, full[3]))).expand(shape)
    dtype = draw(st.sampled_from([torch.float32, p.q.dtype]))
    numbers = random(5, *shape, dtype=dtype)
    if kind == "none":
        return None
    if kind in ("bool", "tail"):
        return seen
    lowest = -torch.inf if kind == "-inf" else torch.finfo(dtype).min
    return numbers if kind == "number" else torch.where(seen, numbers, lowest)


@st.composite
def sinks(draw: st.DrawFn, p: Problem) -> Tensor:
    """From below all scores to above them, of 1 to 4 dimensions, each of which may be broadcast."""
    shape = [n if draw(st.booleans()) else 1 for n in p.q.shape[:3]] + [1]
    numbers = random(6, *shape[draw(st.integers(0, 3)) :], dtype=p.q.dtype)
    return numbers * 10 - draw(st.sampled_from([0, 30, torch.inf]))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    p = make(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 8)),
        draw(st.integers(0, 200)),
        draw(st.sampled_from([0, 1, 7, 16, 33, 64, 80])),
        draw(st.sampled_from([1, 7, 16, 33, 64, 80])),
        draw(st.sampled_from(DTYPES)),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 50.0, 1e5])),
        causal=draw(st.booleans()),
        nan_if_hidden=draw(st.booleans()),
    )
    if draw(st.booleans()):
        p = replace(p, q=strided(p.q), k=strided(p.k), v=strided(p.v))
    if draw(st.booleans()):
        p = replace(p, sinks=draw(sinks(p)))
    return p if p.causal else replace(p, mask=draw(masks(p)))


def strided(t: Tensor) -> Tensor:
    """The same values in a cache [B, T, G, D] that is part of a larger one."""
    wide = torch.full((t.shape[0], t.shape[2] + 3, t.shape[1], t.shape[3] + 5), torch.nan)
    view = wide.to(t.dtype).transpose(1, 2)[:, :, 1 : 1 + t.shape[2], 2 : 2 + t.shape[3]]
    view.copy_(t)
    return view


@pytest.mark.parametrize("name", NAMES)
@given(p=problems(), threads=st.integers(1, 2))
def test_any_problem(name: str, p: Problem, threads: int) -> None:
    with path(name, threads):
        assert_right(p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 256), (8, 4, 64), (4, 8, 128)], ids=str)
@pytest.mark.parametrize("keys", [1, 64, 1000])
def test_shapes_of_models(dtype: torch.dtype, shape: tuple[int, int, int], keys: int) -> None:
    shared, repeats, width = shape
    p = make(1, shared, repeats, 1, keys, width, width, dtype, scale=width**-0.5)
    for name in NAMES:
        with path(name):
            assert_right(p)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", list(product((1, 2), (1, 6), (1, 3))), ids=str)
def test_a_mask_for_each_batch_head_or_row(name: str, shape: tuple[int, ...]) -> None:
    """Each sees a few keys of its own, which the others that share a part of the mask do not."""
    p = make(2, 2, 3, 3, 77)
    seen = random(4, *shape, 77) > 1.5
    for mask in (seen, torch.where(seen, random(5, *shape, 77), -torch.inf)):
        with path(name):
            assert_right(replace(p, mask=mask))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("softcap", [0.1, 1.0, 30.0, 1e4, 1e6, -1e4])
def test_a_softcap_of_any_size(name: str, softcap: float) -> None:
    """Scores of 0 to 60: from far below the cap, where tanh is its argument, to far above."""
    p = make(1, 2, 1, 1, 400, softcap=softcap, scale=1.0)
    growing = torch.linspace(1e-4, 3, 400)[:, None]
    with path(name):
        assert_right(replace(p, k=p.k * growing))


def test_plain_attention_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where the kernel cannot be built, for instance from a cached graph."""
    monkeypatch.setattr(native_library, "refusal", lambda: "no compiler")
    seen = torch.rand(2, 8, 3, 100) < 0.5
    seen[0, 0, 0] = False
    for softcap, nan_if_hidden in ((0.0, False), (0.0, True), (5.0, False), (5.0, True)):
        options = {"softcap": softcap, "nan_if_hidden": nan_if_hidden}
        for mask in (None, seen, random(6, 3, 100)):
            assert_right(make(2, 2, 4, 3, mask=mask, **options))
        assert_right(make(2, 2, 4, 3, causal=True, **options))
        assert_right(make(2, 2, 4, 3, mask=seen, sinks=random(8, 8, 1, 1), **options))


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_see_nothing(name: str) -> None:
    """As eager: zeros by the composite function, NaN by softmax; the least number is no -inf."""
    for keys, dtype in ((0, torch.float32), (5, torch.float32), (300, torch.bfloat16)):
        for mask in (torch.zeros(keys, dtype=torch.bool), torch.full((keys,), -torch.inf)):
            for nan_if_hidden in (False, True):
                p = make(keys=keys, dtype=dtype, mask=mask, nan_if_hidden=nan_if_hidden)
                with path(name, 2):
                    got = attention(*p.arguments)
                expected = torch.nan if nan_if_hidden and keys else 0.0
                torch.testing.assert_close(got, torch.full_like(got, expected), equal_nan=True)
    p = make(keys=300, mask=torch.full((300,), torch.finfo(torch.float32).min))
    with path(name, 2):
        got = attention(*p.arguments)
    torch.testing.assert_close(got, p.v.mean(2, keepdim=True).expand_as(got))


@pytest.mark.parametrize("name", NAMES)
def test_sinks_are_those_of_the_head(name: str) -> None:
    """Of one that shares its keys; where nothing is seen, the sink alone is the sum of weights."""
    for keys in (40, 1001):  # no whole number for each chunk
        p = make(2, 3, 4, 2, keys, sinks=3 * random(6, 12, 1, 1))
        for sinks in (p.sinks, 3 * random(7, 2, 12, 2, 1)):
            with path(name, 2):
                assert_right(replace(p, sinks=sinks))
    hidden = make(mask=torch.zeros(100, dtype=torch.bool), nan_if_hidden=True)
    with path(name):
        got = attention(*replace(hidden, sinks=torch.full((1,), -100.0)).arguments)
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_so_as_in_eager(name: str, dtype: torch.dtype, bad: float) -> None:
    places = (("k", 0), ("k", 70), ("k", 98), ("v", 0), ("v", 70), ("v", 98), ("q", 0), ("mask", 0))
    for tensor, at in places:
        mask = torch.zeros(1, 1, 1, 99) if tensor == "mask" else None
        p = make(dtype=dtype, keys=99, rows=2, mask=mask)
        getattr(p, tensor)[0, 0, min(at, getattr(p, tensor).shape[2] - 1), 3] = bad
        want = plain_attention(*(t.float() for t in (p.q, p.k, p.v)), p.mask, p.sinks, p.options)
        with path(name):
            got = attention(*p.arguments)
        assert bool((got.isnan() == want.isnan()).all()), (tensor, at)
        infinite = want.isinf()
        assert bool((got[infinite] == want[infinite].to(dtype)).all()), (tensor, at)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lowest", [None, -torch.inf, torch.finfo(torch.float32).min])
def test_hidden_keys_are_not_read(name: str, lowest: float | None) -> None:
    """NaN there has no effect: neither in the tail of a cache, nor among keys that are seen."""
    p = make(2, 2, 3, 2, keys=300, width=40, v_width=40)
    for seen in (torch.arange(300) < 50, torch.arange(300) % 7 == 3, torch.rand(300) < 0.5):
        for t in (p.k, p.v):
            t[:, :, ~seen] = torch.nan
        mask = seen if lowest is None else torch.where(seen, 0.0, lowest)
        with path(name, 2):
            got = attention(*replace(p, mask=mask).arguments)
            want = attention(*replace(p, k=p.k[:, :, seen], v=p.v[:, :, seen]).arguments)
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)
        p = make(2, 2, 3, 2, keys=300, width=40, v_width=40)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [at_end_of_page, at_start_of_page], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beyond_the_tensors_is_touched(
    name: str, side: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repeats, rows, keys, width, v_width in (
        (1, 1, 1, 1, 1),
        (3, 2, 65, 7, 33),
        (4, 1, 129, 80, 20),
        (2, 8, 8, 64, 64),
    ):
        p = make(2, 2, repeats, rows, keys, width, v_width, dtype)
        p = replace(p, q=side(p.q), k=side(p.k), v=side(p.v))
        for mask in (None, side(torch.rand(keys) < 0.5), side(random(7, 2, 1, rows, keys))):
            with path(name, 2), monkeypatch.context() as patch:
                patch.setattr(
                    Tensor, "new_empty", lambda self, shape: side(torch.empty(shape, dtype=dtype))
                )
                assert_right(replace(p, mask=mask))


def test_a_call_leaves_nothing_to_the_next() -> None:
    """NaN of more keys stays in the memory for scores."""
    for name in NAMES:
        for rows in (1, 2, 3, 8):
            p = make(repeats=1, rows=rows)
            with path(name):
                attention(*replace(p, k=p.k * torch.nan).arguments)
                assert_right(make(repeats=1, rows=rows, keys=5))


def test_a_count_of_threads_gives_the_same_bits_again() -> None:
    p = make(1, 2, 4, 1, 3000, 64, 64, torch.bfloat16)
    for threads in (1, 2, 3):
        with path(NAMES[0], threads):
            first = attention(*p.arguments)
            assert all(attention(*p.arguments).equal(first) for _ in range(20))
            assert_right(p)


def test_a_forked_child_attends_alone() -> None:
    """In a child of a process that has used them, PyTorch's threads are waited for forever."""
    p = make(1, 2, 4, 1, 1000)
    with path(NAMES[0], 2):
        assert_right(p)
        got = in_child(lambda: attention(*p.arguments).tolist())
    want, bound = oracle(p)
    assert bool(((torch.tensor(got).double() - want).abs() <= bound).all())


def test_operator_keeps_its_contract() -> None:
    seen = torch.rand(1, 1, 2, 100) < 0.5
    for p in (make(rows=2), make(rows=2, mask=seen), make(2, 2, 2, 8, causal=True)):
        torch.library.opcheck(attention, p.arguments)


REFUSED = [
    ({"q": random(1, 4, 64)}, "takes \\[batch, heads, rows, width\\]"),
    ({"k": random(1, 1, 1, 100, 32)}, "must be the same"),
    ({"v": random(1, 1, 1, 99, 64)}, "must be the same"),
    ({"k": random(1, 1, 3, 100, 64), "v": random(1, 1, 3, 100, 64)}, "a multiple of"),
    ({"k": random(1, 1, 1, 100, 64).double()}, "the same for all"),
    (dict.fromkeys("kv", torch.ones(1, 1, 1, 64).expand(1, 1, 2**31, 64)), "at most 2147483647"),
    ({"mask": torch.zeros(7)}, "that broadcasts to"),
    ({"mask": torch.zeros(100), "causal": True}, "or causal"),
    ({"mask": torch.zeros(100, dtype=torch.int32)}, "mask is torch.int32; .* bool"),
    ({"sinks": torch.zeros(4, 1, 1, dtype=torch.bool)}, "sinks is torch.bool"),
    ({"sinks": torch.zeros(4)}, "sinks has the shape \\(4,\\)"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_does_not_fit_is_refused(change: dict[str, Any], text: str) -> None:
    """The sizes go to C++, which believes them; fakes refuse the same."""
    p = replace(make(), **change)
    with pytest.raises(RuntimeError, match=text):
        attention(*p.arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in p.arguments]
        with pytest.raises(RuntimeError, match=text):
            attention(*fakes)
