"""save and load on small models: what is kept, what is shared, and every refusal."""

import errno
import gc
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile import locks
from fqcompile.checkpoint import shards
from fqcompile.checkpoint.directory import locked
from fqcompile.checkpoint.manifest import read_manifest
from fqcompile.errors import CheckpointError, OptionError
from fqcompile.weights.parameter import PackedWeight
from tests.checkpoint.small_models import Small, contents, small

fcntl = pytest.importorskip("fcntl")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return fqcompile.save(small(), tmp_path / "saved")


def shard_of(directory: Path) -> Path:
    (path,) = directory.glob("*.safetensors")
    return path


def test_everything_that_a_model_holds_comes_back(saved: Path) -> None:
    model, loaded = small(), fqcompile.load(Small, saved)
    assert contents(loaded) == contents(model)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids), model(ids))
    assert isinstance(loaded.up.weight, PackedWeight)
    assert isinstance(loaded.up.weight, nn.Parameter)
    assert not loaded.up.weight.requires_grad


def test_tied_tensors_are_written_once_and_stay_tied(saved: Path) -> None:
    loaded: Any = fqcompile.load(Small, saved)
    assert loaded.head.weight is loaded.embed.weight
    slots = json.loads((saved / "fqcompile.json").read_text())["content"]["slots"]
    assert slots["head.weight"] == slots["embed.weight"]
    assert slots["angles"]["kind"] == "buffer"
    assert slots["mask"]["kind"] == "attribute"


def test_a_head_that_was_packed_apart_from_its_embedding(tmp_path: Path) -> None:
    model = Small()
    fqcompile.quantize_(model, min_elements=1)
    assert isinstance(model.head.weight, PackedWeight)
    fqcompile.save(model, tmp_path)
    loaded: Any = fqcompile.load(Small, tmp_path)
    assert contents(loaded) == contents(model)
    assert type(loaded.embed.weight) is nn.Parameter


def test_factories_run_on_the_meta_device_and_models_keep_what_they_are(saved: Path) -> None:
    seen = []

    def factory() -> Small:
        model = Small()
        seen.append(model.up.weight.device.type)
        return model.train()

    assert fqcompile.load(factory, saved).training
    assert seen == ["meta"]
    given = Small(seed=5).eval()
    assert fqcompile.load(given, saved) is given
    assert not given.training
    assert contents(given) == contents(small())
    assert given.embed.weight.requires_grad
    frozen = Small().requires_grad_(False)
    assert not any(p.requires_grad for p in fqcompile.load(frozen, saved).parameters())


def test_changes_to_a_loaded_model_do_not_reach_the_file(saved: Path) -> None:
    first: Any = fqcompile.load(Small, saved)
    with torch.no_grad():
        first.embed.weight.zero_()
    assert contents(fqcompile.load(Small, saved)) == contents(small())


def test_a_loaded_model_outlives_its_files(saved: Path) -> None:
    loaded = fqcompile.load(Small, saved)
    fqcompile.save(small(1), saved)
    gc.collect()
    assert contents(loaded) == contents(small())
    assert contents(fqcompile.load(Small, saved)) == contents(small(1))


def test_a_model_can_be_saved_where_it_was_loaded_from(saved: Path) -> None:
    fqcompile.save(fqcompile.load(Small, saved), saved)
    assert contents(fqcompile.load(Small, saved)) == contents(small())


