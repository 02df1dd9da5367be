"""Weights are looked up by identity and state, never baked in; each graph serves every instance."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fqcompile
from fqcompile.backend import finequant as backend
from fqcompile.weights import store
from fqcompile.weights.node_weight import Part
from fqcompile.weights.store import STORE
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


def _call(model: nn.Module) -> Tensor:
    return model(X)


def _check(model: nn.Module, compiled: Any, x: Tensor = X) -> None:
    """The compiled model computes what the model's present weights, dequantized, give."""
    assert_quantized_like_oracle(model, compiled(x), lambda m: m(x), k=256, depth=2)


@pytest.mark.parametrize("weight_updates", ["detect", "ignore"])
def test_instances_share_one_graph_and_keep_their_own_weights(weight_updates: str) -> None:
    models = [frozen(Mlp(seed=seed)) for seed in range(3)]
    compiled = [finequant(m, granularity=64, weight_updates=weight_updates) for m in models]
    for _ in range(2):
        for model, run in zip(models, compiled, strict=True):
            _check(model, run)
    assert len(fqcompile.reports()) == 1


def test_sibling_blocks_compiled_in_place_share_one_graph() -> None:
    model = frozen(nn.Sequential(*(Mlp(seed=seed) for seed in range(4))))
    options = {"inner_backend": "eager", "granularity": 64}
    for block in model:
        block.compile(backend="finequant", fullgraph=True, options=options)
    actual = model(X)
    plan = report().plan
    expected = nn.Sequential(*(oracle(block, plan) for block in model))(X)
    assert_close(actual, expected, k=256, depth=8)


def test_dynamo_s_own_graph_is_not_changed() -> None:
    seen: list[tuple[str, str, list[fx.Node], list[fx.Node]]] = []

    def probe(gm: fx.GraphModule, args: list[Any]) -> Callable[..., Any]:
        before, nodes = gm.print_readable(print_output=False), list(gm.graph.nodes)
        compiled = backend(gm, args, options={"inner_backend": "eager"})
        after = gm.print_readable(print_output=False)
        seen.append((before, after, nodes, list(gm.graph.nodes)))
        return compiled

    model = frozen(Mlp())
    _check(model, torch.compile(model, backend=probe, fullgraph=True))
    ((before, after, nodes, nodes_after),) = seen
    assert before == after
    assert nodes == nodes_after
    assert report().plan.quantized


def _copy_(model: Mlp, new: Tensor) -> None:
    model.up.weight.copy_(new)


def _load_state_dict(model: Mlp, new: Tensor) -> None:
    model.load_state_dict({**model.state_dict(), "up.weight": new})


def _load_state_dict_assigning(model: Mlp, new: Tensor) -> None:
    model.load_state_dict({**model.state_dict(), "up.weight": new}, assign=True)
    model.requires_grad_(False)


def _replace_parameter(model: Mlp, new: Tensor) -> None:
    model.up.weight = nn.Parameter(new, requires_grad=False)


def _set_data(model: Mlp, new: Tensor) -> None:
    model.up.weight.data = new


def _write_elements(model: Mlp, new: Tensor) -> None:
    model.up.weight[:] = new


def _optimizer_step(model: Mlp, new: Tensor) -> None:
    model.up.weight.grad = model.up.weight - new
    torch.optim.SGD([model.up.weight], lr=1.0).step()


UPDATES = [
    _copy_,
    _load_state_dict,
    _load_state_dict_assigning,
    _replace_parameter,
    _set_data,
    _write_elements,
    _optimizer_step,
]


@pytest.mark.parametrize("update", UPDATES)
def test_a_weight_changed_after_compilation_is_noticed(update: Any) -> None:
    model = frozen(Mlp())
    compiled = finequant(model, granularity=64)
    before = compiled(X)
    with torch.no_grad():
        update(model, Mlp(seed=1).up.weight.detach().clone())
    assert not torch.allclose(compiled(X), before, rtol=0.1)
    _check(model, compiled)
    assert len(fqcompile.reports()) == 1


@pytest.mark.parametrize("update", UPDATES)
def test_a_changed_weight_is_noticed_in_every_graph_and_instance(update: Any) -> None:
    """Three graphs by number of rows; the update comes between their calls, and again."""
    models = [frozen(Mlp()), frozen(Mlp(seed=7))]
    compiled = [finequant(model, granularity=64, dynamic=False) for model in models]
    inputs = [X, X[:1], X[:3]]
    for seed in (1, 2):
        for run, x in ((run, x) for run in compiled for x in inputs):
            run(x)
        with torch.no_grad():
            update(models[0], Mlp(seed=seed).up.weight.detach().clone())
        for model, run in zip(models, compiled, strict=True):
            for x in inputs:
                _check(model, run, x)
    assert len(fqcompile.reports()) == 3


def test_ignored_updates_are_ignored_but_another_parameter_is_not() -> None:
    model = frozen(Mlp())
    compiled = finequant(model, granularity=64, weight_updates="ignore")
    before = compiled(X)
    new = Mlp(seed=1).up.weight.detach().clone()
    with torch.no_grad():
        model.up.weight.copy_(new)
    assert torch.equal(compiled(X), before)
    model.up.weight = nn.Parameter(new, requires_grad=False)
    _check(model, compiled)


def _with_outliers(model: Mlp) -> Mlp:
    """Weights with heavy tails are worth finer groups than the evenly spread ones of nn.Linear."""
    for linear in (model.up, model.down):
        linear.weight.copy_(torch.randn_like(linear.weight) ** 5 / 500)
    return model


