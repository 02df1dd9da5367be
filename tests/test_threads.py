"""Any number of threads call, compile first, bind new weights and write to them at once."""

import copy
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.config import SiteOptions
from fqcompile.modules import quantize as quantize_module
from fqcompile.quant.choose import choose_and_quantize
from fqcompile.weights.fingerprint import ATTEMPTS
from tests.helpers import Mlp, assert_close, finequant, frozen, oracle, tolerance

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


def run_all(tasks: list[Callable[[], object]]) -> None:
    """Each in a thread of its own, begun together; raises what one of them raises."""
    errors: list[BaseException] = []
    begin = threading.Barrier(len(tasks))

    def work(task: Callable[[], object]) -> None:
        begin.wait()
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def with_outliers(model: nn.Module) -> nn.Module:
    """Weights with heavy tails ask for finer groups than the evenly spread ones of nn.Linear."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.randn_like(parameter) ** 5 / 500
    return model


def planned(model: nn.Module) -> nn.Module:
    """The model with the dequantized values of the plans that its own weights ask for."""
    with torch.no_grad():
        return oracle(model, fqcompile.explain(model, X))


def is_close(actual: Tensor, expected: Tensor, k: int) -> bool:
    bound = tolerance(torch.float32, k=k, depth=2) * expected.abs().max()
    return bool(((actual - expected).abs() <= bound).all())


@pytest.mark.few(4)
@pytest.mark.parametrize("seed", range(20))
def test_thirty_updates_while_three_threads_call(seed: int) -> None:
    """No codes of values that were written over stay in use, whenever the writes come."""
    model = frozen(Mlp(256, 512))
    compiled = finequant(model, granularity=64)
    new = [Mlp(256, 512, seed=number).state_dict() for number in range(30)]
    pauses = torch.rand(30, generator=torch.Generator().manual_seed(seed)).div(100).tolist()
    x = torch.randn(5, 256)
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            compiled(x)

    def update() -> None:
        try:
            for state, pause in zip(new, pauses, strict=True):
                time.sleep(pause)
                model.load_state_dict(state)
        finally:
            done.set()

    run_all([call, call, call, update])
    # A weight that changed in call after call is read as it comes.
    ways = [copy.deepcopy(model) for _ in range(4)]
    quantized = oracle(model, fqcompile.reports()[0])
    for way, names in zip(ways, [(), ("up",), ("down",), ("up", "down")], strict=True):
        for name in names:
            way.get_submodule(name).load_state_dict(quantized.get_submodule(name).state_dict())
    for _ in range(3):
        y = compiled(x)
        assert any(is_close(y, way(x), k=512) for way in ways)


def _called_while_others_trace(compiled: Any) -> Tensor:
    """PyTorch refuses compiled calls of all threads while one of them traces for AOTAutograd."""
    while True:
        try:
            return cast(Tensor, compiled(X))
        except RuntimeError as error:
            if "using FX to symbolically trace" not in str(error):
                raise


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager"])
def test_eight_threads_ask_for_plans_that_are_not_compiled(inner_backend: str) -> None:
    """After a warm-up: variants are compiled in calls, where Dynamo does not lock."""
    first = frozen(Mlp())
    finequant(first, inner_backend=inner_backend)(X)
    models = [frozen(Mlp(seed=seed)) for seed in range(8)]
    for model in models[1::2]:
        with_outliers(model)
    for model in models[2::4]:
        model.up.weight[3, 2] = torch.nan
    compiled = [finequant(model, inner_backend=inner_backend) for model in models]
    results: dict[int, Tensor] = {}

    def call(index: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(3):
                results[index] = _called_while_others_trace(compiled[index])

        return run

    run_all([call(index) for index in range(8)])
    warnings = [text for report in fqcompile.reports() for text in report.warnings]
    assert not warnings
    for index, model in enumerate(models):
        if index in range(2, 8, 4):
            assert bool(results[index].isnan().all())
        else:
            assert_close(results[index], planned(model)(X), k=256, depth=2)


def test_what_a_thread_writes_while_a_model_is_packed_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = quantize_module.find_or_quantize
    model = frozen(nn.Sequential(nn.Linear(128, 256, bias=False)))
    new = torch.randn(256, 128)
    writes = iter([True])

    def written_meanwhile(*args: Any) -> Any:
        entry = make(*args)
        if next(writes, False):
            model[0].weight.copy_(new)
        return entry

    monkeypatch.setattr(quantize_module, "find_or_quantize", written_meanwhile)
    fqcompile.quantize_(model, granularity=64)
    _, expected = choose_and_quantize(new, SiteOptions(granularity=64), torch.float16)
    assert torch.equal(model[0].weight.quantized().qweight, expected.qweight)


def test_a_weight_that_is_written_all_the_time_is_not_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = quantize_module.find_or_quantize
    model = frozen(nn.Sequential(nn.Linear(128, 256, bias=False)))
    calls: list[object] = []

    def written_meanwhile(*args: Any) -> Any:
        entry = make(*args)
        calls.append(model[0].weight.mul_(2))
        return entry

    monkeypatch.setattr(quantize_module, "find_or_quantize", written_meanwhile)
    want = model[0].weight * 2**ATTEMPTS
    plan = fqcompile.quantize_(model, granularity=64)
    assert len(calls) == ATTEMPTS
    assert "another thread changed the weight" in str(plan.sites[0].reason)
    assert torch.equal(model[0].weight, want)


_FIRST_USE = """
import threading, torch
begin = threading.Barrier(8)
failed = []
def compile():
    begin.wait()
    try:
        torch.compile(torch.nn.Linear(4, 4), backend="finequant")
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=compile) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not failed, failed
assert "finequant" in torch._dynamo.list_backends()
"""


@pytest.mark.slow
@pytest.mark.parametrize("imported", ["", "import fqcompile"])
def test_the_backend_is_known_once_to_threads_that_use_it_first(imported: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", imported + _FIRST_USE], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
