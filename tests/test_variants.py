"""Plans that differ from instance to instance: what is compiled for them, and how often at most."""

import logging

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.passes.variants import MOST_VARIANTS
from tests.helpers import Mlp, assert_close, finequant, frozen, oracle

X = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
SIZES = [(a, b) for a in (32, 64, 128, 256) for b in (32, 64, 128)]


def wants(group_size: int, n: int, k: int) -> Tensor:
    """A weight whose groups of this size differ, so that this is the size that is worth it."""
    if group_size == k:
        return (2 * torch.rand(n, k) - 1) / k**0.5
    magnitudes = torch.exp(0.6 * torch.randn(n, k // group_size))
    # without tails, for which finer groups would be worth it
    return torch.randn(n, k).clamp(-1.5, 1.5) * magnitudes.repeat_interleave(group_size, 1) / k**0.5


def block(up: int, down: int) -> nn.Module:
    model = frozen(Mlp(256, 512))
    model.up.weight.copy_(wants(up, 512, 256))
    model.down.weight.copy_(wants(down, 256, 512))
    return model


def sizes_of(plan: fqcompile.Plan) -> tuple[int | None, ...]:
    return tuple(site.group_size for site in plan.sites)


def test_twelve_siblings_of_many_plans_compile_a_bounded_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "fqcompile")
    blocks = [block(*sizes) for sizes in SIZES]
    with torch.no_grad():
        own = [fqcompile.explain(model, X) for model in blocks]
        assert len(set(map(sizes_of, own))) > MOST_VARIANTS + 1
        results = [finequant(model)(X) for model in blocks]
        again = [finequant(model)(X) for model in blocks]
    compiled = [report.plan for report in fqcompile.reports()]
    assert len(compiled) == MOST_VARIANTS
    for model, plan, y, y2 in zip(blocks, own, results, again, strict=True):
        assert torch.equal(y, y2)
        asked = sizes_of(plan)
        fits = [p for p in compiled if all(s <= a for s, a in zip(sizes_of(p), asked, strict=True))]
        plans = [p for p in compiled if sizes_of(p) == asked] or fits or compiled
        ways = [oracle(model, p) for p in plans]
        closest = min(ways, key=lambda way: float((way(X) - y).norm()))
        assert_close(y, closest(X), k=512, depth=2)
    (warning,) = [r.message for r in caplog.records]
    assert f"more than {MOST_VARIANTS} different sets of plans" in warning
    assert [warning in report.warnings for report in fqcompile.reports()].count(True) == 1


@pytest.mark.parametrize("options", [{"error_budget": 0.2}, {}])
def test_beyond_the_bound_what_no_plan_fits_runs_right(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight with NaN that every variant quantizes, and a budget that no other plan need meet."""
    monkeypatch.setattr("fqcompile.passes.variants.MOST_VARIANTS", 1)
    models = [block(32, 32), block(256, 128), block(64, 64)]
    if not options:
        models[1].up.weight[3, 2] = torch.nan
    with torch.no_grad():
        results = [finequant(model, **options)(X) for model in models]
        expected = [model(X) for model in models]
    first = fqcompile.reports()[0].plan
    assert_close(results[0], oracle(models[0], first)(X), k=512, depth=2)
    if options:
        assert_close(results[1], expected[1], k=512, depth=2)
        assert_close(results[2], expected[2], k=512, depth=2)
    else:
        assert bool(results[1].isnan().all())
        assert_close(results[2], oracle(models[2], first)(X), k=512, depth=2)
    assert len(fqcompile.reports()) == 2


class Blocks(nn.Sequential):
    """Each behind a graph break."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            torch._dynamo.graph_break()
            x = part(x)
        return x


def test_beyond_the_bound_rows_tell_of_the_plan_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fqcompile.passes.variants.MOST_VARIANTS", 1)
    model = Blocks(block(32, 32), block(64, 64))
    with torch.no_grad():
        actual = finequant(model, fullgraph=False)(X)
        (report,) = fqcompile.reports()
        assert_close(actual, oracle(model, report)(X), k=512, depth=4)
    assert [site.name for site in report.sites] == [
        f"{i}.{part}.weight" for i in (0, 1) for part in ("up", "down")
    ]
    assert sizes_of(report.plan) == (32,) * 4
    assert [site.relative_error is None for site in report.sites] == [False, False, True, True]


def test_beyond_the_bound_rows_tell_what_their_graph_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fqcompile.passes.variants.MOST_VARIANTS", 1)
    model = Blocks(block(32, 32), block(64, 64))
    model[0].up.weight[3, 2] = torch.nan
    with torch.no_grad():
        finequant(model, fullgraph=False)(X)
    (report,) = fqcompile.reports()
    first, second = report.plan.site("0.up.weight"), report.plan.site("1.up.weight")
    assert "NaN" in str(first.reason)
    assert "as many sets of plans" in str(second.reason) and second.status == "kept"


def test_beyond_the_bound_scales_of_another_type_are_no_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scales that 16 bits cannot hold must not reach a graph that was compiled for 16."""
    monkeypatch.setattr("fqcompile.passes.variants.MOST_VARIANTS", 1)
    models = [block(32, 32), block(64, 64)]
    models[1].up.weight.mul_(1e-6)
    with torch.no_grad():
        results = [finequant(model)(X) for model in models]
        assert_close(results[1], models[1](X), k=512, depth=2)
