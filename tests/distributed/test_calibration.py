"""Two ranks calibrate one model as one rank does: equal h of what both have, parts of the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.passes.probe import Probe, ProbeError
from fqcompile.report import Site, clear_reports
from tests.distributed.pair import Pair
from tests.distributed.sharded_models import GATHERS_STRIDED, net, sharded, whole
from tests.helpers import finequant

ROUNDING = 2.0**-7  # the sums of two ranks, and h to eight bits
Found = dict[str, tuple[Tensor | None, str | None, int | None]]


def _found(sites: tuple[Site, ...]) -> Found:
    plans: dict[str, Any] = {s.name: s.recipe.plan for s in sites if s.bits == 4}  # type: ignore[union-attr]
    rows = {s.name: (s.calibration, s.calibration_rows) for s in sites}
    return {name: (plan.calibration.h, *rows[name]) for name, plan in plans.items()}


def _compiled(model: nn.Module) -> Found:
    torch._dynamo.reset()
    clear_reports()
    with torch.no_grad():
        compiled = finequant(model, min_elements=0, granularity=32, dynamic=True)
        compiled(torch.arange(1, 15).view(2, 7), use_cache=False)
    return _found(fqcompile.reports()[-1].sites)


def on_ranks(name: str, way: str, folder: Path, compiles: bool) -> Found:
    model = sharded(name, torch.float32, folder, way)
    if compiles:
        return _compiled(model)
    return _found(fqcompile.quantize_(model, min_elements=0, granularity=32).sites)


@pytest.mark.few(2)
@pytest.mark.parametrize("compiles", [True, False], ids=["compile", "quantize_"])
@pytest.mark.parametrize(
    ("name", "way"), [("llama", "tp"), pytest.param("mixtral", "tp", marks=GATHERS_STRIDED)]
)
def test_ranks_get_the_h_of_the_whole_model(
    pair: Pair, tmp_path: Path, name: str, way: str, compiles: bool
) -> None:
    first, second = pair.run(on_ranks, name, way, tmp_path, compiles)
    alone = _compiled(whole(name, torch.float32))
    assert first.keys() == second.keys() and len(first) > 6
    for weight, (h, source, rows) in first.items():
        other, *_ = second[weight]
        exact = alone.get(weight, (None,))[0]
        assert h is not None and other is not None and exact is not None, (weight, source)
        assert source == "synthetic" and rows and rows % 512 == 0, weight
        if h.shape[-1] < exact.shape[-1]:
            h = torch.cat([h, other], -1)
        else:
            assert torch.equal(h, other), weight
        torch.testing.assert_close(h, exact, rtol=ROUNDING, atol=0, msg=weight)


def fail_on_one(_: object) -> tuple[list[str | None], str]:
    run = Probe.run

    def broken(self: Probe, *args: Any, **options: Any) -> Any:
        found = run(self, *args, **options)
        if torch.distributed.get_rank() == 1:
            raise ProbeError("no luck")
        return found

    Probe.run = broken  # type: ignore[method-assign]
    try:
        torch._dynamo.reset()
        clear_reports()
        with torch.no_grad():
            finequant(net(), min_elements=0)(torch.randn(3, 64))
    finally:
        Probe.run = run  # type: ignore[method-assign]
    found = fqcompile.reports()[-1]
    return [s.calibration for s in found.sites], "\n".join(found.warnings)


def test_where_one_rank_fails_none_is_calibrated(pair: Pair) -> None:
    for texts, warnings in pair.run(fail_on_one, None):
        assert set(texts) == {"none: on rank 1: no luck"} and "on rank 1: no luck" in warnings
