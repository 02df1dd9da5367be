"""plan: why a site stays as it is, in words; plans of the rest, and their codes in the store."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fqcompile
from fqcompile.errors import UnquantizableWeight
from fqcompile.kernels import registry
from fqcompile.kernels.epilogue import HAS_TRITON
from fqcompile.kernels.spec import H200
from fqcompile.passes import plan as plan_module
from fqcompile.passes import select as select_module
from fqcompile.passes.plan import apply_decisions, decide
from fqcompile.passes.state import part_of
from fqcompile.weights.node_weight import Part
from fqcompile.weights.recipe import IDENTITY
from fqcompile.weights.store import STORE
from tests.passes.graphs import Run, run_passes, weight

X = torch.randn(6, 64)


def linear(w: Tensor, **options: object) -> Run:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = nn.Parameter(w, requires_grad=bool(options.pop("trainable", False)))
    x = torch.randn(6, w.shape[1], dtype=w.dtype)
    return run_passes(layer, x, until="plan", **options)


def with_value(value: float) -> Tensor:
    w = weight(64, 64)
    w[5, 6] = value
    return w


REASONS: dict[str, tuple[Tensor, dict[str, object], str]] = {
    "NaN": (
        with_value(float("nan")),
        {},
        r"1 of 4096 values are NaN or infinite; .*nan at \(5, 6\)",
    ),
    "infinite": (with_value(float("-inf")), {}, r"1 of 4096 values .* -inf at \(5, 6\)"),
    "too small": (weight(64, 64), {"min_elements": 4097}, r"4097"),
    "excluded": (weight(64, 64), {"exclude": ["^weight$"]}, r"exclude pattern '\^weight\$'"),
    "not included": (weight(64, 64), {"include": ["mlp"]}, r"matches no include pattern"),
    "group larger than K": (weight(64, 64), {"granularity": 65}, r"65.*64|64.*65"),
    "impossible budget": (
        weight(64, 64),
        {"error_budget": 1e-9},
        r"error_budget 1e-09 cannot be met: the best relative error is",
    ),
    "trainable": (
        weight(64, 64),
        {"trainable": True, "grad": True},
        r"weight requires grad: call under torch.no_grad\(\), or freeze it with requires_grad_",
    ),
    "float64": (
        weight(64, 64).double(),
        {},
        r"dtype torch.float64 is not supported; use fp32, fp16 or bf16",
    ),
}


@pytest.mark.parametrize(("w", "options", "text"), REASONS.values(), ids=list(REASONS))
def test_reason_says_why_and_what_to_do(w: Tensor, options: dict[str, object], text: str) -> None:
    run = linear(w, **dict(options))
    (site,) = run.state.sites
    assert run.counts["plan"] == 0
    assert site.plan is None
    assert re.search(text, site.reason or ""), site.reason


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("dtype", "options", "text"),
    [
        (torch.bfloat16, {}, None),
        (torch.float32, {}, "the GPU kernel takes fp16 or bf16 activations, not torch.float32"),
        (torch.bfloat16, {"granularity": 24}, "takes groups of a multiple of 16, not 24"),
        (torch.float32, {"overrides": {"weight": {"bits": 8}}}, None),
    ],
)
def test_a_gpu_keeps_dense_what_each_call_would_dequantize(
    dtype: torch.dtype, options: dict[str, object], text: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """But for what is named in overrides, and what has been packed already, whose memory counts."""
    asked = registry.dequantized_because
    for module in (plan_module, select_module):
        monkeypatch.setattr(
            module,
            "dequantized_because",
            lambda spec: asked(replace(spec, device_type="cuda", gpu=H200)),
        )
    run = linear(weight(64, 64).to(dtype), **options)
    (site,) = run.state.sites
    assert (site.plan is None) is (text is not None)
    if text is not None:
        assert text in str(site.reason) and "fqcompile.quantize_" in str(site.reason)
    layer = nn.Linear(64, 64, bias=False).to(dtype)
    fqcompile.quantize_(layer, min_elements=1)
    packed = run_passes(layer, X.to(dtype), until="select")
    (warned,) = packed.state.warnings or [""]
    assert ("each call dequantizes the weight" in warned) is (dtype == torch.float32)


def router(x: Tensor, w: Tensor, score: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """How much the chosen experts count, and which ones they are."""
    best = torch.topk(score(F.linear(x, w)), 2)
    return best.values, best.indices


ROUTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bare": lambda s: s,
    "softmax": lambda s: F.softmax(s.float(), dim=-1),
    "sigmoid plus a correction": lambda s: s.sigmoid() + 0.1,
    "grouped": lambda s: s.sigmoid().view(-1, 8, 4).amax(-1),
}


@pytest.mark.parametrize("score", ROUTERS.values(), ids=list(ROUTERS))
def test_router_is_kept(score: Callable[[Tensor], Tensor]) -> None:
    w = weight(32, 64)
    run = run_passes(lambda x: router(x, w, score), X, until="plan")
    assert (
        "router: its top-k decides which experts run; name it in overrides"
        in run.state.sites[0].reason
    )


@pytest.mark.parametrize("experts", [True, False], ids=["beside experts", "elsewhere"])
@pytest.mark.parametrize(
    "pick", [torch.argmax, lambda s, dim: s.max(dim)[1]], ids=["argmax", "max"]
)
def test_top_one_is_a_router_beside_experts_alone(
    pick: Callable[..., Tensor], experts: bool
) -> None:
    """Elsewhere it is a classifier, whose maximum is its answer."""
    w, stack = weight(32, 64), torch.stack([weight(24, 64, i) for i in range(32)])

    def forward(x: Tensor) -> Tensor:
        best = pick(F.linear(x, w).softmax(-1), -1)
        return torch.bmm(stack[best], x.unsqueeze(-1)) if experts else best

    run = run_passes(forward, X, until="plan")
    assert (run.state.sites[0].plan is None) == experts


def test_router_named_in_overrides_is_quantized() -> None:
    w = weight(32, 64)
    run = run_passes(
        lambda x: router(x, w, torch.sigmoid), X, until="plan", overrides={"^w$": {"bits": 8}}
    )
    assert run.state.sites[0].plan.bits == 8


def test_what_lies_before_another_matmul_or_is_as_wide_as_a_vocabulary_is_no_router() -> None:
    up, down, head = weight(32, 64), weight(32, 32, 1), weight(2048, 64)
    run = run_passes(
        lambda x: (
            *router(F.linear(x, up), down, lambda s: s),
            *torch.topk(F.linear(x, head), 5),
        ),
        X,
        until="plan",
    )
    assert [site.plan is not None for site in run.state.sites] == [True, False, True]


def test_frozen_weight_is_quantized_where_gradients_are_possible() -> None:
    assert linear(weight(64, 64), grad=True).counts["plan"] == 1
    assert linear(weight(64, 64), trainable=True).counts["plan"] == 1


def test_options_of_the_site_reach_the_plan() -> None:
    model = nn.ModuleDict({n: nn.Linear(64, 64, bias=False) for n in ("up", "down", "lm_head")})

    def forward(x: Tensor) -> Tensor:
        return model["lm_head"](model["down"](model["up"](x)))

    overrides = {"down": {"bits": 8, "granularity": 16, "scale_method": "absmax"}}
    run = run_passes(forward, X, until="plan", granularity="column", overrides=overrides)
    plans = [(s.plan.bits, s.plan.group_size, s.plan.scale_method) for s in run.state.sites]
    assert plans == [(4, 64, "mse"), (8, 16, "absmax"), (8, 64, "mse")]


def test_scales_follow_the_activation_dtype() -> None:
    layer = nn.Linear(64, 64).bfloat16()
    run = run_passes(layer, X.bfloat16(), until="plan")
    assert run.state.sites[0].plan.scale_dtype == torch.bfloat16


def test_on_unsupported_error_names_the_parameter_and_the_way_out() -> None:
    with pytest.raises(
        UnquantizableWeight, match=r"^weight: 1 of 4096 values.*exclude the parameter, or"
    ):
        linear(with_value(float("nan")), on_unsupported="error")
    assert linear(weight(64, 64), on_unsupported="error", exclude=["."]).counts["plan"] == 0


def test_decisions_for_other_weights_follow_their_values() -> None:
    """What another instance of the same graph gets: its own plan, or its own reason."""
    run = linear(weight(64, 64))
    args = [with_value(float("nan")) if a.shape == (64, 64) else a for a in run.state.args]
    (decision,) = decide(run.state, args, run.state.known)
    assert isinstance(decision, str)
    assert "NaN" in decision
    run.state.sites[0].plan = None
    apply_decisions(run.state, (decision,))
    assert run.state.sites[0].reason == decision


def test_settled_sites_are_not_decided_again() -> None:
    run = linear(weight(64, 64), exclude=["."])
    assert run.state.sites[0].settled
    assert decide(run.state, run.state.args, run.state.known) == ()


def part(run: Run, index: int = 0) -> Part:
    site = run.state.sites[index]
    assert site.plan is not None
    return part_of(run.state, site, site.plan)


def test_a_planned_site_says_recipe_inputs_and_shape() -> None:
    a, b = weight(48, 64), weight(64, 32, 1)
    run = run_passes(lambda x: (F.linear(x, a), x @ b), torch.randn(4, 64), until="plan")
    first, second = part(run), part(run, 1)
    assert (first.rows, first.k, first.plan.group_size, first.plan.bits) == (48, 64, 32, 4)
    assert (second.rows, second.k) == (32, 64)
    assert first.recipe.key == IDENTITY.key
    assert second.recipe.key == IDENTITY.then("transpose", -2, -1).key
    given = [run.captured.args[i] for own in (first, second) for i in own.inputs]
    assert given[0] is a
    assert given[1] is b


def test_codes_are_in_the_store_and_those_of_the_oriented_weight() -> None:
    w = weight(64, 32)
    run = run_passes(lambda x: x @ w, X, until="plan", bits=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Part, "quantize", None)  # nothing is left to be made
        stored = STORE.quantized(part(run), (w,))
    # int8 with a searched scale: within one step of the weight.
    error = (stored.dequantize(torch.float32) - w.t()).abs()
    assert bool((error <= stored.scale.repeat_interleave(32, 1).abs()).all())


def test_kept_sites_are_told_beside_planned_ones() -> None:
    a, b = weight(64, 64), weight(64, 64, 1)
    run = run_passes(lambda x: F.linear(x, a) + F.linear(x, b), X, until="plan", exclude=["^a$"])
    assert run.counts["plan"] == 1
    assert [site.plan is not None for site in run.state.sites] == [False, True]
    assert run.state.matched == [
        f"a: {run.state.sites[0].reason}",
        "b: 4 bits, groups of 32",
    ]


def test_two_sites_of_one_weight_share_its_codes() -> None:
    w = weight(64, 64)

    def forward(x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, w)), w)

    run = run_passes(forward, X, until="plan")
    assert STORE.quantized(part(run), (w,)) is STORE.quantized(part(run, 1), (w,))
