"""save over two ranks and load on another number of them, and what forbids it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fqcompile
from fqcompile.checkpoint.manifest import read_manifest
from fqcompile.distributed.shards import local_part
from fqcompile.errors import CheckpointError, RankError
from fqcompile.weights.parameter import PackedWeight
from tests.distributed.pair import Pair
from tests.distributed.sharded_models import GATHERS_STRIDED, Net, net, sharded, whole
from tests.distributed.test_sharded_quantize import dense_values
from tests.helpers import assert_close

CASES = [("llama", "tp"), pytest.param("mixtral", "tp", marks=GATHERS_STRIDED), ("qwen3-moe", "ep")]


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "way"), CASES)
def test_what_two_ranks_saved_loads_on_two_and_on_one(
    pair: Pair, tmp_path: Path, name: str, way: str
) -> None:
    pair.run(save_and_load, name, way, tmp_path)
    saved = torch.load(tmp_path / "values.pt")
    found = dense_values(fqcompile.load(lambda: whole(name, torch.float32), tmp_path / "saved"))
    _assert_equal(found, saved)


def save_and_load(name: str, way: str, folder: Path) -> None:
    model = sharded(name, torch.float32, folder / "hf", way)
    plan = fqcompile.quantize_(model, min_elements=0, granularity=32)
    fqcompile.save(model, folder / "saved", plan=plan)
    values = dense_values(model)
    if dist.get_rank() == 0:
        torch.save({n: v.detach() for n, v in values.items()}, folder / "values.pt")
    empty = sharded(name, torch.float32, folder / "hf", way)
    with torch.no_grad():
        for parameter in empty.parameters():
            local_part(parameter).fill_(0.25)
    _assert_equal(dense_values(fqcompile.load(empty, folder / "saved")), values)
    packed = [p for p in empty.parameters() if isinstance(local_part(p), PackedWeight)]
    assert len(packed) == len(plan.quantized)


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "way"), CASES)
def test_what_one_rank_saved_loads_on_two(pair: Pair, tmp_path: Path, name: str, way: str) -> None:
    model = whole(name, torch.float32)
    fqcompile.quantize_(model, min_elements=0, granularity=32)
    fqcompile.save(model, tmp_path / "saved")
    torch.save({n: v.detach() for n, v in dense_values(model).items()}, tmp_path / "values.pt")
    pair.run(load_whole, name, way, tmp_path)


def load_whole(name: str, way: str, folder: Path) -> None:
    model = sharded(name, torch.float32, folder / "hf", way)
    fqcompile.load(model, folder / "saved")
    _assert_equal(dense_values(model), torch.load(folder / "values.pt"))


def _assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_model_on_the_meta_device_never_holds_dense_weights(pair: Pair, tmp_path: Path) -> None:
    model = Net().eval().requires_grad_(False)
    fqcompile.quantize_(model, min_elements=0, granularity=32)
    fqcompile.save(model, tmp_path)
    for out in pair.run(load_from_meta, tmp_path):
        assert_close(out, model(torch.ones(2, 64)), depth=4)


def load_from_meta(folder: Path) -> Tensor:
    model = fqcompile.load(net, folder)
    part = local_part(model.get_parameter("first.up.weight"))
    assert isinstance(part, PackedWeight) and part.shape == (64, 64)
    out: Tensor = model(torch.ones(2, 64))
    return out


def test_columns_that_would_cut_a_group_are_named(pair: Pair, tmp_path: Path) -> None:
    model = Net(hidden=120).eval().requires_grad_(False)
    fqcompile.quantize_(model, min_elements=0, granularity=32)
    fqcompile.save(model, tmp_path)
    for text in pair.run(load_cut, tmp_path):
        assert "second.down.weight" in text and "column 60 is inside a group of 32" in text
        assert "as many ranks as saved it" in text


def load_cut(folder: Path) -> str:
    model = net(hidden=120)
    before = model.first.up.weight
    with pytest.raises((CheckpointError, RankError)) as caught:
        fqcompile.load(model, folder)
    assert model.first.up.weight is before
    return str(caught.value)


def test_unlike_groups_of_the_parts_are_joined_at_the_finest(pair: Pair, tmp_path: Path) -> None:
    (first, _), (second, _) = pair.run(save_unlike_groups, tmp_path)
    model = fqcompile.load(lambda: Net().eval().requires_grad_(False), tmp_path)
    loaded: Any = model.get_parameter("first.down.weight")
    assert loaded.format.group_size == 32 and loaded.shape == (64, 128)
    assert torch.equal(loaded.dequantized(), torch.cat([first, second], 1))


def save_unlike_groups(folder: Path) -> tuple[Tensor, int]:
    model = net()
    here = (32, 64)[dist.get_rank()]
    overrides = {r"first\.down": {"granularity": here}}
    with pytest.raises(RankError, match="overrides"):  # it says so, and has packed
        fqcompile.quantize_(model, min_elements=0, granularity=64, overrides=overrides)
    fqcompile.save(model, folder)
    part: Any = local_part(model.first.down.weight)
    return part.dequantized(), part.format.group_size


def test_unlike_whole_values_are_refused(pair: Pair, tmp_path: Path) -> None:
    pair.run(save_unlike_wholes, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def save_unlike_wholes(folder: Path) -> None:
    model = net()
    fqcompile.quantize_(model, min_elements=0)
    model.router.bias.add_(dist.get_rank())
    with pytest.raises((CheckpointError, RankError), match=r"router\.bias is not the same"):
        fqcompile.save(model, folder)


def test_a_rank_that_cannot_save_stops_all(pair: Pair, tmp_path: Path) -> None:
    pair.run(save_meta_on_one, tmp_path)
    assert not list(tmp_path.iterdir())


def save_meta_on_one(folder: Path) -> None:
    model = net()
    fqcompile.quantize_(model, min_elements=0)
    if dist.get_rank():
        model.router.bias = nn.Parameter(torch.empty(64, device="meta"))
    with pytest.raises((CheckpointError, RankError), match=r"router\.bias cannot be saved"):
        fqcompile.save(model, folder)


@pytest.mark.parametrize("refused", [0, 1])
def test_a_directory_that_one_rank_cannot_write(pair: Pair, tmp_path: Path, refused: int) -> None:
    """Each rank is told the rule and the remedy, whichever it was that the system refused."""
    for rank, (kind, text) in enumerate(pair.run(save_beneath_a_file, tmp_path, refused)):
        assert kind == ("NotWritten" if rank == refused else "RankError")
        assert "NotADirectory" in text or "Not a directory" in text
        assert f"{tmp_path / 'file' / 'saved'} cannot be written" in text
        assert "give a directory that can be made" in text
    assert not list(tmp_path.rglob("fqcompile*"))


def save_beneath_a_file(folder: Path, refused: int) -> tuple[str, str]:
    (folder / "file").touch()
    model = net()
    fqcompile.quantize_(model, min_elements=0)
    place = folder / "file" / "saved" if dist.get_rank() == refused else folder / "saved"
    with pytest.raises((CheckpointError, RankError)) as caught:
        fqcompile.save(model, place)
    return type(caught.value).__name__, str(caught.value)


def test_a_killed_rank_leaves_the_old_save(tmp_path: Path) -> None:
    ranks = Pair()
    try:
        (good, text), (lives, _) = ranks.outcomes(save_and_die, tmp_path, seconds=60)
        assert good and not lives, text
    finally:
        ranks.close()
    manifest = read_manifest(tmp_path)
    assert manifest.generation == text
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        shard.file for shard in manifest.shards
    }
    fqcompile.load(Net, tmp_path)


def save_and_die(folder: Path) -> str:
    """Saves once; then rank 1 is killed in the middle of the second. The first's generation."""
    model = net()
    fqcompile.quantize_(model, min_elements=0)
    fqcompile.save(model, folder)
    generation = read_manifest(folder).generation
    dist.barrier()
    if dist.get_rank():
        from fqcompile.checkpoint.shards import ShardWriter

        def die(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        ShardWriter.add_packed = die  # type: ignore[method-assign, assignment]
    with pytest.raises(RankError, match="has ended"):
        fqcompile.save(model, folder)
    return generation