def test_dense_tensors_are_aligned(saved: Path) -> None:
    loaded = fqcompile.load(Small, saved)
    dense = [p for p in loaded.parameters() if not isinstance(p, PackedWeight)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in [*dense, *loaded.buffers()])


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "submodule"])
def test_compiled_models_are_saved_as_what_they_wrap(tmp_path: Path, inside: bool) -> None:
    model = small()
    if inside:
        model.up = torch.compile(model.up, backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    fqcompile.save(model, tmp_path)
    assert json.loads((tmp_path / "fqcompile.json").read_text())["content"]["model"] == {
        "class": "Small",
        "config": {"seed": 0, "architectures": ["Small"]},
    }
    assert contents(fqcompile.load(Small, tmp_path)) == contents(small())
    assert fqcompile.load(model, tmp_path) is model


def test_the_plan_is_recorded(tmp_path: Path) -> None:
    model = Small()
    plan = fqcompile.quantize_(model, min_elements=4096, bits=8)
    fqcompile.save(model, tmp_path, plan=plan)
    content = json.loads((tmp_path / "fqcompile.json").read_text())["content"]
    assert content["options"]["bits"] == 8
    assert content["sites"] == json.loads(json.dumps([site.as_dict() for site in plan.sites]))
    fqcompile.save(model, tmp_path)
    sites = json.loads((tmp_path / "fqcompile.json").read_text())["content"]["sites"]
    for site, full in zip(sites, plan.quantized, strict=True):
        known = ("name", "kind", "status", "bits", "group_size", "bytes_before")
        assert [site[key] for key in known] == [getattr(full, key) for key in known]
        assert site["shape"] == list(full.shape)
        assert site["bytes_after"] == 128 * 64 + 2 * full.shape[0]  # codes, and a scale each


def test_other_files_of_the_directory_stay(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    fqcompile.save(small(1), saved)
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert json.loads((saved / "config.json").read_text())["seed"] == 1


class ExtraState(Small):
    def get_extra_state(self) -> dict[str, int]:
        return {"step": 3}


class Odd(Tensor):
    """Any subclass."""


def _unquantized() -> nn.Module:
    return Small()


def _on_meta() -> nn.Module:
    model = small()
    model.angles = model.angles.to("meta")
    return model


def _freed() -> nn.Module:
    model = small()
    model.embed.weight.untyped_storage().resize_(0)
    return model


def _subclass() -> nn.Module:
    model = small()
    model.mask = torch.ones(3).as_subclass(Odd)
    return model


def _sparse() -> nn.Module:
    model = small()
    model.angles = torch.eye(3).to_sparse()
    return model


def _wide() -> nn.Module:
    model = small()
    model.mask = torch.ones(3, dtype=torch.complex128)
    return model


def _extra_state() -> nn.Module:
    model = ExtraState()
    fqcompile.quantize_(model, min_elements=4096)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_unquantized, r"no packed weight: call fqcompile\.quantize_"),
        (_on_meta, "angles cannot be saved: it is on the meta device"),
        (_freed, r"weight cannot be saved: its memory was freed by resizing"),
        (_subclass, "mask cannot be saved: it is a Odd"),
        (_sparse, r"angles cannot be saved: it is torch\.sparse_coo"),
        (_wide, r"mask cannot be saved: safetensors files have no torch\.complex128"),
        (_extra_state, r"module itself \(ExtraState\) has extra state"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        fqcompile.save(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip(at: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return flip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (_cut, "was cut short or changed"),
        (_longer, "was cut short or changed"),
        (_flip(0), "the header of .* is not what was written"),
        (_flip(20), "the header of .* is not what was written"),
        (_flip(-1), "tensor angles is not what was written: its checksum differs"),
        (_flip(2000), "tensor embed.weight is not what was written: its checksum differs"),
    ],
)
def test_damaged_shards_are_refused_by_name(
    saved: Path, damage: Callable[[Path], None], message: str
) -> None:
    shard = shard_of(saved)
    damage(shard)
    model = Small(seed=3)
    before = contents(model)
    for target in (Small, model):
        with pytest.raises(CheckpointError, match=message) as raised:
            fqcompile.load(target, saved)
        assert shard.name in str(raised.value)
    assert contents(model) == before


def test_checksums_are_not_compared_when_told_so(saved: Path) -> None:
    _flip(2000)(shard_of(saved))
    loaded = fqcompile.load(Small, saved, verify=False)
    different = [k for k, v in contents(small()).items() if contents(loaded)[k] != v]
    assert different == ["embed.weight", "head.weight"]


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no fqcompile\.json"):
        fqcompile.load(Small, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no fqcompile\.json"):
        fqcompile.load(Small, tmp_path / "nowhere")


class Taller(Small):
    def __init__(self) -> None:
        super().__init__(width=128)


class More(Small):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(3, 3)


class Less(Small):
    def __init__(self) -> None:
        super().__init__()
        del self.down, self.angles


class Moved(Small):
    def __init__(self) -> None:
        super().__init__()
        steps = self.steps
        del self.steps
        self.steps = nn.Parameter(steps.float())


class Remembers(Small):
    """A plain attribute that nobody saved."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Taller, r"up.weight is \[128, 64\] and \[256, 128\] in the model"),
        (More, r"has no value for more.weight, more.bias"),
        (Less, r"has no place for angles, down.weight, down.bias"),
        (Moved, "steps is a buffer in the directory and a parameter in the model"),
        (Remembers, "has no value for memory"),
        (lambda: nn.Linear(2, 2), "embed.weight, up.weight, up.bias and 3 more"),
    ],
)
def test_another_model_is_refused_before_tensors_are_read(
    saved: Path, model: Callable[[], nn.Module], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.MappedShards, "tensor", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(CheckpointError, match=message):
        fqcompile.load(model, saved)


def test_attributes_of_the_constructor_stay_where_nobody_saved_them(saved: Path) -> None:
    model = fqcompile.load(Remembers(), saved)
    assert torch.equal(model.memory, torch.zeros(2))


def test_a_class_that_is_not_of_hugging_face_needs_a_function(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a Small, which is not a model class"):
        fqcompile.load(None, saved)


def test_arguments_that_changed_places_are_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="got a str in place of a model"):
        fqcompile.load(str(saved), saved)  # type: ignore[arg-type]


def test_two_writers_do_not_meet(saved: Path) -> None:
    with (
        locked(saved),
        pytest.raises(CheckpointError, match="being written by another process"),
    ):
        fqcompile.save(small(1), saved)
    assert contents(fqcompile.load(Small, saved)) == contents(small())


def test_who_may_only_read_cannot_keep_a_writer_out(saved: Path) -> None:
    """Neither the directory nor what is in it is what writers lock."""
    readable = [os.open(path, os.O_RDONLY) for path in (saved, *saved.iterdir())]
    try:
        for descriptor in readable:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fqcompile.save(small(1), saved)
    finally:
        for descriptor in readable:
            os.close(descriptor)
    assert contents(fqcompile.load(Small, saved)) == contents(small(1))


def test_the_lock_is_for_its_writer_alone_and_does_not_stay(saved: Path) -> None:
    before = set(saved.iterdir())
    with locked(saved):
        (path,) = set(saved.iterdir()) - before
        assert path.stat().st_mode & 0o777 == 0o600
    assert set(saved.iterdir()) == before


def test_a_lock_whose_file_was_removed_is_none(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer ended between the opening of the file and its lock."""
    real = locks._lock

    def late(descriptor: int, path: Path, seconds: float) -> None:
        path.unlink()
        real(descriptor, path, seconds)

    monkeypatch.setattr(locks, "_lock", late)
    with pytest.raises(CheckpointError, match="being written by another process"), locked(saved):
        pass


def _save_often(directory: Path, seed: int, rounds: int) -> None:
    torch.set_num_threads(1)
    models = [small(seed), small(seed + 1)]
    for round_number in range(rounds):
        try:
            fqcompile.save(models[round_number % 2], directory)
        except CheckpointError as error:
            assert "another process" in str(error)


def test_readers_beside_writers_always_find_a_whole_save(saved: Path) -> None:
    """Files vanish between the manifest and their opening: the reader takes the newer save."""
    writers = [
        multiprocessing.get_context("fork").Process(target=_save_often, args=(saved, seed, 60))
        for seed in (1, 3)
    ]
    for writer in writers:
        writer.start()
    expected = [contents(small(seed)) for seed in range(5)]
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(expected.index(contents(fqcompile.load(Small, saved))))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(seen) > 1


def test_a_save_that_is_replaced_while_it_is_opened(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has the manifest of shards that are gone: it begins again."""
    old = read_manifest(saved)
    fqcompile.save(small(1), saved)
    seen = [old]
    monkeypatch.setattr(
        "fqcompile.checkpoint.load.read_manifest",
        lambda directory: seen.pop() if seen else read_manifest(directory),
    )
    assert contents(fqcompile.load(Small, saved)) == contents(small(1))
    assert not seen


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file"):
        fqcompile.save(small(), tmp_path / "file")


def test_a_name_that_cannot_be_printed_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = small()
    model.add_module("a\tb", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"a\\tb.weight'; .* can be printed; rename it"):
        fqcompile.save(model, tmp_path / "saved")


@pytest.mark.parametrize("plan", [[], "plan.json", {}, 0], ids=repr)
def test_a_plan_that_is_none_is_refused_before_anything_is_written(
    plan: Any, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=rf"plan is a {type(plan).__name__}; allowed: .*\[-1\]"):
        fqcompile.save(small(), tmp_path / "saved", plan=plan)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("there", [True, False], ids=["empty", "dangling"])
def test_a_save_is_written_where_a_link_leads(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fqcompile.save(small(), tmp_path / "link")
    assert contents(fqcompile.load(Small, tmp_path / "real")) == contents(small())
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["file/x", "/proc/x", "x" * 300, "loop"])
def test_where_nothing_can_be_written_is_said(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match=r"cannot be written.*give a directory") as caught:
        fqcompile.save(small(), tmp_path / name)
    assert name in str(caught.value)


def test_a_full_disk_leaves_the_old_save(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*a disk with room"):
            fqcompile.save(small(), saved)
    assert {name: (saved / name).read_bytes() for name in before} == before


def test_shards_of_another_save_that_nobody_finished_are_removed(saved: Path) -> None:
    (saved / "fqcompile-0123abcd-00000.safetensors").write_text("")
    (saved / "config.json.fqcompile-0123abcd").write_text("")
    (saved / "fqcompile-notes.txt").write_text("mine")
    fqcompile.save(small(), saved)
    assert len(list(saved.glob("*.safetensors"))) == 1
    assert not list(saved.glob("*0123abcd*"))
    assert (saved / "fqcompile-notes.txt").exists()


def test_an_unreadable_manifest_is_replaced_but_never_tidied_after(saved: Path) -> None:
    old = shard_of(saved).name
    (saved / "fqcompile.json").write_text("{")
    with pytest.raises(CheckpointError, match="no packed weight"):
        fqcompile.save(Small(), saved)
    assert os.listdir(saved).count(old) == 1
    fqcompile.save(small(1), saved)
    assert contents(fqcompile.load(Small, saved)) == contents(small(1))
    assert not (saved / old).exists()


@pytest.mark.gpu
def test_a_save_moves_between_machines_with_and_without_gpu(tmp_path: Path) -> None:
    fqcompile.save(small().half().cuda(), tmp_path / "gpu")
    here = fqcompile.load(Small, tmp_path / "gpu")
    there = fqcompile.load(Small, tmp_path / "gpu", device="cuda")
    assert there.up.weight.device.type == "cuda"
    assert contents(there.cpu()) == contents(here)


def test_a_config_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    for content in ("mine", "{}"):
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json would be replaced, and no save"):
            fqcompile.save(small(), tmp_path)
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
            "config.json": content, "tokenizer.json": content
        }  # fmt: skip
    (tmp_path / "config.json").unlink()
    fqcompile.save(small(), tmp_path)
    fqcompile.save(small(1), tmp_path)  # its own is
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
