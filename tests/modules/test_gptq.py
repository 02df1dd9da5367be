"""GPTQ over models: whose inputs are found, in how many runs; what is made of them and kept."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fqcompile import fake_quantize_, quantize_
from fqcompile.config import FineQuantConfig, SiteOptions
from fqcompile.errors import FineQuantError, OptionError
from fqcompile.modules import gptq
from fqcompile.modules.calibrate import collect_inputs
from fqcompile.modules.gptq import WeightsInputs, compensated
from fqcompile.modules.weights import ModuleWeight, module_weights
from fqcompile.quant.calibration import Calibration
from fqcompile.quant.choose import choose_and_quantize
from fqcompile.quant.gptq import compensate
from fqcompile.tensor.quantized import QuantizedTensor
from fqcompile.weights.disk_cache import Entry
from fqcompile.weights.parameter import PackedWeight
from tests import moe_models

CONFIG = FineQuantConfig(min_elements=0)


class Layer(nn.Module):
    """Attention's and an MLP's linears in miniature, and two experts that take turns."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.up, self.down = nn.Linear(width, 48), nn.Linear(48, width)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(3, 2 * width, width) / 6)
        self.experts.down_proj = nn.Parameter(torch.randn(3, width, width) / 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.q(x)) * self.k(x)
        x = x + self.down(torch.relu(self.up(x)))
        for expert in (0, 2):
            own = x[expert::3]
            gate, up = (own @ self.experts.gate_up_proj[expert].T).chunk(2, -1)
            x = x.index_add(
                0,
                torch.arange(expert, len(x), 3),
                (gate.sigmoid() * up) @ self.experts.down_proj[expert].T,
            )
        return x


def model_and_batches(batches: int = 3, rows: int = 600) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    mix = torch.randn(8, 32)  # what inputs have in common
    one = lambda: torch.randn(rows, 8) @ mix + 0.1 * torch.randn(rows, 32)  # noqa: E731
    return model, [one() for _ in range(batches)]


def found_in(model: nn.Module) -> list[ModuleWeight]:
    return [weight for weight in module_weights(model, CONFIG) if weight.reason is None]


def inputs_of(model: nn.Module, batches: list[Tensor], weights: list[ModuleWeight]):
    return WeightsInputs(partial(collect_inputs, model, batches), weights)


def inputs_by_hand(model: nn.Module, batches: list[Tensor]) -> dict[tuple[str, int], Tensor]:
    """The rows that each matrix is multiplied with, all below each other."""
    rows: dict[tuple[str, int], list[Tensor]] = {}
    for n, layer in enumerate(model):
        experts = layer.experts
        for x in batches:
            hidden = x + torch.tanh(layer.q(x)) * layer.k(x)
            activated = torch.relu(layer.up(hidden))
            met = {"q": x, "k": x, "up": hidden, "down": activated}
            for name, own in met.items():
                rows.setdefault((f"{n}.{name}.weight", 0), []).append(own)
            out = hidden + layer.down(activated)
            for e in (0, 2):
                gate, up = (out[e::3] @ experts.gate_up_proj[e].T).chunk(2, -1)
                rows.setdefault((f"{n}.experts.gate_up_proj", e), []).append(out[e::3])
                rows.setdefault((f"{n}.experts.down_proj", e), []).append(gate.sigmoid() * up)
        batches = [layer(x) for x in batches]
    return {key: torch.cat(x) for key, x in rows.items()}


@pytest.mark.parametrize("budget", [1, 3 * 32 * 32 * 4, 1 << 30])
@torch.no_grad()
def test_moments_are_those_of_the_inputs_however_many_fit_at_a_time(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "_BUDGET", budget)
    model, batches = model_and_batches()
    weights = found_in(model)
    inputs, expected = inputs_of(model, batches, weights), inputs_by_hand(model, batches)
    seen = set()
    for weight in weights:
        for expert in range(weight.matrix.shape[0] if weight.matrix.dim() == 3 else 1):
            own = inputs.take(weight, expert)
            x = expected.get((weight.name, expert), torch.zeros(0, weight.matrix.shape[-1]))
            assert own.rows == len(x)
            torch.testing.assert_close(own.moments, x.T @ x, rtol=1e-4, atol=1e-2)
            seen.add((weight.name, expert))
    assert expected.keys() <= seen


def rounded(weight: ModuleWeight) -> Entry:
    options = SiteOptions(granularity=32)
    plan, made = choose_and_quantize(weight.matrix.detach(), options, torch.float16)
    return replace(plan, calibration=Calibration(asked="batches", source="batches")), made


def losses(weight: ModuleWeight, made: QuantizedTensor, x: Tensor, expert: int = 0) -> float:
    """tr((w - ŵ) XᵀX (w - ŵ)ᵀ)."""
    errors = weight.matrix.detach() - made.dequantize(torch.float32)
    return float((x @ (errors[expert] if errors.dim() == 3 else errors).T).square().sum())


def test_each_expert_gets_codes_by_its_own_inputs() -> None:
    """Of three experts, one has few rows, and one none: they stay as they were rounded."""
    model, batches = model_and_batches(1, 1600)
    (weight,) = [w for w in found_in(model) if w.name == "0.experts.down_proj"]
    model[0].forward = lambda x: x[:1] @ weight.parameter[0].T + x @ weight.parameter[2].T
    entry = rounded(weight)
    inputs = inputs_of(nn.Sequential(model[0]), batches, [weight])
    plan, made = compensated(weight, entry, inputs, None)
    assert plan.calibration.source == (
        "batches; gptq, but not of 2 of 3 experts: it needs 512 rows of inputs, and there were 1"
    )
    assert torch.equal(made.qweight[:2], entry[1].qweight[:2])
    assert losses(weight, made, batches[0], 2) < 0.7 * losses(weight, entry[1], batches[0], 2)
    errors = weight.matrix.detach() - made.dequantize(torch.float32)
    norms = [float(e.norm() / w.norm()) for e, w in zip(errors, weight.matrix, strict=True)]
    assert plan.expert_errors == pytest.approx(norms)
    whole = float(errors.norm() / weight.matrix.norm())
    assert plan.relative_error == pytest.approx(whole) and plan.choice == entry[0].choice


