"""What cannot work over several ranks ends with an error that says so, on all of them, in time."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fqcompile
from fqcompile.distributed import ranks
from fqcompile.errors import FineQuantError, OptionError, RankError, ShardingError
from tests.distributed.pair import Pair
from tests.distributed.sharded_models import Net, net
from tests.helpers import finequant, frozen, report

LIMIT = 20.0


def _message(run: object, *kinds: type[Exception]) -> str:
    """Of the error that the call ends with."""
    begin = time.monotonic()
    with torch.no_grad(), pytest.raises(Exception) as caught:
        run(torch.randn(3, 64))  # type: ignore[operator]
    assert time.monotonic() - begin < LIMIT
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, kinds or FineQuantError), inner
    return str(inner)


@pytest.mark.parametrize("way", ["fsdp1", "fsdp2"])
def test_fsdp_is_refused_with_the_alternative(pair: Pair, way: str) -> None:
    pair.run(compile_fsdp, way)


def compile_fsdp(way: str) -> None:
    model = frozen(Net())
    if way == "fsdp1":
        wrapped: nn.Module = FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True
        )
    else:
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    texts = [_message(finequant(wrapped, fullgraph=False), ShardingError)]
    with pytest.raises(ShardingError) as caught:
        fqcompile.quantize_(wrapped)
    for text in [*texts, str(caught.value)]:
        assert "FSDP" in text and "parallelize_module" in text and "up.weight" in text, text


def test_unlike_options_are_named(pair: Pair) -> None:
    for text in pair.run(compile_with_unlike_options):
        assert "'option bits'" in text and "0 has 4" in text and "1 has 8" in text, text


def compile_with_unlike_options() -> str:
    return _message(finequant(net(), bits=(4, 8)[dist.get_rank()], min_elements=0), RankError)


def test_unlike_graphs_are_named(pair: Pair) -> None:
    for text in pair.run(compile_unlike_graphs):
        assert "collectives" in text and "redistribute" in text


def compile_unlike_graphs() -> str:
    model = net()
    run = model if dist.get_rank() else model.first
    return _message(finequant(run, min_elements=0), RankError)


def test_unlike_kernels_of_a_whole_weight_are_named(pair: Pair) -> None:
    for text in pair.run(compile_with_unlike_whole_weights):
        assert "router.weight" in text and "kept: " in text and "kernel x86" in text


def compile_with_unlike_whole_weights() -> str:
    """What is whole on every rank must be one and the same; a rank's own part need not."""
    model = net()
    nan_here = model.first.up.weight._local_tensor
    if dist.get_rank():
        nan_here[0, 0] = torch.nan
        model.router.weight[0, 0] = torch.nan
    return _message(finequant(model, min_elements=0), RankError)


def test_a_failed_pass_on_one_rank_is_known_to_all(
    pair: Pair,
) -> None:
    for text in pair.run(compile_with_a_failure):
        assert "pass 'fuse' failed" in text and "broken here" in text


def compile_with_a_failure() -> str:
    from fqcompile.passes import pipeline

    def fail(state: object) -> int:
        raise RuntimeError("broken here")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank():
            patch.setitem(pipeline.PASSES, "fuse", fail)
        return _message(finequant(net(), min_elements=0), RankError)


def test_parts_may_be_quantized_apart(pair: Pair) -> None:
    statuses = pair.run(compile_with_one_bad_part)
    assert statuses == ["quantized", "kept"]


def compile_with_one_bad_part() -> str:
    model = net()
    if dist.get_rank():
        model.first.up.weight._local_tensor[0, 0] = torch.nan
    with torch.no_grad():
        finequant(model, min_elements=0)(torch.randn(3, 64))
    return report().plan.site("first.up.weight").status


def test_a_rank_that_never_compiles_is_named(pair: Pair) -> None:
    text, nothing = pair.run(compile_alone)
    pair.close()  # its ranks are out of step from now on
    assert "rank 1 has not come that far in 2 s" in text and nothing is None


def compile_alone() -> str | None:
    model = net()
    if dist.get_rank():
        return None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ranks.TIMEOUT, "2")
        return _message(finequant(model, min_elements=0), RankError)


@pytest.mark.parametrize("kind", [pytest.param("file", marks=pytest.mark.slow), "tcp"])
def test_what_ranks_tell_each_other_does_not_pile_up(pair: Pair, kind: str, tmp_path: Path) -> None:
    """However many graphs there are, the store holds two rounds of each rank at the most."""
    for counts in pair.run(agree_often, kind, str(tmp_path / "store"), _free_port()):
        assert max(counts) - min(counts) <= 2 * 2 * 2, counts


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def agree_often(kind: str, path: str, port: int) -> list[int]:
    """The numbers of keys in the store, where every fifth graph is unlike."""
    own = dist.get_rank()
    store = (
        dist.FileStore(path, 2)
        if kind == "file"
        else dist.TCPStore("127.0.0.1", port, 2, is_master=own == 0)
    )
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "default_store", lambda: dist.PrefixStore("x", store))
        for number in range(40):
            facts = {"some": "x" * 1000, "number": str(number + own * (number % 5 == 4))}
            if number % 5 == 4:
                with pytest.raises(RankError, match="'number' rank"):
                    ranks.agree("a graph", facts, [(0, 1)])
            else:
                ranks.agree("a graph", facts, [(0, 1)])
            counts.append(store.num_keys())
        dist.barrier()  # the one that has the store ends last
    return counts


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_wrong_time_limit_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.TIMEOUT, text)
    with pytest.raises(OptionError, match=ranks.TIMEOUT):
        ranks._seconds()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before it compiles", "while it runs"])
def test_the_others_end_when_one_is_killed(when: str) -> None:
    both = Pair()
    try:
        (good, text), (lives, _) = both.outcomes(outlive, when, seconds=2 * LIMIT)
        assert good and not lives, text
        assert ("rank 1 has not come" if when == "before it compiles" else "onnection") in text, (
            text
        )
    finally:
        both.close()


def outlive(when: str) -> str:
    """Rank 1 kills itself; rank 0 says what it then gets."""
    model = finequant(net(), min_elements=0)
    os.environ[ranks.TIMEOUT] = "2"
    if when == "while it runs":
        with torch.no_grad():
            model(torch.randn(3, 64))
    if dist.get_rank():
        os.kill(os.getpid(), signal.SIGKILL)
    return _message(model, RankError, RuntimeError)
