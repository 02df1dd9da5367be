"""The operator's implementation in C++: usual calls give what Python gives, which has the rest."""

import multiprocessing
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.kernels import op
from fqcompile.kernels.cpu import stream
from fqcompile.native.interface import DTYPES
from tests.kernels.cpu.test_stream import FEATURES, of_every_form, packed
from tests.kernels.cpu.test_stream_experts import stack_of
from tests.native.paths import NAMES, path
from tests.strategies import make_problem

if not NAMES:
    pytest.skip("this processor has none of the kernel's paths", allow_module_level=True)

BF16 = torch.bfloat16
usual = of_every_form(
    FEATURES
    | {
        "leading": st.sampled_from([(), (1,), (3,), (1, 1), (2, 1, 5)]),
        "n": st.sampled_from([1, 64, 70]),
        "k": st.sampled_from([1, 40, 72, 256]),
        "group_size": st.sampled_from([5, 32, 4096]),
    }
)


def call(**options: Any) -> list[Any]:
    """The operator's arguments for one matrix."""
    p = make_problem(**options)
    weight = packed(p)
    return [p.x, *weight.tensors, *p.arguments[3:], "x86_stream", None, None, False]


def routed(by: str, tell: list[int], **options: Any) -> list[Any]:
    """The same for two experts and three rows."""
    problems, (qweight, scale, bias, *form) = stack_of(2, options, rows=3)
    told = {"offsets": None, "ids": None} | {by: torch.tensor(tell)}
    return [problems[0].x, qweight, scale, bias, None, *form, *told.values(), False]


@pytest.fixture
def no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("Python was called")

    monkeypatch.setattr(op, "run_matmul", refuse)


@given(name=st.sampled_from(NAMES), threads=st.sampled_from([1, 2]), options=usual)
def test_it_gives_what_python_gives(name: str, threads: int, options: dict[str, Any]) -> None:
    arguments = call(**options)
    with path(name, threads):
        got = op.matmul_inference(*arguments)
        stream.serve(None)
        want = op._matmul_impl(*arguments)
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))  # NaN equals NaN


