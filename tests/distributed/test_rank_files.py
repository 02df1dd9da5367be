"""What ranks write and show: caches and tables that they share, a folder of dumps each, one bar."""

import io
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fqcompile.config import SiteOptions
from fqcompile.distributed.ranks import own_folder, progress
from fqcompile.kernels.tuning.launches import search
from fqcompile.kernels.tuning.table import TunedTable
from fqcompile.quant.choose import choose_and_quantize
from fqcompile.weights.disk_cache import DiskCache, Entry
from tests.distributed.pair import Pair
from tests.distributed.sharded_models import net
from tests.helpers import finequant
from tests.kernels.tuning.fake import FAST, SPEC, TEMPLATE, FakeMeasure


def test_ranks_tune_once(pair: Pair, tmp_path: Path) -> None:
    (one, best), (other, best_too) = pair.run(tune, tmp_path / "table.json")
    assert sorted([one, other]) == [0, len(FAST)] and best == best_too == str(FAST[-1])


def tune(path: Path) -> tuple[int, str]:
    measure = FakeMeasure(seconds=0.02)
    table = TunedTable.load(path, {"gpu": "some"})
    dist.barrier()
    case, problem = search(TEMPLATE, SPEC, 16, "fast", measure, table)
    assert problem is None and case.best is not None
    return len(measure.tried), str(case.best.config)


def test_a_table_that_cannot_be_locked_is_searched_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    measure = FakeMeasure()
    table = TunedTable.load(tmp_path / "file" / "table.json", {"gpu": "some"})
    case, problem = search(TEMPLATE, SPEC, 16, "fast", measure, table)
    assert problem is None and measure.tried == list(FAST) and case.best is not None


def test_ranks_share_one_cache_of_weights(pair: Pair, tmp_path: Path) -> None:
    results = pair.run(fill_cache, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(list(tmp_path.glob("*.safetensors"))) == 12
    assert not list(tmp_path.glob("*.part"))


def fill_cache(directory: Path) -> list[torch.Tensor]:
    """Both at once, the one from the first weight on and the other from the last."""
    cache = DiskCache(directory, 1 << 30)
    weights = [torch.randn(64, 64) for _ in range(12)]
    order = range(12) if dist.get_rank() else range(11, -1, -1)
    options = SiteOptions()
    dist.barrier()

    def make(number: int) -> Entry:
        return choose_and_quantize(weights[number], options, torch.float32)

    found = {n: cache.get_or_make(f"{n:064x}", lambda n=n: make(n)) for n in order}
    assert cache.hits + cache.misses == 12
    return [found[number][1].qweight for number in range(12)]


def test_each_rank_has_a_folder_of_dumps(pair: Pair, tmp_path: Path) -> None:
    pair.run(dump, tmp_path)
    for rank in (0, 1):
        (graph,) = (tmp_path / f"rank_{rank}").iterdir()
        assert "up.weight" in (graph / "sites.txt").read_text()
    assert own_folder(tmp_path) == tmp_path  # one process alone


def dump(folder: Path) -> None:
    with torch.no_grad():
        finequant(net(), min_elements=0, debug_dir=str(folder))(torch.randn(3, 64))


class Terminal(io.StringIO):
    """A standard error that says it is one."""

    def isatty(self) -> bool:
        return True


def test_only_the_first_rank_shows_a_bar(pair: Pair) -> None:
    first, second = pair.run(show)
    assert "work" in first and second == ""


def show() -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal := Terminal())
        assert list(progress(range(3), "work")) == [0, 1, 2]
    return terminal.getvalue()
