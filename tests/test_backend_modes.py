"""Gradients, modes, graph breaks, failures inside passes and routers: the program stays right."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fqcompile
from fqcompile.kernels.registry import TEMPLATES, KernelChoice
from fqcompile.kernels.spec import LaunchTable
from fqcompile.passes import pipeline
from fqcompile.passes.op_nodes import argument
from tests.helpers import (
    InnerGraphs,
    Mlp,
    assert_close,
    assert_quantized_like_oracle,
    finequant,
    frozen,
    oracle,
    quantized_names,
    report,
)

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


class Adapted(nn.Module):
    """LoRA: frozen bases with a trainable low-rank path beside each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.ModuleList(nn.Linear(128, 128) for _ in range(3)).requires_grad_(False)
        self.down = nn.ParameterList(torch.randn(8, 128) / 11 for _ in self.base)
        self.up = nn.ParameterList(torch.randn(128, 8) / 3 for _ in self.base)

    def forward(self, x: Tensor) -> Tensor:
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            x = F.gelu(base(x) + F.linear(F.linear(x, down), up)) + x
        return x


def _gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    run(x).square().mean().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    gradients = {**named, "x": x.grad}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize(
    "inner_backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_adapters_train_on_a_quantized_base(inner_backend: str) -> None:
    model = Adapted()
    actual = _gradients(model, finequant(model, inner_backend=inner_backend), X)
    faked = oracle(model)
    expected = _gradients(faked, faked, X)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], depth=12, what=name)
    assert quantized_names(report().sites) == {f"base.{i}.weight" for i in range(3)}
    kept = {site.name: site.reason for site in report().plan.kept}
    assert all("min_elements" in reason for reason in kept.values())


def test_a_trainable_weight_is_kept_with_its_reason_and_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Mlp()
    model.down.requires_grad_(False)
    compiled = finequant(model)
    with caplog.at_level(logging.WARNING, "fqcompile"):
        gradients = _gradients(model, compiled, X)
    assert quantized_names(report().sites) == {"down.weight"}
    assert report().plan.site("up.weight").reason == (
        "the weight requires grad: call under torch.no_grad(), or freeze it with "
        "requires_grad_(False)"
    )
    (warning,) = report().warnings
    assert warning.startswith("1 of 2 sites are kept")
    assert "their weights require grad (up.weight, ...)" in warning
    assert warning in caplog.text
    faked = oracle(model)
    expected = _gradients(faked, faked, X)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], k=256, depth=6, what=name)


def test_one_model_called_in_every_grad_mode() -> None:
    model = frozen(Mlp())
    compiled = finequant(model)
    expected = None
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            actual = compiled(X)
        expected = oracle(model)(X) if expected is None else expected
        assert_close(actual, expected, k=256, depth=2, what=mode.__name__)
    x = X.clone().requires_grad_()
    compiled(x).sum().backward()
    x_faked = X.clone().requires_grad_()
    oracle(model)(x_faked).sum().backward()
    assert_close(x.grad, x_faked.grad, k=256, depth=4)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = frozen(Mlp())
        actual = finequant(model)(X)
        assert_quantized_like_oracle(model, actual, lambda m: m(X), k=256, depth=2)


def _autocast(dtype: torch.dtype, enabled: bool = True) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


