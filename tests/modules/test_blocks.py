"""Models run block by block: the same inputs of weights as in one go, whatever connects blocks."""

import copy
import threading
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fqcompile.config import FineQuantConfig
from fqcompile.modules.blocks import BlockRuns, parts
from fqcompile.modules.calibrate import collect_inputs
from fqcompile.modules.weights import ModuleWeight, module_weights

WIDTH = 8


class Block(nn.Module):
    """Adds to what it is given, in place, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        self.calls += 1
        x += self.down(torch.relu(self.up(x + first)))
        return x


class Connected(nn.Module):
    """A scale beside a list, skip connections, one block that runs twice, and one that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.embed(x) * self.scale
        kept = [x := self.blocks[n](x.clone(), first) for n in (0, 1, 1)]
        if float(x.sum()) > 0:
            x = self.blocks[2](x.clone(), kept[0])
        return self.head(self.blocks[3](x + kept[1], first))


def model_and_batches() -> tuple[Connected, list[Tensor]]:
    torch.manual_seed(0)
    return Connected(), [torch.randn(5 + n, 4) for n in range(6)]


def weights_of(model: nn.Module) -> list[ModuleWeight]:
    return [w for w in module_weights(model, FineQuantConfig(min_elements=0)) if not w.reason]


class Seen(dict[str, list[Tensor]]):
    def __call__(self, weight: ModuleWeight, expert: int, x: Tensor) -> None:
        self.setdefault(weight.name, []).append(x.clone())


def rows(seen: Seen) -> dict[str, list[list[float]]]:
    """In no order of batches."""
    return {name: sorted(torch.cat(x).tolist()) for name, x in seen.items()}


@torch.no_grad()
def test_the_same_inputs_come_to_weights_as_in_one_go() -> None:
    model, batches = model_and_batches()
    expected, found, again = Seen(), Seen(), Seen()
    collect_inputs(model, batches, weights_of(model), expected)
    runs = BlockRuns(model)
    runs.collect(batches, weights_of(model), found)
    assert rows(found) == rows(expected)
    names = []
    for block in runs.blocks(batches):
        names.append(block.name)
        for _ in range(2):  # what blocks write to what they are given is not there the next time
            seen = Seen()
            block.collect(block.of(weights_of(model)), seen)
        again |= seen
    assert rows(again) == rows(expected)
    assert names == ["embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert all(block.calls == 0 for block in model.blocks)
    assert model(batches[0]).isfinite().all() and threading.active_count() < 4


class Casting(nn.Module):
    """Casts in a range of its own, multiplies beside its blocks, and makes tensors where told."""

    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.casts = casts
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        assert torch.empty(0).is_meta
        with torch.autocast("cpu", torch.bfloat16) if self.casts else nullcontext():
            for block in self.blocks:
                x = block(x)
            return functional.linear(x, self.blocks[0].weight)


@pytest.mark.parametrize("casts", ["caller", "model"])
@pytest.mark.parametrize("by_blocks", [True, False])
def test_autocast_and_the_default_device_are_those_of_the_caller(
    casts: str, by_blocks: bool
) -> None:
    model, batches, found = Casting(casts == "model"), model_and_batches()[1], Seen()
    first, second = copy.deepcopy(model.blocks).bfloat16()
    y = [first(x.bfloat16()) for x in batches]
    expected = {"blocks.0.weight": [*batches, *map(second, y)], "blocks.1.weight": y}
    with torch.autocast("cpu", torch.bfloat16, enabled=casts == "caller"), torch.device("meta"):
        model(batches[0])  # its casts of weights are kept until the end of the caller's range
        run = BlockRuns(model).collect if by_blocks else partial(collect_inputs, model)
        run(batches, weights_of(model), found)
        assert torch.is_autocast_cache_enabled()
    assert all(x.dtype == torch.bfloat16 for seen in found.values() for x in seen)
    for name, x in expected.items():
        rows_of = [torch.cat(one).bfloat16().sort(0)[0] for one in (found[name], x)]
        torch.testing.assert_close(*rows_of)


def test_what_a_block_is_replaced_by_is_what_batches_go_on_through() -> None:
    model, batches = model_and_batches()
    runs, seen = BlockRuns(model), Seen()
    runs.collect(batches, (), seen)
    for block in runs.blocks(batches):
        if block.name == "blocks.3":
            block.module.down.weight = nn.Parameter(torch.zeros_like(block.module.down.weight))
            block.module.down.bias = nn.Parameter(torch.zeros(WIDTH))
            block.collect(block.of(weights_of(model)), seen)
            given = torch.cat(seen["blocks.3.up.weight"])
        if block.name == "head":
            block.collect(block.of(weights_of(model)), seen)
    first = torch.cat([model.embed(batch) for batch in batches])
    torch.testing.assert_close(torch.cat(seen["head.weight"]) + first, given)


@pytest.mark.parametrize("fails", ["model", "consumer"])
def test_no_thread_is_left_where_something_fails(fails: str) -> None:
    model, batches = model_and_batches()
    before = threading.active_count()
    if fails == "model":
        batches[3] = torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match=r"shapes|enough"):
        runs = BlockRuns(model)
        runs.collect(batches, (), Seen())
        run = runs.blocks(batches)
        next(run)
        run.close()
        raise RuntimeError("enough")
    assert threading.active_count() == before


def test_blocks_are_elements_of_lists_and_what_else_has_parameters() -> None:
    nested: Any = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.Sequential(nn.Linear(2, 2))])
    model = nn.ModuleDict({"norm": nn.LayerNorm(2), "layers": nested, "free": nn.ReLU()})
    assert [name for name, _ in parts(model)] == ["norm", "layers.0.0", "layers.1"]
    assert [name for name, _ in parts(nn.Linear(2, 2))] == [""]