@given(
    name=st.sampled_from(NAMES), options=usual, dtype=st.sampled_from(tuple(DTYPES)),
    ids=st.lists(st.integers(0, 999), max_size=3), wide=st.booleans(),
)  # fmt: skip
def test_rows_are_what_python_reads(
    name: str, options: dict[str, Any], dtype: torch.dtype, ids: list[int], wide: bool
) -> None:
    _, qweight, scale, _, _, *form = call(**{**options, "gated": False})
    some = [*(i % form[3] for i in ids), form[3] // 2]
    asked = torch.tensor([some], dtype=torch.int64 if wide else torch.int32)
    arguments = (qweight, scale, asked, *form[:5], dtype, "x86_stream")
    with path(name):
        got = op.rows(*arguments)
        stream.serve(None)
        want = op._rows_impl(*arguments)
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


STRIDED = torch.randn(3, 300, dtype=BF16)[:, 7:79]
USUAL: dict[str, Callable[[], list[Any]]] = {
    "one row": lambda: call(leading=(1, 1), k=72, dtype=BF16, bias=True, residual=True),
    "no leading dimension": lambda: call(leading=(), k=72),
    "rows apart": lambda: [STRIDED, *call(k=72, dtype=BF16)[1:]],
    "one row for all": lambda: [STRIDED[:1].expand(3, 72), *call(k=72, dtype=BF16)[1:]],
    "gated": lambda: call(gated=True, activation="swiglu_oai", bits=8, dtype=torch.float16),
    "offsets": lambda: routed("offsets", [1, 3], bias=True, levels="normal"),
    "ids": lambda: routed("ids", [1, -2, 1], bias=True),
}


@pytest.mark.usefixtures("no_python")
@pytest.mark.parametrize("operator", [op.matmul, op.matmul_inference], ids=str)
@pytest.mark.parametrize("name", USUAL)
def test_usual_calls_need_no_python(name: str, operator: Any) -> None:
    with path(NAMES[0]):
        operator(*USUAL[name]())


@pytest.mark.parametrize("name", ["one row", "ids"])
def test_it_is_the_operator_that_was_promised(name: str) -> None:
    with path(NAMES[0]):
        torch.library.opcheck(op.matmul_inference, tuple(USUAL[name]()))


UNUSUAL: dict[str, Callable[[], list[Any]]] = {
    "columns apart": lambda: call(strided=True),
    "rows apart in three dimensions": lambda: [
        torch.randn(2, 6, 40)[:, :3], *call(leading=(2, 3))[1:],
    ],
    "no rows": lambda: call(leading=(0,)),
    "a strided residual": lambda: [
        value if place != 4 else torch.randn(3, 10)[:, ::2]
        for place, value in enumerate(call(residual=True))
    ],
    "strided codes": lambda: [
        value if place != 1 else torch.stack((value, value), -1)[..., 0]
        for place, value in enumerate(call())
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_calls_are_right_too(name: str) -> None:
    arguments = UNUSUAL[name]()
    contiguous = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    with path(NAMES[0]):
        assert torch.equal(op.matmul_inference(*arguments), op.matmul_inference(*contiguous))


@pytest.mark.parametrize(
    ("by", "tell", "text"),
    [
        ("ids", [0, 2, 0], "2 experts"),
        ("ids", [0, -3, 0], "2 experts"),
        ("offsets", [2, 1], "offsets"),
        ("offsets", [2, 4], "offsets"),
    ],
)
def test_a_routing_that_names_nothing_is_told_by_python(
    by: str, tell: list[int], text: str
) -> None:
    with path(NAMES[0]), pytest.raises(IndexError, match=text):
        op.matmul_inference(*routed(by, tell))


X, QWEIGHT, SCALE, BIAS, RESIDUAL, OFFSETS, IDS = 0, 1, 2, 3, 4, 13, 14
ONE = partial(call, n=70, k=72, group_size=32, bias=True, residual=True)
MISFITS: dict[str, tuple[Callable[[], list[Any]], int, Callable[[Tensor], Tensor], str]] = {
    "K": (ONE, X, lambda x: x[:, :-1], "x has 71 columns"),
    "codes": (ONE, QWEIGHT, lambda w: w[:1], "qweight and scale have the shapes"),
    "scales": (ONE, SCALE, lambda s: s[:, :1], "qweight and scale have the shapes"),
    "width of the bias": (ONE, BIAS, lambda b: b[:64], "bias has the shape"),
    "dtype of the bias": (ONE, BIAS, lambda b: b.half(), "bias has the shape"),
    "rows of the residual": (ONE, RESIDUAL, lambda r: r[:1], "residual has the shape"),
    "dtype of the residual": (ONE, RESIDUAL, lambda r: r.half(), "residual has the shape"),
    "number of ids": (lambda: routed("ids", [0, 1, 0]), IDS, lambda i: i[:1], "1 ids for 3 rows"),
    "number of offsets": (
        lambda: routed("offsets", [1, 3]), OFFSETS, lambda i: i[1:], "1 offsets for 2 experts",
    ),
    "dtype of ids": (lambda: routed("ids", [0, 1, 0]), IDS, lambda i: i.short(), "is torch.int16"),
    "biases of experts": (
        lambda: routed("ids", [0, 1, 0], bias=True), BIAS, lambda b: b[:1], "bias has the shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_told_by_python(name: str) -> None:
    """C++ believes the shapes that it does not look at, and would read what lies behind."""
    make, place, change, text = MISFITS[name]
    arguments = make()
    arguments[place] = change(arguments[place]).contiguous()
    with path(NAMES[0]), pytest.raises(RuntimeError, match=text):
        op.matmul_inference(*arguments)


def test_gradients_and_autocast_pass_above_it() -> None:
    arguments = call(k=72, dtype=torch.float32)
    x = arguments[0].requires_grad_()
    with path(NAMES[0]):
        op.matmul(*arguments).sum().backward()
        with torch.autocast("cpu", BF16), torch.no_grad():
            assert op.matmul_inference(*arguments).dtype == BF16
    w = op.dequantize(*arguments[1:3], *arguments[5:8], 5, 72, torch.float32, "x86_stream")
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, 72))


def test_it_makes_what_inference_mode_makes() -> None:
    arguments = call()
    with path(NAMES[0]):
        for mode in (torch.inference_mode, torch.no_grad, nullcontext):
            with mode():
                y = op.matmul_inference(*arguments)
            assert y.is_inference() == (mode is torch.inference_mode)


@pytest.mark.usefixtures("no_python")
def test_a_forked_child_uses_one_thread() -> None:
    """libgomp's threads are not in the child; waiting for them would never end."""
    arguments = call(leading=(3,), n=640, k=256)
    with path(NAMES[0], threads=2):
        want = op.matmul_inference(*arguments)
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(
            target=lambda: queue.put(op.matmul_inference(*arguments).tolist()), daemon=True
        )
        child.start()
        child.join(60)
        alive = child.is_alive()
        child.kill()
    assert not alive, "the child hangs"
    assert queue.get() == want.tolist()