class Nested(Mlp):
    """bf16 outside, fp32 inside, bf16 again."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        with _autocast(torch.bfloat16, enabled=False):
            hidden = F.gelu(F.linear(self.down(hidden.float()), self.up.weight, self.up.bias))
        return self.down(hidden)


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("model_class", [Mlp, Nested])
def test_nested_autocast(model_class: type[Mlp], inner_backend: str) -> None:
    model = frozen(model_class())
    compiled = finequant(model, inner_backend=inner_backend, granularity=64)

    def run(m: Any) -> Tensor:
        with _autocast(torch.bfloat16):
            return m(X)

    actual = run(compiled)
    assert actual.dtype == torch.bfloat16
    assert_quantized_like_oracle(model, actual, run, k=256, depth=8)
    # The same compiled model outside autocast runs in fp32.
    assert_close(compiled(X), oracle(model)(X), k=256, depth=4)


class Broken(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x))
        torch._dynamo.graph_break()
        if hidden.sum() > 1e9:  # a data-dependent branch breaks the graph too
            return hidden
        return self.down(hidden)


def test_graph_breaks_leave_a_correct_program() -> None:
    model = frozen(Broken())
    actual = finequant(model, fullgraph=False)(X)
    plans = [r.plan for r in fqcompile.reports()]
    assert [quantized_names(p.sites) for p in plans if p.sites] == [{"up.weight"}, {"down.weight"}]
    faked = model
    for plan in plans:
        faked = oracle(faked, plan)
    assert_close(actual, faked(X), k=256, depth=2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns of a wider one": lambda x: torch.cat([x, x], -1)[..., 64:192],
    "expanded": lambda x: x[:1].expand_as(x),
    "reversed K": lambda x: x.flip(-1).mT.contiguous().mT,
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inputs_of_any_layout(layout: str, dtype: torch.dtype) -> None:
    model = frozen(Mlp()).to(dtype)
    x = LAYOUTS[layout](torch.randn(3, 4, 128, dtype=dtype))
    actual = finequant(model, granularity=64, inner_backend="aot_eager")(x)
    assert_close(actual, oracle(model)(x), k=256, depth=3)


WORDS = "capture normalize match plan rewrite fuse select lower".split()


def break_pass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*args: object) -> int:
        raise RuntimeError("broken on purpose")

    if name in pipeline.PASSES:
        monkeypatch.setitem(pipeline.PASSES, name, fail)
    else:
        monkeypatch.setattr(pipeline, name, fail)


@pytest.mark.parametrize("name", WORDS)
def test_a_pass_that_fails_leaves_the_model_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_pass(monkeypatch, name)
    model = frozen(Mlp())
    with caplog.at_level(logging.WARNING, "fqcompile"):
        actual = finequant(model)(X)
    assert_close(actual, model(X), k=256, depth=2)
    (warning,) = report().warnings
    problem = f"runs unquantized: pass {name!r} failed with RuntimeError: broken on purpose"
    assert warning.endswith(problem)
    assert warning in caplog.text
    assert not quantized_names(report().sites)


@pytest.mark.parametrize("name", WORDS)
def test_a_pass_that_fails_raises_where_asked_to(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_pass(monkeypatch, name)
    with pytest.raises(Exception, match="broken on purpose"):
        finequant(frozen(Mlp()), on_unsupported="error")(X)


class Routed(nn.Module):
    """A router over 32 experts, and a linear whose result also is ranked, but after another one."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router = nn.Linear(1024, 32)
        self.value = nn.Linear(1024, 32)
        self.score = score

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = torch.topk(self.score(self.router(x).float()), 2, dim=-1)
        return self.value(x).gather(-1, chosen) * weights, chosen


SCORES = {
    "softmax": lambda s: s.softmax(-1),
    "sigmoid": lambda s: s.sigmoid() + 0.5,
    "plain": lambda s: s,
}


@pytest.mark.parametrize("score", SCORES)
def test_a_router_is_kept(score: str) -> None:
    model = frozen(Routed(SCORES[score]))
    x = torch.randn(6, 1024)
    values, chosen = finequant(model)(x)
    assert report().plan.site("router.weight").reason == (
        "router: its top-k decides which experts run; name it in overrides to quantize it"
    )
    assert quantized_names(report().sites) == {"value.weight"}
    assert torch.equal(chosen, model(x)[1])
    assert_close(values, oracle(model)(x)[0], k=1024)


def test_a_router_named_in_overrides_is_quantized() -> None:
    model = frozen(Routed(SCORES["softmax"]))
    finequant(model, overrides={"router": {"bits": 8}})(torch.randn(6, 1024))
    assert report().plan.site("router.weight").bits == 8


def test_every_quantized_linear_carries_the_kernel_that_select_chose(
    inner_graphs: InnerGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Template and configuration are fixed: nothing is left to Inductor's or the op's tuning."""
    launches = LaunchTable.parse("m16=16x64x128x1w4s3,dense")
    template = replace(TEMPLATES["dequantize"], launches=lambda spec: launches)
    choice = KernelChoice(template, launches)
    monkeypatch.setattr("fqcompile.passes.select.select_kernel", lambda spec: choice)
    finequant(frozen(Mlp()), inner_backend="fqtest_spy")(X)
    kernels = [argument(node, "kernel") for node in inner_graphs.linears()]
    assert kernels == [f"dequantize:{launches}"] * 2
    assert {site.kernel for site in report().sites} == {f"dequantize:{launches}"}
