"""WeightInputs: each weight's inputs, whatever the model calls, against hooks and loops."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo extra is not installed")
from fqcompile.config import FineQuantConfig
from fqcompile.modules.blocks import BlockRuns
from fqcompile.modules.calibrate import collect_inputs
from fqcompile.modules.inputs import WeightInputs
from fqcompile.modules.weights import ModuleWeight, module_weights
from fqcompile.quant.calibration import Moments
from tests import dense_models, moe_models

CONFIG = FineQuantConfig(min_elements=0)


def _weights(model: nn.Module) -> list[ModuleWeight]:
    return [w for w in module_weights(model, CONFIG) if w.reason is None]


def _moments(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, Moments]:
    found: dict[str, Moments] = {}

    def collect(weight: ModuleWeight, expert: int, x: Tensor) -> None:
        found.setdefault(weight.name, Moments(weight.matrix.shape)).add(x, expert)

    with torch.no_grad(), WeightInputs(_weights(model), collect):
        run(model)
    return found


@pytest.mark.few(3)
@pytest.mark.parametrize("name", dense_models.CASES)
def test_inputs_of_linears_are_those_that_hooks_see(name: str) -> None:
    model, inputs = dense_models.build(name, torch.float32)
    expected: dict[int, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args: expected.setdefault(id(module.weight), []).append(
                args[0].detach().double().reshape(-1, args[0].shape[-1])
            )
        )
        for module in model.modules()
        if hasattr(module, "weight") and type(module).__name__ in ("Linear", "Conv1D")
    ]
    found = _moments(model, lambda model: dense_models.run(model, inputs))
    for hook in hooks:
        hook.remove()
    for weight in _weights(model):
        rows = expected.get(id(weight.parameter))
        assert (rows is None) == (weight.name not in found), weight.name
        if rows is not None:
            x = torch.cat(rows)
            torch.testing.assert_close(found[weight.name].total[0], x.square().sum(0))
            assert found[weight.name].rows == [len(x)]


@pytest.mark.few(2)
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", moe_models.MODELS)
def test_rows_of_experts_do_not_depend_on_how_they_are_multiplied(name: str, form: str) -> None:
    ids = torch.randint(1, moe_models.VOCAB, (2, 5), generator=torch.Generator().manual_seed(7))

    def moments(implementation: str) -> dict[str, Moments]:
        model = moe_models.build(name, torch.float32, implementation)
        return _moments(model, lambda model: moe_models.logits(model, ids))

    loop, other = moments("eager"), moments(form)
    stacks = set(moe_models.expert_weights(moe_models.build(name, torch.float32, form)))
    assert stacks <= loop.keys() and loop.keys() == other.keys()
    for weight in loop:
        assert loop[weight].rows == other[weight].rows, weight
        torch.testing.assert_close(loop[weight].total, other[weight].total, rtol=1e-4, atol=1e-6)


class Forms(nn.Module):
    """One linear's weight, read in ways that modules of their own would."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)
        self.seen = nn.Buffer(torch.zeros(()))
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor, form: str = "linear") -> Tensor:
        self.seen += 1
        self.cache.append(x)
        w, b = self.layer.weight, self.layer.bias
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            return {
                "linear": lambda: nn.functional.linear(x, w),
                "autocast": lambda: nn.functional.linear(x, w, b),
                "rows": lambda: x @ w[2:5].t(),
                "left": lambda: w @ x.mT,
                "mv": lambda: w @ x[0, 0],
                "batch": lambda: torch.bmm(x, w.t().expand(len(x), -1, -1)),
                "square": lambda: x[0, :6, :6] @ w[:, :6],
                "columns": lambda: x[..., :4] @ w[:, :4].t(),
                "dead copy": lambda: w.clone().sum() + torch.randn(6, 8).sum(),
            }[form]()


@pytest.mark.parametrize("form", ["linear", "autocast", "rows", "left", "mv", "batch"])
def test_every_way_to_multiply_is_seen(form: str) -> None:
    model, x = Forms(), torch.randn(2, 7, 8)
    found = _moments(model, lambda model: model(x, form))
    rows = x[0, :1] if form == "mv" else x.flatten(0, 1)
    if form == "autocast":
        rows = rows.bfloat16()
    assert found["layer.weight"].rows == [len(rows)]
    torch.testing.assert_close(found["layer.weight"].total[0], rows.double().square().sum(0))


@pytest.mark.parametrize("form", ["square", "columns", "dead copy"])
def test_what_is_no_product_with_all_columns_is_not_told(form: str) -> None:
    assert not _moments(Forms(), lambda model: model(torch.randn(2, 7, 8), form))


@pytest.mark.parametrize("runs", [collect_inputs, lambda m, *a: BlockRuns(m).collect(*a)])
def test_layers_that_pytorch_runs_as_one_operator_are_seen(runs: Callable[..., None]) -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
    x, found = torch.randn(3, 5, 16), dict[str, Moments]()

    def collect(weight: ModuleWeight, expert: int, x: Tensor) -> None:
        found.setdefault(weight.name, Moments(weight.matrix.shape)).add(x)

    before = torch.backends.mha.get_fastpath_enabled()
    runs(model, [x], _weights(model), collect)
    assert torch.backends.mha.get_fastpath_enabled() == before
    own = model.double()
    attention = own.self_attn
    projected = F.linear(x.double(), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = projected.view(3, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    values = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    attended = own.norm1(x.double() + attention.out_proj(values))
    wanted = {
        "self_attn.in_proj_weight": x.double(),
        "self_attn.out_proj.weight": values,
        "linear1.weight": attended,
        "linear2.weight": own.linear1(attended).relu(),
    }
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        expected = rows.flatten(0, 1).square().sum(0)
        torch.testing.assert_close(found[name].total[0], expected, rtol=1e-4, atol=1e-6)


class Stacked(nn.Module):
    """Experts that all have the same number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.is_transposed = nn.Parameter(torch.randn(2, 16, 8)), True

    def forward(self, x: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.experts.to(x.dtype))


def test_a_grouped_product_without_offsets_is_one_of_batches() -> None:
    x = torch.randn(2, 5, 16).bfloat16()
    (found,) = _moments(Stacked(), lambda model: model(x)).values()
    assert found.rows == [5, 5]
    torch.testing.assert_close(found.total, x.double().square().sum(1))


def test_the_model_and_random_numbers_stay_as_they_are() -> None:
    model = nn.Sequential(Forms(), nn.BatchNorm1d(7), nn.Dropout(0.5))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    seen: list[Any] = []
    batches = [torch.randn(2, 7, 8), (torch.randn(1, 7, 8),), {"input": torch.randn(3, 7, 8)}]
    state = torch.get_rng_state()
    collect_inputs(model, batches, _weights(model), lambda *got: seen.append(got))
    assert [len(x.reshape(-1, 8)) for _, _, x in seen] == [14, 7, 21]
    assert model.training and not model[0].cache
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)
