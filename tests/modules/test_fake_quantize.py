"""fake_quantize_(): the plan's dequantized values where the weights were, and nowhere else."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import fqcompile
from fqcompile import FineQuantError, Plan
from tests.helpers import Mlp, assert_close, finequant, frozen, report

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


def _rounded_to_a_grid(before: Tensor, after: Tensor, bits: int, levels: str) -> None:
    """Every row (one scale each) takes at most 2**bits values, each near what it was."""
    assert before.shape == after.shape
    for old, new in zip(before, after, strict=True):
        assert len(new.unique()) <= 2**bits
        # Clipping may move the outermost value by more than half a step, never by a whole one.
        steps = new.unique().diff()
        step = steps.min() if levels == "uniform" else steps.max()
        assert float((old - new).abs().max()) <= float(step)


@pytest.mark.parametrize(("bits", "levels"), [(4, "uniform"), (4, "normal"), (8, "uniform")])
def test_weights_take_few_values_close_to_their_own(bits: int, levels: str) -> None:
    model = frozen(Mlp())
    before = copy.deepcopy(model)
    format: dict[str, Any] = {"bits": bits, "levels": levels}
    plan = fqcompile.explain(model, X, **format, granularity="column", scale_method="absmax")
    result = fqcompile.fake_quantize_(model, plan)
    assert result is model
    for name in ("up", "down"):
        old, new = getattr(before, name), getattr(model, name)
        _rounded_to_a_grid(old.weight, new.weight, bits, levels)
        assert torch.equal(new.bias, old.bias)
        error = ((old.weight - new.weight).norm() / old.weight.norm()).item()
        # The report's error is taken in fp64; this one in fp32 over 32768 terms.
        assert error == pytest.approx(plan.site(f"{name}.weight").relative_error, rel=1e-4)


def test_it_is_in_place_and_keeps_what_the_plan_keeps() -> None:
    model = frozen(Mlp())
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    plan = fqcompile.explain(model, X, exclude=["up"])
    fqcompile.fake_quantize_(model, plan)
    for name, parameter in model.named_parameters():
        same, value = before[name]
        assert parameter is same
        assert torch.equal(parameter, value) == (name != "down.weight"), name


def test_quantizing_the_dequantized_again_changes_little() -> None:
    model = frozen(Mlp())
    plan = fqcompile.explain(model, X, bits=8, granularity="column")
    once = fqcompile.fake_quantize_(copy.deepcopy(model), plan)
    twice = fqcompile.fake_quantize_(copy.deepcopy(once), plan)
    assert_close(twice(X), once(X), k=2**15)  # two scale searches may differ by 2^-9 of a step


class Packed(nn.Module):
    """One parameter for q, k and v, as nn.MultiheadAttention has, and two that are joined."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_proj = nn.Parameter(torch.randn(3 * 128, 128) / 11)
        self.left = nn.Parameter(torch.randn(64, 128) / 11)
        self.right = nn.Parameter(torch.randn(64, 128) / 11)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w) for w in self.in_proj.chunk(3))
        return F.linear(q * k.sigmoid() + v, torch.cat([self.left, self.right]))


