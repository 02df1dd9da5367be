"""What DTensors may be besides a linear's evenly cut weight under no_grad."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fqcompile
from fqcompile.distributed.shards import local_part
from fqcompile.errors import FineQuantError
from fqcompile.quant.choose import quantize_weight
from tests.distributed.pair import Pair
from tests.distributed.sharded_models import Net, net
from tests.helpers import assert_close, finequant, frozen, report


def test_updates_are_noticed(pair: Pair) -> None:
    pair.run(update)


def update() -> None:
    """Powers of two change scales alone: the results double to the last bit."""
    model, x = net().first.up, torch.randn(3, 64)
    model.bias.data.zero_()
    # once ranks have compiled, they calibrate no parameter that takes the place of another
    compiled = finequant(model, min_elements=0, calibration=None)

    def check(times: int) -> None:
        for _ in range(2):  # a weight that changes before each call would be read as it comes
            assert torch.equal(compiled(x), times * first)

    with torch.no_grad():
        first = compiled(x)
        model.weight.mul_(2)
        check(2)
        local_part(model.weight).mul_(2)
        check(4)
        model.weight.mul_(2)
        check(8)
        model.weight = nn.Parameter(model.weight * 2, requires_grad=False)
        check(16)


def test_uneven_parts(pair: Pair) -> None:
    pair.run(run_uneven)


class Apart(nn.Module):
    """One linear whose weight is cut along `dim`, and whose x and result every rank has whole."""

    def __init__(self, rows: int, columns: int, dim: int) -> None:
        super().__init__()
        self.mesh, self.dim = init_device_mesh("cpu", (2,)), dim
        weight, bias = torch.randn(rows, columns), torch.randn(rows)
        own = [Shard(0) if dim == 0 else Replicate()]
        self.weight = nn.Parameter(distribute_tensor(weight, self.mesh, [Shard(dim)]), False)
        self.bias = nn.Parameter(distribute_tensor(bias, self.mesh, own), False)

    def forward(self, x: Tensor) -> Tensor:
        whole = DTensor.from_local(x, self.mesh, [Replicate()])
        cut = whole if self.dim == 0 else whole.redistribute(placements=[Shard(-1)])
        product = nn.functional.linear(cut, self.weight, self.bias)
        return product.redistribute(placements=[Replicate()]).to_local()


def run_uneven() -> None:
    for model in (Apart(5, 64, 0), Apart(16, 37, 1)):
        x = torch.randn(3, model.weight.shape[1])
        with torch.no_grad():
            actual = finequant(model, min_elements=0)(x)
            fqcompile.fake_quantize_(model, fqcompile.reports()[-1])
            assert_close(actual, model(x), k=64)
        (site,) = fqcompile.reports()[-1].plan.sites
        assert site.status == "quantized" and site.shape == local_part(model.weight).shape


def test_a_rank_without_a_part_keeps_it(pair: Pair) -> None:
    first, second = pair.run(run_empty)
    assert first == ("quantized", None)
    assert second[0] == "kept" and "nothing to quantize" in second[1]


def run_empty() -> tuple[str, str | None]:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mesh = init_device_mesh("cpu", (2,))
            weight = distribute_tensor(torch.randn(1, 64), mesh, [Shard(0)])
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            part: Any = self.weight
            return nn.functional.linear(x, part.to_local())

    with torch.no_grad():
        out = finequant(Local(), min_elements=0)(torch.randn(3, 64))
    assert out.shape == (3, 1 - dist.get_rank())
    (site,) = report().plan.sites
    return site.status, site.reason


def test_gradients_of_x_flow_through_frozen_parts(pair: Pair) -> None:
    pair.run(run_backward)


def run_backward() -> None:
    model, inputs = net(), torch.randn(3, 64)
    gradients = []
    for run in (finequant(model, min_elements=0, inner_backend="aot_eager"), None):
        if run is None:
            run = fqcompile.fake_quantize_(model, fqcompile.reports()[-1])
        x = inputs.clone().requires_grad_()
        y = run(x)
        y.square().sum().backward()
        gradients.append((y, x.grad))
    assert len(report().plan.quantized) == 5
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected, depth=4)


def test_trainable_parts_are_kept_with_the_reason(pair: Pair) -> None:
    pair.run(run_trainable)


def run_trainable() -> None:
    model = net().requires_grad_(True)
    finequant(model, min_elements=0)(torch.randn(3, 64)).sum().backward()
    assert not report().plan.quantized
    assert "requires grad" in str(report().plan.site("first.up.weight").reason)
    assert model.first.up.weight.grad is not None


def test_a_part_that_embeds_and_projects(pair: Pair) -> None:
    pair.run(run_tied)


class Tied(nn.Module):
    """An embedding of the whole, which is redistributed, and a head on this rank's part."""

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (2,))
        table = distribute_tensor(torch.randn(96, 64), mesh, [Shard(0)])
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        mesh = self.table.device_mesh  # type: ignore[attr-defined]
        whole = DTensor.from_local(ids, mesh, [Replicate()])
        x = nn.functional.embedding(whole, self.table)
        x = x.redistribute(placements=[Replicate()]).to_local()
        return nn.functional.linear(x, self.table.to_local())  # type: ignore[operator]


def run_tied() -> None:
    model, ids = frozen(Tied()), torch.arange(12).view(2, 6)
    with torch.no_grad():
        actual = finequant(model, min_elements=0)(ids)
        dense = model.table.full_tensor()  # type: ignore[operator]
        (head,) = report().plan.quantized
        assert (head.name, head.bits, head.shape) == ("table", 8, (48, 64))
        x = dense[ids]
        w_hat = quantize_weight(local_part(model.table), head.recipe.plan)  # type: ignore[arg-type]
        assert_close(actual, x @ w_hat.dequantize(torch.float32).T)
        with pytest.raises(FineQuantError, match="table is the weight of a linear and is read"):
            fqcompile.fake_quantize_(model, report())


def test_restore_makes_parts_dense_again(pair: Pair) -> None:
    pair.run(run_restored)


def run_restored() -> None:
    model, x = net(), torch.randn(3, 64)
    with torch.no_grad():
        fqcompile.quantize_(model, min_elements=0)
        packed = model(x)
        fqcompile.restore(model)
        assert type(local_part(model.first.up.weight)) is Tensor
        assert_close(model(x), packed, depth=4)


def test_explain_speaks_of_the_parts(pair: Pair) -> None:
    pair.run(run_explain)


def run_explain() -> None:
    model: Any = net()
    with torch.no_grad():
        plan = fqcompile.explain(model, torch.randn(3, 64), min_elements=0)
    assert plan.site("first.up.weight").shape == (64, 64)
    assert plan.site("first.down.weight").shape == (64, 64)
    assert plan.site("router.weight").shape == Net().router.weight.shape
    assert len(plan.quantized) == 5 and dist.get_world_size() == 2
