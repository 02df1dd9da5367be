"""The language of kernels works in the interpreter, and Triton is as it was afterwards."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.triton.interpreter import interpreted


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _sigmoid(x):
    return tl.sigmoid(x)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _exponential(x):
    return tl.exp(x)


@triton.jit(do_not_specialize=["N"])
def _activate_kernel(
    x_ptr, bias_ptr, y_ptr, N, ACTIVATION: tl.constexpr, HOW: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    offs = tl.multiple_of(pid * BLOCK, BLOCK) + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs, mask=offs < N, other=0.0)
    if HOW == "once":
        y = ACTIVATION(y)
    else:
        tl.static_assert(HOW == "twice")
        for _ in tl.static_range(2):
            y = ACTIVATION(y)
    tl.store(y_ptr + offs, y, mask=offs < N)


@triton.jit
def _shuffle_kernel(x_ptr, y_ptr, N: tl.constexpr):
    """Takes [N, 2, 4] apart and together again: columns reversed, then all transposed."""
    x = tl.load(x_ptr + tl.arange(0, 8 * N))
    x = tl.permute(tl.reshape(x, (N, 2, 4)), (0, 2, 1))
    even, odd = tl.split(x)
    y = tl.trans(tl.reshape(tl.join(odd, even), (N, 8)))
    y += tl.broadcast_to(tl.arange(0, 8)[:, None], (8, N))
    tl.store(y_ptr + tl.arange(0, 8)[:, None] * N + tl.arange(0, N)[None, :], y)


@triton.jit
def _count_kernel(x_ptr, total_ptr, count_ptr, K, scale, negate, BLOCK: tl.constexpr):
    start = tl.program_id(0) * tl.cdiv(K, tl.num_programs(0))
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.range(0, tl.cdiv(K, tl.num_programs(0)), BLOCK, num_stages=3):
        offs = start + k + tl.arange(0, BLOCK)
        acc += tl.load(x_ptr + offs, mask=offs < K, other=0.0)
        tl.atomic_add(count_ptr, 1)
    if negate:
        acc = -acc
    tl.atomic_add(total_ptr + tl.arange(0, BLOCK), acc * scale)


@triton.jit
def _promise_kernel(x_ptr, N):
    tl.store(x_ptr + tl.multiple_of(N, 16), 1.0)


@triton.jit
def _scale_kernel(x_ptr, y_ptr, scale, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) * scale)


@triton.jit
def _unsaid_lanes_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N))


@pytest.mark.parametrize("how", ["once", "twice"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "want"),
    [
        (_relu, torch.relu),
        (_sigmoid, torch.sigmoid),
        (_gelu, torch.nn.functional.gelu),
        (_exponential, torch.exp),
    ],
)
def test_a_function_is_a_constant_argument(
    activation: Any, want: Any, bias: bool, how: str
) -> None:
    x, b = torch.randn(40), torch.randn(40) if bias else None
    with interpreted() as memory:
        y = torch.empty(40)
        _activate_kernel[(3,)](x, b, y, 40, activation, HOW=how, BLOCK=16, num_warps=4)
        assert memory.unwritten(y) == 0
    expected = want(x if b is None else x + b)
    torch.testing.assert_close(y, expected if how == "once" else want(expected))


def test_tensors_change_their_shape() -> None:
    x = torch.arange(32, dtype=torch.int32)
    y = torch.empty(8, 4, dtype=torch.int32)
    with interpreted():
        _shuffle_kernel[(1,)](x, y, 4)
    pairs = x.reshape(4, 2, 4).transpose(1, 2).flip(2).reshape(4, 8)
    assert torch.equal(y, pairs.T + torch.arange(8)[:, None])


@pytest.mark.parametrize("negate", [False, True])
def test_loops_and_atomics_add_up(negate: bool) -> None:
    x = torch.arange(100.0)
    total, count = torch.zeros(16), torch.zeros(1, dtype=torch.int32)
    with interpreted():
        _count_kernel[lambda _: (2,)](x, total, count, 100, 0.5, negate, BLOCK=16)
    # Each half has 50 numbers and reads up to 64: the first one reads into the second.
    both = x[:64].sum() + x[50:].sum()
    assert total.sum() == (-0.5 if negate else 0.5) * both
    assert count.item() == 8


def test_a_float_argument_is_fp32_as_in_a_compiled_kernel() -> None:
    x, y = torch.tensor([3.0]).bfloat16(), torch.empty(1)
    with interpreted():
        _scale_kernel[(1,)](x, y, 0.1, BLOCK=1)
    assert y == torch.tensor(3.0) * torch.tensor(0.1)


def test_a_promise_that_is_not_kept_raises() -> None:
    with interpreted():
        _promise_kernel[(1,)](torch.zeros(33), 32)
        with pytest.raises(AssertionError, match=r"multiple_of\(8, 16\)"):
            _promise_kernel[(1,)](torch.zeros(33), 8)


def test_an_error_names_the_program() -> None:
    with interpreted(), pytest.raises(IndexError) as error:
        _activate_kernel[(3,)](torch.zeros(32), None, torch.zeros(32), 40, _relu, "once", 16)
    assert error.value.__notes__ == ["in program (2, 0, 0) of _activate_kernel"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_uninitialized_is_nan(dtype: torch.dtype) -> None:
    with interpreted():
        x = torch.ones(8, dtype=dtype)
        for new in (torch.empty(8, dtype=dtype), x.new_empty(8), torch.empty_like(x)):
            assert new.isnan().all()
        assert torch.empty(8, dtype=torch.int32).eq(2**31 - 1).all()
        y = torch.zeros(8, dtype=dtype)
        _unsaid_lanes_kernel[(1,)](x, y, 5, BLOCK=8)
        assert y[:5].eq(1).all() and y[5:].isnan().all()
        integers = torch.zeros(8, dtype=torch.int32)
        _unsaid_lanes_kernel[(1,)](integers, y, 5, BLOCK=8)
        assert y.tolist() == [0] * 5 + [-1] * 3
    assert not torch.are_deterministic_algorithms_enabled()


def compile_for_sm_90(activation: Any) -> bytes:
    """From the source: the compiler's cache would hide a change."""
    constants = {"ACTIVATION": activation, "HOW": "once", "BLOCK": 128}
    types = {"x_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32"}
    source = ASTSource(
        fn=_activate_kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_compiling_is_unharmed_before_between_and_after() -> None:
    names = set(globals())
    before = compile_for_sm_90(_gelu)
    with interpreted():
        _activate_kernel[(1,)](torch.ones(4), None, torch.ones(4), 4, _gelu, "once", 4)
        between = compile_for_sm_90(_gelu)
        with pytest.raises(IndexError):
            _activate_kernel[(1,)](torch.ones(4), None, torch.ones(2), 4, _gelu, "once", 4)
    assert compile_for_sm_90(_gelu) == between == before
    assert compile_for_sm_90(_relu) != before
    assert set(globals()) == names


def test_triton_is_as_before_afterwards() -> None:
    run, call, load = triton.JITFunction.run, triton.JITFunction.__call__, tl.load
    with interpreted():
        assert triton.JITFunction.run is not run
        _activate_kernel[(1,)](torch.ones(4), None, torch.ones(4), 4, _gelu, "once", 4)
        assert tl.load is load
    assert triton.JITFunction.run is run
    assert triton.JITFunction.__call__ is call
    with pytest.raises(RuntimeError, match="0 active drivers"):
        _activate_kernel[(1,)](torch.ones(4), None, torch.ones(4), 4, _gelu, "once", 4)
