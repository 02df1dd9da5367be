"""A long run: python -m tests.soak [--calls 20000] [--models 300] [--minutes 10] [--no-forks]

    calls    one model, inputs of several sizes
    models   made, compiled, called, deleted: neither tables nor memory grow
    threads  three call, one quantizes, one writes to the weights and forks children

A fork waits for the calls to end, and for nothing else: the guards of Dynamo hold a lock of their
own, which a child of a process that forks meanwhile would wait for, whatever the backend.

Every result is compared with dense matmuls on dequantized weights.
"""

import argparse
import copy
import faulthandler
import gc
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.config import SiteOptions
from fqcompile.quant.choose import choose_and_quantize
from fqcompile.weights import dispatch
from fqcompile.weights.recipe import IDENTITY
from fqcompile.weights.store import STORE
from tests.helpers import Mlp, finequant, frozen, tolerance

K = 256
_MOST_GROWTH = 64 * 2**20  # of resident memory, between the first third of the models and the last
_CHILD_SECONDS = 120


def dequantized(model: nn.Module) -> nn.Module:
    """A copy with the values of codes in groups of 64, made without graph, store or cache."""
    expected = copy.deepcopy(model)
    for module in expected.modules():
        if isinstance(module, nn.Linear):
            options = SiteOptions(granularity=64)
            _, codes = choose_and_quantize(module.weight, options, torch.float16)
            module.weight.copy_(codes.dequantize(torch.float32))
    return expected


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    run: Callable[[Tensor], Tensor] = finequant(model, granularity=64, calibration=None)
    return run


def is_one_of(actual: Tensor, expected: list[Tensor]) -> bool:
    for one in expected:
        bound = tolerance(torch.float32, k=K, depth=2) * float(one.abs().max())
        if bool(((actual - one).abs() <= bound).all()):
            return True
    return False


def check(actual: Tensor, expected: list[Tensor], what: str) -> None:
    if not is_one_of(actual, expected):
        apart = min(float((actual - one).norm() / one.norm()) for one in expected)
        raise AssertionError(f"{what}: {apart:.3g} from the nearest result that would be right")


def make(seed: int) -> nn.Module:
    return frozen(Mlp(128, K, seed=seed))


def soak_calls(calls: int) -> None:
    """`calls` of one model, with 1 to 40 rows."""
    model = make(0)
    expected, run = dequantized(model), compiled(model)
    for call in range(calls):
        x = torch.randn(1 + call % 40, 128)
        check(run(x), [expected(x)], f"call {call}")


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def table_sizes() -> dict[str, int]:
    """What may not grow with models that are gone."""
    dispatches = list(dispatch._all_dispatches())
    return {
        "weights known": len(STORE._known),
        "weights with results": len(STORE._entries),
        "bindings": sum(len(d._table.bindings) for d in dispatches),
        "graphs": len(dispatches),
        "reports": len(fqcompile.reports()),
    }