def test_instances_whose_plans_differ_get_a_variant_each() -> None:
    even, outliers = frozen(Mlp(seed=0)), _with_outliers(frozen(Mlp(seed=1)))
    for model in (even, outliers):
        assert_close(finequant(model)(X), oracle(model)(X), k=256, depth=2)
    first, second = fqcompile.reports()
    assert second.graph == f"{first.graph}_variant_1"
    assert first.plan.site("up.weight").group_size != second.plan.site("up.weight").group_size
    # Both stay usable, and a third instance of either kind compiles nothing.
    for make, plan in ((Mlp(seed=2), first), (_with_outliers(frozen(Mlp(seed=3))), second)):
        third = frozen(make)
        assert_close(finequant(third)(X), oracle(third, plan)(X), k=256, depth=2)
    assert len(fqcompile.reports()) == 2


@pytest.mark.parametrize("broken_first", [True, False])
def test_an_instance_with_nan_keeps_only_its_own_weight(broken_first: bool) -> None:
    broken, good = frozen(Mlp(seed=0)), frozen(Mlp(seed=1))
    broken.up.weight[3, 2] = torch.nan
    order = (broken, good) if broken_first else (good, broken)
    results = {model: finequant(model, granularity=64)(X) for model in order}
    by_model = dict(zip(order, fqcompile.reports(), strict=True))
    assert quantized_names(by_model[good].sites) == {"up.weight", "down.weight"}
    assert quantized_names(by_model[broken].sites) == {"down.weight"}
    reason = by_model[broken].plan.site("up.weight").reason
    assert reason == "1 of 32768 values are NaN or infinite; the first is nan at (3, 2)"
    assert_close(results[good], oracle(good, by_model[good])(X), k=256, depth=2)
    assert bool(results[broken].isnan().all())


class Twice(nn.Module):
    """One weight behind two matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.proj(x)))


def test_a_weight_of_two_sites_and_two_graphs_is_packed_once(
    monkeypatch: pytest.MonkeyPatch, inner_graphs: InnerGraphs
) -> None:
    quantized: list[object] = []
    for owner, name in ((Part, "quantize"), (store, "find_or_quantize")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, f=original: quantized.append(args) or f(*args)
        )
    model = frozen(Twice())
    compiled = finequant(model, inner_backend="fqtest_spy", dynamic=False)
    for rows in (3, 4):
        x = torch.randn(rows, 128)
        assert_quantized_like_oracle(model, compiled(x), lambda m, x=x: m(x), depth=2)
    assert [len(r.sites) for r in fqcompile.reports()] == [1, 1]
    assert len(inner_graphs.linears()) == 4
    addresses = {ref().data_ptr() for packed in inner_graphs.packed for ref in packed}
    assert len(addresses) == 2  # codes and scales
    # The oracle quantizes for itself and is not counted: it does not go through the store.
    assert len(quantized) == 1


def test_calls_with_unchanged_weights_neither_decide_nor_pack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [frozen(Mlp(seed=seed)) for seed in range(2)]
    compiled = [finequant(model, granularity=64) for model in models]
    expected = [run(X) for run in compiled]
    calls: list[str] = []
    for name in ("packed", "plan"):
        original = getattr(STORE, name)
        monkeypatch.setattr(
            STORE, name, lambda *args, name=name, f=original: calls.append(name) or f(*args)
        )
    for _ in range(3):
        for run, y in zip(compiled, expected, strict=True):
            assert torch.equal(run(X), y)
    assert not calls
    models[0].up.weight.mul_(2)
    compiled[0](X)
    assert {"packed", "plan"} <= set(calls)


@pytest.mark.parametrize(
    "inner_backend",
    ["fqtest_spy", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_packed_weights_die_with_their_model(
    inner_backend: str, inner_graphs: InnerGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[weakref.ref[Tensor]] = []
    make = STORE.packed

    def remember(*args: Any) -> Any:
        result = make(*args)
        packed.extend(map(weakref.ref, result.tensors))
        return result

    monkeypatch.setattr(STORE, "packed", remember)
    model = frozen(Mlp())
    compiled = finequant(model, inner_backend=inner_backend)
    compiled(X)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.collect()
    assert packed
    assert all(ref() is not None for ref in packed)
    del model, compiled
    gc.collect()
    assert [ref for ref in weights if ref() is not None] == []
    assert [ref for ref in packed if ref() is not None] == []


def test_a_model_can_die_before_another_that_shares_its_graph() -> None:
    first, second = frozen(Mlp(seed=0)), frozen(Mlp(seed=1))
    compiled_first, compiled = (finequant(model, granularity=64) for model in (first, second))
    compiled_first(X)
    compiled(X)
    weights = [weakref.ref(parameter) for parameter in first.parameters()]
    del first, compiled_first
    gc.collect()
    assert [ref for ref in weights if ref() is not None] == []
    _check(second, compiled)


def test_first_calls_from_several_threads() -> None:
    models = [frozen(Mlp(seed=seed)) for seed in range(4)]
    compiled = [finequant(model, granularity=64) for model in models]
    inputs = [torch.randn(rows, 128) for rows in (2, 3, 2, 3)]
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        results[index] = compiled[index](inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, model in enumerate(models):
        assert_close(results[index], oracle(model)(inputs[index]), k=256, depth=2)


def test_a_deepcopy_has_packed_weights_of_its_own() -> None:
    model = frozen(Mlp())
    compiled = finequant(model, granularity=64)
    compiled(X)
    twin = copy.deepcopy(model)
    twin.up.weight.mul_(-1)
    _check(twin, finequant(twin, granularity=64))
    _check(model, compiled)
    assert len(fqcompile.reports()) == 1
