"""The operators of experts against float64 composed expert by expert, by every CPU template."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fqcompile.kernels.epilogue import ACTIVATIONS
from fqcompile.kernels.registry import TEMPLATES
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor
from tests.kernels.test_op import exact_activation, exact_up, oracle, unpacked
from tests.strategies import Problem, make_problem, matmul, opcheck_matmul


def grouped(
    x: Tensor, qweight: Tensor, scale: Tensor, offsets: Tensor, bias: Tensor | None, *rest: Any
) -> Tensor:
    """The operator with offsets; `rest` may end with zero_rest."""
    form, zero_rest = rest[:8], rest[8:]
    return matmul(x, qweight, scale, bias, None, *form, offsets, None, *zero_rest)


def gathered(
    x: Tensor, qweight: Tensor, scale: Tensor, ids: Tensor, bias: Tensor | None, *form: Any
) -> Tensor:
    """The operator with ids."""
    return matmul(x, qweight, scale, bias, None, *form, None, ids)


@dataclass(frozen=True)
class Experts:
    """One call: problems of the experts, all of one format, and each row's expert in `of_row`."""

    problems: list[Problem]
    x: Tensor
    of_row: Tensor
    beyond: int = 0  # grouped rows that belong to no expert
    routing_dtype: torch.dtype = torch.int32

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Without the routing, which is the fourth."""
        first = self.problems[0]
        qweights, scales = zip(*((p.qweight, p.scale) for p in self.problems), strict=True)
        biased = first.bias is not None
        bias = torch.stack([p.bias for p in self.problems]) if biased else None
        matrix = (first.bits, first.levels, first.group_size, first.n, first.k)
        form = (*matrix, first.activation, first.gated)
        return (torch.stack(qweights), torch.stack(scales), bias, *form)

    def run(self, op: Any, x: Tensor | None = None, kernel: str = "dequantize") -> Tensor:
        qweight, scale, *rest = self.arguments
        x = self.x if x is None else x
        return op(x, qweight, scale, self.routing(op), *rest, kernel)

    def routing(self, op: Any) -> Tensor:
        if op is gathered:
            return self.of_row.to(self.routing_dtype)
        counts = torch.bincount(self.of_row, minlength=len(self.problems))
        return counts.cumsum(0).to(self.routing_dtype)


def make_experts(
    of_row: list[int], experts: int, *, seed: int = 0, beyond: int = 0, **form: Any
) -> Experts:
    problems = [
        make_problem(leading=(0,), residual=False, seed=seed + e, **form) for e in range(experts)
    ]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(of_row) + beyond, problems[0].k, generator=generator)
    return Experts(problems, x.to(problems[0].x.dtype), torch.tensor(of_row).long(), beyond)


def assert_matches_oracle(call: Experts, op: Any, kernel: str = "dequantize") -> None:
    y = call.run(op, kernel=kernel)
    assert (y.dtype, y.shape) == (call.x.dtype, (len(call.x), call.problems[0].n))
    for expert, problem in enumerate(call.problems):
        rows = (call.of_row == expert).nonzero().flatten()
        want, bound = oracle(replace(problem, x=call.x[rows]))
        error = (y[rows].double() - want).abs()
        assert bool((error <= bound).all()), f"expert {expert}: {error.max():.3g} off"


@st.composite
def expert_calls(draw: st.DrawFn, *, in_order: bool) -> Experts:
    """No tokens, one, fewer than experts, all to one expert, skewed; any format."""
    experts = draw(st.integers(1, 7), label="experts")
    skew = draw(st.sampled_from(["even", "one", "low"]), label="skew")
    most = {"even": experts - 1, "one": 0, "low": min(1, experts - 1)}[skew]
    of_row = draw(st.lists(st.integers(0, most), max_size=12), label="expert of each row")
    if skew == "one":
        of_row = [experts - 1] * len(of_row)
    k = draw(st.sampled_from([1, 3, 33, 64]), label="k")
    bits = draw(st.sampled_from([4, 8]), label="bits")
    call = make_experts(
        sorted(of_row) if in_order else of_row,
        experts,
        seed=draw(st.integers(0, 99), label="seed"),
        beyond=draw(st.integers(0, 3), label="beyond") if in_order else 0,
        n=draw(st.integers(1, 6), label="n"),
        k=k,
        bits=bits,
        levels=draw(st.sampled_from(["uniform", "normal"][: 8 // bits]), label="levels"),
        group_size=draw(st.sampled_from([1, 16, 32, k]), label="group_size"),
        activation=draw(st.sampled_from(list(ACTIVATIONS)), label="activation"),
        gated=draw(st.booleans(), label="gated"),
        bias=draw(st.booleans(), label="bias"),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype"),
    )
    dtype = draw(st.sampled_from([torch.int32, torch.int64]), label="routing dtype")
    return replace(call, routing_dtype=dtype)


@given(expert_calls(in_order=True))
def test_grouped_is_the_oracle(call: Experts) -> None:
    assert_matches_oracle(call, grouped)


@given(expert_calls(in_order=False))
def test_gathered_is_the_oracle(call: Experts) -> None:
    assert_matches_oracle(call, gathered)


def test_negative_ids_count_from_the_last_expert() -> None:
    call = make_experts([2, 0, 1], 3)
    other = replace(call, of_row=torch.tensor([-1, -3, 1]))
    assert torch.equal(call.run(gathered), other.run(gathered))


@pytest.mark.parametrize("strided", ["x", "bias"])
def test_strided_inputs(strided: str) -> None:
    call = make_experts([0, 1, 1], 2, bias=True)
    want = call.run(gathered)
    qweight, scale, bias, *rest = call.arguments
    x = call.x.repeat_interleave(2, 1)[:, ::2] if strided == "x" else call.x
    bias = bias.mT.contiguous().mT if strided == "bias" else bias
    ids = call.routing(gathered)
    got = gathered(x, qweight, scale, ids, bias, *rest, "dequantize")
    assert torch.equal(got, want)


def test_rows_of_no_expert_are_neither_read_nor_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the result's memory beyond the last offset stays there."""
    call = make_experts([0, 0, 2], 3, beyond=5)
    x = call.x.clone()
    x[3:] = torch.nan

    def filled(self: Tensor, *size: Any, **kwargs: Any) -> Tensor:
        return self.new_full(size if isinstance(size[0], int) else size[0], 42.0)

    monkeypatch.setattr(Tensor, "new_empty", filled)
    y = call.run(grouped, x)
    assert bool(y[:3].isfinite().all())
    assert bool((y[3:] == 42).all())


