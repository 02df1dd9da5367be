"""Writes that neither versions nor addresses show, and what a compiled model keeps alive."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.weights.store import WeightStore
from tests.helpers import Mlp, assert_close, finequant, frozen, oracle, report

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


def check(call: Callable[[Tensor], Tensor], model: nn.Module) -> None:
    """The compiled model is the dequantized one of the weights as they are now."""
    plan = fqcompile.explain(model, X)
    assert len(plan.quantized) == 2
    with torch.no_grad():
        for _ in range(2):  # a weight that changes before each call would be read as it comes
            assert_close(call(X), oracle(model, plan)(X), k=256, depth=2)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_steps_of_fused_optimizers_are_seen(name: str) -> None:
    """Their kernels on a CPU do not count the parameters' versions up."""
    model = Mlp()
    call = finequant(model)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        check(call, model)
        for _ in range(2):
            optimizer.zero_grad()
            (model(X) - 1).pow(2).mean().backward()
            optimizer.step()
    check(call, model)


def test_new_values_in_the_old_place_are_seen() -> None:
    """Other memory at the same address, as allocators give it: here an array's, twice."""
    model = frozen(Mlp())
    arrays = {weight: weight.numpy().copy() for weight in model.parameters()}
    for weight, array in arrays.items():
        weight.data = torch.from_numpy(array)
    call = finequant(model)
    check(call, model)
    for weight, array in arrays.items():
        weight.data = torch.empty(0)
        array *= -1.7
        weight.data = torch.from_numpy(array)
    check(call, model)


def test_refresh_reaches_weights_that_are_being_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The write and `refresh` come after the first layer was packed, and before the last."""
    model = frozen(Mlp())
    call = finequant(model)
    check(call, model)
    one_packed, written = threading.Event(), threading.Event()
    packed = WeightStore.packed

    def slow(self: WeightStore, *args: Any) -> Any:
        result = packed(self, *args)
        if threading.current_thread() is thread and not one_packed.is_set():
            one_packed.set()
            written.wait(30)
        return result

    monkeypatch.setattr(WeightStore, "packed", slow)
    thread = threading.Thread(target=lambda: torch.no_grad()(call)(X))
    with torch.no_grad():
        model.up.weight.copy_(torch.randn_like(model.up.weight) * 0.1)
        thread.start()
        assert one_packed.wait(30)
        for weight in model.parameters():
            weight.data.mul_(-1.7)
        fqcompile.refresh(model)
    written.set()
    thread.join()
    check(call, model)


class Breaks(nn.Module):
    """Carries its own weight over a graph break, as peft's DoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(128, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        torch._dynamo.graph_break()
        return x @ weight.T


def test_a_models_own_weight_is_quantized_behind_a_graph_break() -> None:
    model = frozen(Breaks())
    call = finequant(model, fullgraph=False)
    actual = call(X)
    (site,) = report().plan.quantized
    assert site.name == "proj.weight"
    assert_close(actual, oracle(model, report().plan)(X), k=128)


def test_compiled_models_die_with_their_last_reference() -> None:
    """Without the garbage collector: a cycle would keep weights and inputs until it runs."""
    gc.collect()
    gc.disable()
    try:
        alive = []
        for seed in range(5):
            model = frozen(Mlp(seed=seed))
            call = finequant(model)
            call(X)
            model.up.weight.add_(0.5)
            call(X)
            alive.append(weakref.ref(model.up.weight))
            del model, call
        # Dynamo itself keeps the last frame it compiled for.
        assert sum(ref() is not None for ref in alive) <= 1
    finally:
        gc.enable()