def test_few_rows_or_an_error_budget_leave_what_was_rounded() -> None:
    model, _ = model_and_batches()
    weight = found_in(model)[0]
    entry = rounded(weight)
    for rows, budget, expected in (
        (511, None, "no gptq: it needs 512 rows of inputs, and there were 511"),
        (512, entry[0].relative_error, "is beyond error_budget"),
    ):
        own = [torch.randn(rows, 4) @ torch.randn(4, 32)]
        plan, same = compensated(weight, entry, inputs_of(model, own, [weight]), budget)
        assert same is entry[1] and plan.relative_error == entry[0].relative_error
        assert expected in plan.calibration.source


def test_what_an_interrupted_run_has_made_is_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FQCOMPILE_CACHE_SIZE", "1")
    monkeypatch.setattr(gptq, "LEAST_WEIGHTS", 0)
    model, batches = model_and_batches()
    runs: list[Tensor] = []
    for times in (1, 1, 2):
        weight = found_in(model)[0]
        inputs = inputs_of(model, batches[:times], [weight])
        if times == 1 and runs:
            monkeypatch.setattr(gptq, "compensate", None)  # is not called any more
        _, made = compensated(weight, rounded(weight), inputs, None)
        runs.append(made.qweight)
        monkeypatch.setattr(gptq, "compensate", compensate)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])  # by other inputs
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_inputs_that_several_weights_read_are_multiplied_and_factored_once() -> None:
    model, batches = model_and_batches()
    weights = found_in(model)[:3]
    inputs = inputs_of(model, batches, weights)
    q, k, up = (inputs.take(weight, 0) for weight in weights)
    assert q is k and q is not up
    assert q.refusal is None and q.digest != up.digest
    assert q.factor is k.factor


def test_a_weight_that_is_asked_for_again_is_found_again() -> None:
    """As one is that was written to meanwhile."""
    model, batches = model_and_batches()
    weights = found_in(model)
    inputs = inputs_of(model, batches, weights)
    first = inputs.take(weights[1], 0).moments.clone()
    assert torch.equal(inputs.take(weights[1], 0).moments, first)
    assert inputs.take(weights[2], 0).rows == 1800


def test_quantize_with_gptq_keeps_outputs_better() -> None:
    """On inputs of the same kind that it has not seen; the report says what was done."""
    model, batches = model_and_batches(5, 700)
    exact = model(batches[-1])
    errors, plans = {}, {}
    for method in ("scale", "gptq"):
        own = copy.deepcopy(model)
        options = {"min_elements": 0, "granularity": 32, "calibration": batches[:-1]}
        plans[method] = quantize_(own, **options, method=method)
        errors[method] = float((own(batches[-1]) - exact).square().mean())
    assert errors["gptq"] < 0.9 * errors["scale"], errors
    assert {site.calibration_rows for site in plans["gptq"].sites} == {4 * 700, 4 * (234 + 233)}
    linears = [site for site in plans["gptq"].sites if site.kind == "linear"]
    assert {site.calibration for site in linears} == {"batches; gptq"}
    with pytest.raises(FineQuantError, match="GPTQ"):
        fake_quantize_(model, plans["gptq"])


def test_the_same_batches_give_the_same_codes() -> None:
    model, batches = model_and_batches()
    codes = []
    for own in (copy.deepcopy(model), copy.deepcopy(model)):
        quantize_(own, min_elements=0, calibration=iter(batches), method="gptq")
        weights = [p for p in own.parameters() if isinstance(p, PackedWeight)]
        codes.append([w.quantized().qweight for w in weights])
    assert len(codes[0]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", moe_models.MODELS)
def test_models_of_others_with_experts(name: str) -> None:
    """Some layers are packed already when the inputs of others are found."""
    ids = torch.randint(1, moe_models.VOCAB, (30, 120), generator=torch.Generator().manual_seed(1))
    model = moe_models.build(name, torch.float32, "eager")
    before = {key: value.clone() for key, value in model.named_buffers()}
    plan = quantize_(model, min_elements=0, calibration=ids.split(10), method="gptq")
    made = [site for site in plan.quantized if site.bits == 4]
    assert len(made) > 10 and all("gptq" in str(site.calibration) for site in made)
    assert any("; gptq" in str(site.calibration) for site in made if site.kind == "experts")
    assert all(torch.equal(before[key], value) for key, value in model.named_buffers())
    assert bool(moe_models.logits(model, ids[:1]).isfinite().all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gptq", "calibration": None}, ("method", "calibration", "None", "batches")),
        ({"method": "gptq", "calibration": "synthetic"}, ("'synthetic'", "batches")),
        ({"method": "gtpq"}, ("method", "'gtpq'", "'gptq'", "'scale'")),
    ],
)
def test_methods_that_are_none_and_gptq_without_inputs_are_refused(options, words) -> None:
    model, _ = model_and_batches()
    with pytest.raises(OptionError) as caught:
        quantize_(model, **options)
    for word in words:
        assert word in str(caught.value)
    assert not any(isinstance(p, PackedWeight) for p in model.parameters())