@pytest.mark.parametrize("kernel", ["dequantize", "x86_stream"])
@pytest.mark.parametrize("of_row", [[0, 0, 2], []], ids=["some", "none"])
def test_rows_of_no_expert_are_zeros_where_that_is_asked_for(
    of_row: list[int], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind an activation, and with biases, which these rows do not get."""
    for form in ({}, {"bias": True}, {"gated": True, "activation": "swiglu_oai"}):
        call = make_experts(of_row, 3, beyond=5, **form)
        x, (qweight, scale, *rest) = call.x.clone(), call.arguments
        x[len(of_row) :] = torch.nan
        bits, levels, group_size, k = *rest[1:4], call.problems[0].k
        each = [
            QuantizedTensor(*pair, Format(bits, group_size, pair[0].shape[0], k, levels=levels))
            for pair in zip(qweight, scale, strict=True)
        ]
        pairs = [TEMPLATES[kernel].layout.pack(weight).tensors for weight in each]
        packed = [torch.stack(tensors) for tensors in zip(*pairs, strict=True)]
        ends = call.routing(grouped)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", lambda t, *s, **k: t.new_full(s, 42.0, **k))
            y = grouped(x, *packed, ends, *rest, kernel, True)
        assert not y[len(of_row) :].any()
        want = call.run(grouped)[: len(of_row)]
        torch.testing.assert_close(y[: len(of_row)], want, rtol=0, atol=40 * 2.0**-23)


def test_gradients_where_rows_of_no_expert_are_zeros() -> None:
    call = make_experts([0, 2], 3, beyond=2, bias=True, activation="silu")
    qweight, scale, bias, *rest = call.arguments
    ends, gradients = call.routing(grouped), []
    for zero_rest in (False, True):
        x, b = call.x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = grouped(x, qweight, scale, ends, b, *rest, "dequantize", zero_rest)
        y[:2].sum().backward()
        gradients.append((x.grad, b.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_experts_without_rows_are_not_read() -> None:
    """Their codes and scales may as well be missing."""
    call = make_experts([1, 1, 3], 4)
    want = call.run(gathered)
    qweight, scale, *rest = call.arguments
    scale[0], scale[2] = torch.nan, torch.nan
    for op in (gathered, grouped):
        got = op(call.x, qweight, scale, call.routing(op), *rest, "dequantize")
        assert torch.equal(got, want)


def test_ids_of_no_expert_are_refused_on_a_cpu() -> None:
    call = replace(make_experts([0, 1], 2), of_row=torch.tensor([0, 2]))
    with pytest.raises(IndexError, match=r"ids\[1\] is 2; the weight has 2 experts"):
        call.run(gathered)


@pytest.mark.parametrize("op", [grouped, gathered])
def test_autocast_casts_no_routed_rows(op: Any) -> None:
    """Nor what the kernel multiplies inside: grouped matmuls have no autocast rule."""
    call = make_experts([0, 1, 1], 3, bias=True)
    want = call.run(op)
    with torch.autocast("cpu", torch.bfloat16):
        got = call.run(op)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


SAMPLES = {
    "plain": make_experts([0, 1, 1], 3),
    "everything": make_experts([0, 1, 1], 3, gated=True, activation="swiglu_oai", bias=True),
    "no rows": make_experts([], 3, activation="relu", bias=True),
    "bf16": make_experts([0, 2], 3, dtype=torch.bfloat16, activation="gelu"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("op", [grouped, gathered], ids=["grouped", "gathered"])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str, op: Any) -> None:
    call = SAMPLES[name]
    qweight, scale, bias, *rest = call.arguments
    told = call.routing(op)
    routing = (told,) if op is grouped else (None, told)
    arguments = (call.x, qweight, scale, bias, None, *rest, "dequantize", *routing)
    opcheck_matmul(*arguments)
    if op is grouped:
        opcheck_matmul(*arguments, None, True)
    if call.x.dtype == torch.float32:
        x = call.x.clone().requires_grad_()
        bias = None if bias is None else bias.clone().requires_grad_()
        opcheck_matmul(x, *arguments[1:3], bias, *arguments[4:])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", [grouped, gathered], ids=["grouped", "gathered"])
def test_backward_is_that_of_the_composition(op: Any, activation: str, gated: bool) -> None:
    call = make_experts(
        [0, 1, 1, 3], 4, beyond=2, n=6, k=37, activation=activation, gated=gated, bias=True
    )
    if op is gathered:
        call = replace(call, x=call.x[:4], of_row=torch.tensor([3, 1, 0, 1]))
    qweight, scale, bias, *rest = call.arguments
    x, bias = call.x.clone().requires_grad_(), bias.clone().requires_grad_()
    probe = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    y = op(x, qweight, scale, call.routing(op), bias, *rest, "dequantize")
    (y[:4] * probe).sum().backward()

    exact_x, exact_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    w = torch.stack([unpacked(p.qweight, p.scale, p.bits, p.levels, 32, 37) for p in call.problems])
    z = torch.einsum("mk,mnk->mn", exact_x[:4], w[call.of_row]) + exact_bias[call.of_row]
    gate, up = z.chunk(2, -1) if gated else (z, torch.ones(()))
    want = exact_activation(activation, gate) * (exact_up(activation, up) if gated else 1)
    (want * probe).sum().backward()
    # As for the dense operator: sums of at most 40 terms of about unit size, twice.
    for name, got, exact in (("x", x.grad, exact_x.grad), ("bias", bias.grad, exact_bias.grad)):
        assert float((got.double() - exact).abs().max()) <= 2**-11, name
    assert not x.grad[4:].any(), "rows of no expert have no gradient"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("op", [grouped, gathered], ids=["grouped", "gathered"])
def test_second_derivative_is_that_of_the_composition(op: Any) -> None:
    """Where an operator has no derivative PyTorch warns that values may be wrong silently."""
    call = make_experts([0, 1, 1, 3], 4, beyond=2, n=6, k=37)
    if op is gathered:
        call = replace(call, x=call.x[:4], of_row=torch.tensor([3, 1, 0, 1]))
    x, exact_x = call.x.clone().requires_grad_(), call.x.double().requires_grad_()
    w = torch.stack([unpacked(p.qweight, p.scale, p.bits, p.levels, 32, 37) for p in call.problems])
    exact = torch.einsum("mk,mnk->mn", exact_x[:4], w[call.of_row])
    second = []
    for value, y in ((x, call.run(op, x)), (exact_x, exact)):
        (dx,) = torch.autograd.grad(y[:4].pow(3).sum(), value, create_graph=True)
        second.append(torch.autograd.grad(dx.pow(2).sum(), value)[0].double())
    got, want = second
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())
    assert not got[4:].any(), "rows of no expert have no gradient"


def test_compiled_ops_are_one_graph_for_every_number_of_rows() -> None:
    call = make_experts([0, 1, 1, 0, 1, 0], 2, bias=True)
    qweight, scale, *rest = call.arguments
    graphs: list[object] = []

    def backend(module: torch.fx.GraphModule, inputs: list[object]) -> object:
        graphs.append(module)
        return module.forward

    def run(x: Tensor, ids: Tensor) -> Tensor:
        return gathered(x, qweight, scale, ids, *rest, "dequantize")

    compiled = torch.compile(run, backend=backend, dynamic=True)
    for m in (6, 7, 11):
        x, ids = torch.randn(m, 40), torch.randint(0, 2, (m,))
        torch.testing.assert_close(compiled(x, ids), run(x, ids))
    assert len(graphs) == 1
