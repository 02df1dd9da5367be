"""Weights that are others in every call are read as they come; an update now and then is packed."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.passes.plan import CHANGING
from fqcompile.weights import dispatch
from tests.helpers import Mlp, assert_close, finequant, frozen, oracle

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


class Cache(nn.Module):
    """Keys that are written in one graph and multiplied with in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(128, 128)
        self.register_buffer("keys", torch.zeros(256, 128))

    def forward(self, x: Tensor) -> Tensor:
        q = self.proj(x)
        torch._dynamo.graph_break()
        self.write(q)
        return q @ self.keys.mT

    @torch._dynamo.disable
    def write(self, q: Tensor) -> None:
        self.keys.copy_(torch.randn(256, 128) + q[0])


class FastWeight(nn.Module):
    """Its weight is another tensor in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(128, 128)
        self.fast = torch.randn(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) @ self.fast.mT


class Offloaded(nn.Module):
    """A hook brings the weight for each call, as accelerate's do."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(128, 256)
        self.home = {name: p.detach().clone() for name, p in self.proj.named_parameters()}

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)

    def bring(self) -> None:
        for name, value in self.home.items():
            setattr(self.proj, name, nn.Parameter(value.clone(), requires_grad=False))


def _prepare(model: nn.Module) -> None:
    if isinstance(model, FastWeight):
        model.fast = torch.randn(256, 128)
    if isinstance(model, Offloaded):
        model.bring()


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    made: list[object] = []
    bind = dispatch.WeightDispatch.bind
    monkeypatch.setattr(
        dispatch.WeightDispatch, "bind", lambda self, *args: made.append(self) or bind(self, *args)
    )
    return made


@pytest.mark.parametrize(
    ("make", "name", "calls"),
    [(Cache, "keys", 2), (FastWeight, "fast", 4), (Offloaded, "proj.weight", 4)],
)
def test_a_weight_that_changes_in_every_call_is_kept(
    make: Callable[[], nn.Module],
    name: str,
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "fqcompile")
    model = frozen(make())
    fixed = [] if make is Offloaded else ["proj"]
    compiled = finequant(model, fullgraph=False, granularity=64, exclude=fixed)
    for call in range(8):
        made = _counted(monkeypatch)
        _prepare(model)
        torch.manual_seed(call)
        y = compiled(X)
        if call >= calls:
            torch.manual_seed(call)
            assert_close(y, model(X))
            assert not made or call == calls
        monkeypatch.undo()
    last = fqcompile.reports()[-1]
    (reason,) = {s.reason for s in last.sites if s.name.endswith(name)}
    assert reason == CHANGING
    (warning,) = [r.message for r in caplog.records]
    assert name in warning and "name it in exclude" in warning and "quantize_(model)" in warning
    assert warning in last.warnings


def test_packed_weights_that_a_hook_replaces_in_every_call_are_no_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = frozen(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)))
    options: dict[str, Any] = {"granularity": 64, "calibration": None}
    plan = fqcompile.quantize_(copy.deepcopy(model), **options)
    expected = oracle(model, plan)(X)
    fqcompile.quantize_(model, **options)
    home = {name: dict(model[int(name)].named_parameters()) for name in "02"}
    compiled = finequant(model)
    caplog.set_level(logging.WARNING, "fqcompile")
    for _ in range(8):
        for name, held in home.items():
            weight = type(held["weight"])(held["weight"], requires_grad=False)
            model[int(name)].weight = weight
        assert_close(compiled(X), expected, k=256, depth=2)
    assert not caplog.records and not fqcompile.reports()[-1].plan.kept


@pytest.mark.parametrize("calls", [2, 5])
def test_an_update_after_calls_without_one_is_packed_each_time(calls: int) -> None:
    model = frozen(Mlp())
    compiled = finequant(model, granularity=64)
    for seed in range(6):
        model.load_state_dict(Mlp(seed=seed).state_dict())
        for _ in range(calls):
            y = compiled(X)
        assert_close(y, oracle(model)(X), k=256, depth=2)
    assert len(fqcompile.reports()) == 1


def test_models_that_are_called_once_and_deleted_are_no_change() -> None:
    for seed in range(4):
        model = frozen(Mlp(seed=seed))
        assert_close(finequant(model, granularity=64)(X), oracle(model)(X), k=256, depth=2)
    assert len(fqcompile.reports()) == 1


def test_sixteen_siblings_that_share_a_graph_are_no_change() -> None:
    model = frozen(nn.Sequential(*(Mlp(seed=seed) for seed in range(16))))
    for block in model:
        block.compile(backend="finequant", options={"inner_backend": "eager", "granularity": 64})
    for seed in range(2):
        model(X)
        model.load_state_dict(nn.Sequential(*(Mlp(seed=seed) for _ in range(16))).state_dict())
        model(X)
        model(X)
    assert [len(report.plan.kept) for report in fqcompile.reports()] == [0]


def _changed_twice(**options: Any) -> tuple[nn.Module, Any]:
    model = frozen(Mlp())
    compiled = finequant(model, granularity=64, **options)
    for seed in range(3):
        model.load_state_dict(Mlp(seed=seed).state_dict())
        y = compiled(X)
    assert_close(y, model(X), k=256, depth=2)
    return model, compiled


def test_weights_that_come_to_rest_are_quantized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_CALLS_AS_THEY_COME", 10)
    model, compiled = _changed_twice()
    plan = fqcompile.reports()[0].plan
    for _ in range(9):
        y = compiled(X)
    assert_close(y, model(X), k=256, depth=2)
    for _ in range(3):
        y = compiled(X)
    assert_close(y, oracle(model, plan)(X), k=256, depth=2)
    assert len(fqcompile.reports()) == 2


def test_refresh_quantizes_again_what_was_read_as_it_comes() -> None:
    model, compiled = _changed_twice()
    fqcompile.refresh(model)
    assert_close(compiled(X), oracle(model, fqcompile.reports()[0])(X), k=256, depth=2)


def test_kept_weights_are_live_in_every_way_of_writing() -> None:
    model, compiled = _changed_twice()
    model.up.weight.data.mul_(2)
    assert_close(compiled(X), model(X), k=256, depth=2)
    model.up.weight = nn.Parameter(torch.randn(256, 128), requires_grad=False)
    assert_close(compiled(X), model(X), k=256, depth=2)