def soak_models(models: int) -> None:
    """`models` are made, compiled, called three times and deleted."""
    sizes, memory = [], []
    for seed in range(models):
        model = make(seed)
        expected, run = dequantized(model), compiled(model)
        for _ in range(3):
            x = torch.randn(5, 128)
            check(run(x), [expected(x)], f"model {seed}")
        del model, expected, run
        gc.collect()
        sizes.append(table_sizes())
        memory.append(resident())
    third = max(1, models // 3)
    assert sizes[-1] == sizes[min(third, models - 1)], f"tables grow: {sizes[third]}, {sizes[-1]}"
    growth = max(memory[-third:]) - max(memory[:third])
    assert growth < _MOST_GROWTH, f"{growth / 2**20:.0f} MiB more after {models} models"


def ways_of(model: nn.Module) -> list[nn.Module]:
    """Each weight in codes, or as it is where the graph met another one in call after call."""
    codes = dequantized(model)
    ways = [copy.deepcopy(model) for _ in range(4)]
    for way, names in zip(ways, [(), ("up",), ("down",), ("up", "down")], strict=True):
        for name in names:
            way.get_submodule(name).load_state_dict(codes.get_submodule(name).state_dict())
    return ways


class Weights:
    """A model that one thread writes to, and what it computes between two writes.

    `number` is odd while a write is going on: a call that sees one number before and after it, and
    an even one, must give the result of that number.
    """

    def __init__(self) -> None:
        self.model = make(0)
        self.number = 0
        self._numbered: tuple[int, list[nn.Module]] = (0, ways_of(self.model))

    def write(self, seed: int) -> None:
        self.number += 1
        self.model.load_state_dict(make(seed).state_dict())
        self._numbered = (self.number + 1, ways_of(self.model))
        self.number += 1

    def check(self, run: Callable[[Tensor], Tensor], x: Tensor) -> bool:
        """One call; False where a write went on meanwhile, so that any mixture is right."""
        before = self.number
        y = run(x)
        numbered, ways = self._numbered
        if before % 2 or before != self.number or before != numbered:
            return False
        check(y, [way(x) for way in ways], f"after write {before // 2}")
        return True


def _in_child(weights: Weights, run: Callable[[Tensor], Tensor], seed: int) -> None:
    """In a forked child, whatever the other threads of its parent were doing: write, and call."""
    faulthandler.dump_traceback_later(_CHILD_SECONDS, exit=True)
    weights.number = 2 * seed
    weights.write(10_000 + seed)
    for _ in range(3):
        assert weights.check(run, torch.randn(5, 128))
    other = make(seed)
    x = torch.randn(5, 128)
    check(compiled(other)(x), [way(x) for way in ways_of(other)], "another model in the child")


def forked(
    weights: Weights, run: Callable[[Tensor], Tensor], seed: int, calls: list[threading.Lock]
) -> None:
    with ExitStack() as stack:
        for lock in calls:
            stack.enter_context(lock)
        child = os.fork()
    if not child:
        status = 1
        try:
            _in_child(weights, run, seed)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"child {seed} of a fork ended with status {status}"


def soak_threads(seconds: float, forks: bool) -> Counter[str]:
    """Threads call and quantize, this one writes and forks; how often each was done."""
    weights = Weights()
    run = compiled(weights.model)
    done: Counter[str] = Counter()
    for rows in (1, 5):
        done["calls checked"] += weights.check(run, torch.randn(rows, 128))
    end = time.monotonic() + seconds
    errors: list[BaseException] = []
    calls = [threading.Lock() for _ in range(3)]

    def call(rows: int, calling: threading.Lock) -> None:
        try:
            while time.monotonic() < end and not errors:
                with torch.no_grad(), calling:
                    counted = weights.check(run, torch.randn(rows, 128))
                done["calls checked" if counted else "calls during a write"] += 1
        except BaseException as error:
            errors.append(error)

    def quantize() -> None:
        # A child could wait forever for PyTorch's lock of the generator that all share.
        generator = torch.Generator()
        while time.monotonic() < end and not errors:
            w = torch.randn(256, 256, generator=generator)
            STORE.plan(IDENTITY, (w,), SiteOptions(), torch.float16)
            done["quantized"] += 1

    threads = [
        threading.Thread(target=call, args=pair) for pair in zip((1, 5, 5), calls, strict=True)
    ]
    threads.append(threading.Thread(target=quantize))
    for thread in threads:
        thread.start()
    try:
        seed = 0
        while time.monotonic() < end and not errors:
            seed += 1
            weights.write(seed)
            done["writes"] += 1
            if forks and seed % 5 == 0:
                forked(weights, run, seed, calls)
                done["forks"] += 1
            time.sleep(0.02 * (seed % 4))
    except BaseException as error:
        errors.append(error)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return done


def main(arguments: list[str]) -> None:
    """Run the parts that are asked for; raises at the first wrong result."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--models", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--no-forks", dest="forks", action="store_false")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the pool of a library that runs on several does not survive a fork
    parts: list[tuple[str, Callable[[], Any]]] = [
        (f"{chosen.calls} calls", lambda: soak_calls(chosen.calls)),
        (f"{chosen.models} models", lambda: soak_models(chosen.models)),
        (
            f"threads for {chosen.minutes:g} minutes",
            lambda: dict(soak_threads(60 * chosen.minutes, chosen.forks)),
        ),
    ]
    for name, part in parts:
        start = time.monotonic()
        with torch.no_grad():
            result = part()
        print(f"{name}: right, {time.monotonic() - start:.0f} s {result or ''}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