def test_slices_and_joined_parameters_are_written_back_to_their_places() -> None:
    model = frozen(Packed())
    plan = fqcompile.explain(model, X, min_elements=1024)
    names = sorted(site.name for site in plan.quantized)
    assert names == ["in_proj[0]", "in_proj[1]", "in_proj[2]", "left+right"]
    original = copy.deepcopy(model)
    fqcompile.fake_quantize_(model, plan)
    for name, parameter in model.named_parameters():
        change = (parameter - original.get_parameter(name)).abs()
        assert 0.9 < (change > 0).float().mean() <= 1, name
    assert_close(finequant(original, min_elements=1024)(X), model(X), depth=2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(256, 128)
        self.body = nn.Linear(128, 128)
        self.head = nn.Linear(128, 256, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def test_a_tied_embedding_keeps_its_values() -> None:
    model = frozen(Tied())
    ids = torch.arange(6)
    before = model.embed.weight.clone()
    actual = finequant(model)(ids)
    assert {site.bits for site in report().plan.quantized} == {4, 8}
    faked = fqcompile.fake_quantize_(copy.deepcopy(model), report())
    assert torch.equal(faked.embed.weight, before)
    assert not torch.equal(faked.head.weight, before)
    assert_close(actual, faked(ids), depth=2)


class Joined(nn.Module):
    """As MobileBERT: its head is the table of embeddings and a matrix of the head's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(300, 128), nn.Linear(128, 192)
        self.head, self.rest = nn.Linear(128, 300, bias=False), nn.Linear(300, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        joined = torch.cat([self.head.weight.t(), self.rest.weight], dim=0)
        return self.body(self.embed(ids)).matmul(joined)


def test_of_what_is_joined_only_the_shared_part_is_parted_from_the_table() -> None:
    model, ids = frozen(Joined()), torch.arange(6)
    rest = model.rest.weight
    actual = finequant(model)(ids)
    assert {site.name for site in report().plan.quantized} == {
        "body.weight",
        "head.weight+rest.weight",
    }
    before, own = model.embed.weight.clone(), rest.clone()
    faked = fqcompile.fake_quantize_(model, report())
    assert torch.equal(faked.embed.weight, before)
    assert not torch.equal(faked.head.weight, before)
    assert faked.rest.weight is rest and not torch.equal(rest, own)
    assert_close(actual, faked(ids), depth=2)


def test_of_what_is_joined_the_part_without_a_place_is_named() -> None:
    class Table(Joined):
        def forward(self, ids: Tensor) -> Tensor:
            joined = torch.cat([self.embed.weight.t(), self.rest.weight], dim=0)
            return self.body(self.embed(ids)).matmul(joined)

    model = frozen(Table())
    del model.head
    plan = fqcompile.explain(model, torch.arange(6))
    with pytest.raises(FineQuantError, match=r"^embed\.weight is the weight of a linear"):
        fqcompile.fake_quantize_(model, plan)


def test_buffers_and_plain_attributes_are_found() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("buffer", torch.randn(128, 128) / 11)
            self.attribute = torch.randn(128, 128) / 11

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.buffer) @ self.attribute

    model = frozen(Plain())
    actual = finequant(model)(X)
    before = model(X)
    fqcompile.fake_quantize_(model, report())
    assert_close(actual, model(X), depth=2)
    assert not torch.allclose(before, model(X))


class Chain(nn.Module):
    """Equal layers behind graph breaks; what the root has under their names is not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128)
        self.blocks = nn.ModuleList(Mlp(seed=i) for i in range(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return x


def test_each_layer_behind_a_graph_break_gets_its_own_values() -> None:
    model = frozen(Chain())
    plan = fqcompile.explain(model, X)
    assert len(plan.quantized) == 6
    actual = finequant(model, fullgraph=False)(X)
    faked = fqcompile.fake_quantize_(copy.deepcopy(model), plan)
    assert torch.equal(faked.up.weight, model.up.weight)
    assert torch.equal(faked.down.weight, model.down.weight)
    assert_close(actual, faked(X), k=256, depth=8)


def test_a_name_that_fits_several_is_refused_and_nothing_is_written() -> None:
    model = frozen(Chain())
    before = copy.deepcopy(model.state_dict())
    plan = fqcompile.explain(frozen(Mlp()), X)
    several = nn.ModuleDict({"a": Mlp(), "b": Mlp()})
    with pytest.raises(FineQuantError, match=r"it may be any of a\.up\.weight, b\.up\.weight\)"):
        fqcompile.fake_quantize_(several, plan)
    sites = fqcompile.explain(model, X).quantized
    wrong = replace(sites[-1], shape=(9, 9))
    with pytest.raises(
        FineQuantError, match=r"is \[9, 9\] in the plan and \[128, 256\] in the model"
    ):
        fqcompile.fake_quantize_(model, Plan((*sites[:-1], wrong)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_of_a_part_fits_the_whole_where_one_name_ends_like_it() -> None:
    whole = nn.ModuleDict({"net": frozen(Mlp()), "other": nn.Linear(8, 8)})
    plan = fqcompile.explain(whole["net"], X)
    actual = finequant(whole["net"])(X)
    fqcompile.fake_quantize_(whole, plan)
    assert_close(actual, whole["net"](X), k=256, depth=3)


def test_two_plans_for_one_weight_are_refused() -> None:
    """Names of two roots that the model knows as one."""
    a, b = frozen(Mlp()), frozen(Mlp(seed=1))
    plan = fqcompile.explain(lambda x: a(x) + b(x), X)
    assert len(plan.quantized) == 4
    before = copy.deepcopy(a.state_dict())
    with pytest.raises(FineQuantError, match="another site quantize the same elements"):
        fqcompile.fake_quantize_(a, plan)
    assert all(torch.equal(value, before[name]) for name, value in a.state_dict().items())


def test_a_weight_that_is_read_both_ways_has_no_one_dequantized_value() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(256, 128))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.w), self.w.t())

    model = frozen(Autoencoder())
    plan = fqcompile.explain(model, X)
    assert [site.name for site in plan.quantized] == ["w[0]", "w[1]"]
    with pytest.raises(FineQuantError, match=r"w\[1\] and another site quantize the same elements"):
        fqcompile.fake_quantize_(model, plan)


NORMS = [
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
    nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.spectral_norm,
    nn.utils.parametrizations.orthogonal,
]


def _computed_by(register: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(128, 256)
    register(layer)
    return nn.Sequential(layer).requires_grad_(False).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_a_weight_that_a_norm_computes_becomes_the_quantized_one(norm: Any) -> None:
    packed, model = _computed_by(norm), _computed_by(norm)
    plan = fqcompile.quantize_(packed, calibration=None)
    fqcompile.fake_quantize_(model, plan)
    assert isinstance(model[0].weight, nn.Parameter)
    assert_close(model(X), X @ packed[0].weight.dequantize().mT + packed[0].bias)
    with pytest.raises(FineQuantError, match=r"0.weight is computed in each.*call model.eval"):
        fqcompile.fake_quantize_(_computed_by(norm).train(), plan)


@pytest.mark.parametrize(
    ("register", "remedy"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
        (
            lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
            "remove_parametrizations",
        ),
    ],
)
def test_what_the_next_call_computes_again_is_not_written(register: Any, remedy: str) -> None:
    plan = fqcompile.quantize_(_computed_by(lambda layer: None), calibration=None)
    with pytest.raises(FineQuantError, match=rf"0.weight is computed in each call.*{remedy}"):
        fqcompile.fake_quantize_(_computed_by(register), plan)


def _from_another_model() -> tuple[nn.Module, Plan]:
    return nn.Sequential(nn.Linear(8, 8)), fqcompile.explain(frozen(Mlp()), X)


def _from_a_file() -> tuple[nn.Module, Plan]:
    model = frozen(Mlp())
    plan = fqcompile.explain(model, X)
    sites = [fqcompile.Site(**{**site.as_dict(), "recipe": None}) for site in plan.sites]
    return model, Plan(tuple(sites))


def _computed_weight() -> tuple[nn.Module, Plan]:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.delta = (nn.Parameter(torch.randn(128, 128)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w + self.delta)

    model = frozen(Merged())
    return model, fqcompile.explain(model, X)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_from_another_model, r"the model has no tensor 'up.weight' \(no name ends like it\)"),
        (_from_a_file, "pass the plan that explain.. or a report gave, not one read from a file"),
        (_computed_weight, "computed by 'add' from other tensors.*merge it into one parameter"),
    ],
)
def test_what_cannot_be_written_raises(
    make: Callable[[], tuple[nn.Module, Plan]], text: str
) -> None:
    model, plan = make()
    with pytest.raises(FineQuantError, match=text):
        fqcompile.fake_quantize_(model, plan)
