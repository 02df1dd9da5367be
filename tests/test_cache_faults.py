"""Caches that cannot be used, or must not be: the model is right, as fast as can be, and says so.

Each start runs in a child, so that it has looked at no cache before; a stand-in for the compiler
copies the library that the tests have built.
"""

import copy
import errno
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fqcompile
from fqcompile.files import trusted as place
from fqcompile.native import library as native
from fqcompile.native.isa import ISAS
from fqcompile.weights import disk_cache
from fqcompile.weights.disk_cache import DiskCache
from tests.children import NOBODY, in_child, needs_root, open_folder
from tests.helpers import assert_close, finequant
from tests.native.paths import NAMES, copying_compiler
from tests.weights.test_disk_cache import put, unwanted
from tests.weights.test_disk_cache_entries import assert_same, entry

if not NAMES or shutil.which("g++") is None:
    pytest.skip("this machine builds no x86 kernel", allow_module_level=True)

STREAM = "x86_stream"
ISA = ISAS[NAMES[0]]


class Start(NamedTuple):
    """What a start of a process has said, and the kernels that it has chosen."""

    warnings: list[str]
    kernels: set[str]


def start() -> Start:
    """Quantize and run a small model, and compare it with its dequantized weights."""
    said: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("fqcompile").addHandler(handler)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    model.requires_grad_(False)
    x = torch.randn(3, 256)
    y = finequant(model)(x)
    report = fqcompile.reports()[-1]
    assert len(report.plan.quantized) == 2
    dense = fqcompile.fake_quantize_(copy.deepcopy(model), report)
    assert_close(y, dense(x), k=512, depth=2)
    return Start(
        [record.getMessage() for record in said], {str(site.kernel) for site in report.sites}
    )


@pytest.fixture(scope="module")
def made() -> Path:
    """The library that the stand-in for the compiler copies."""
    start()  # imports what a child of another user could not read
    return native.build(ISA, place.cache_directory() / "x86")


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One for the cache, one for temporary files, and a compiler that takes no time."""
    with open_folder() as folder:
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o1777)
        compiler = copying_compiler(folder, made)
        monkeypatch.setattr(native, "_compiler", lambda: compiler)
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(folder / "cache"))
        monkeypatch.setenv("FQCOMPILE_CACHE_SIZE", "1")
        monkeypatch.setattr(place, "_warned", set())
        native.loaded.cache_clear()
        disk_cache._cache.cache_clear()
        yield folder
    native.loaded.cache_clear()


@contextmanager
def mounted(where: Path, options: str) -> Iterator[None]:
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


def full(folder: Path) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(mounted(folder / "cache", "size=64k,mode=755"))
    return stack


def not_executable(folder: Path) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(mounted(folder / "cache", "noexec,mode=755"))
    return stack


def of_mode(mode: int) -> Callable[[Path], ExitStack]:
    def prepare(folder: Path) -> ExitStack:
        (folder / "cache").mkdir()
        (folder / "cache").chmod(mode)
        return ExitStack()

    return prepare


def of_somebody_else(folder: Path) -> ExitStack:
    (folder / "cache").mkdir()
    os.chown(folder / "cache", 1234, 1234)
    return ExitStack()


@needs_root
@pytest.mark.parametrize(
    ("prepare", "user", "reason"),
    [
        (of_mode(0o000), NOBODY, "Permission denied"),
        (of_mode(0o755), NOBODY, "Permission denied"),
        (of_somebody_else, 0, "belongs to user 1234"),
        (of_mode(0o777), 0, "others may write"),
        (full, 0, "No space left"),
        (not_executable, 0, "failed to map segment"),
    ],
    ids=[
        "not searchable",
        "not writable",
        "of somebody else",
        "open to all",
        "full disk",
        "noexec",
    ],
)
def test_a_cache_that_cannot_be_used_is_said_once(
    prepare: Callable[[Path], ExitStack], user: int, reason: str, folder: Path
) -> None:
    with prepare(folder):
        warnings, kernels = in_child(start, user)
        left = [] if user else list((folder / "cache").glob("**/*.part"))
    (said,) = warnings
    assert reason in said and said.count("set FQCOMPILE_CACHE_DIR") == 1
    assert kernels == {STREAM}
    assert not left
    assert (folder / "tmp" / f"fqcompile-{user}").stat().st_mode & 0o777 == 0o700


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("code", "of"),
    [
        (errno.EACCES, "stat"),
        (errno.EACCES, "open"),
        (errno.EROFS, "open"),
        (errno.ENOLCK, "open"),
        (errno.ENOSPC, "open"),
        (errno.EDQUOT, "open"),
        (errno.EIO, "stat"),
        (errno.EIO, "open"),
    ],
    ids=str,
)
def test_a_system_that_refuses_is_said_once(
    code: int, of: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, for every user: the calls of the system fail below the cache."""
    real = getattr(os, of)

    def refuse(path: str, *args: object, **named: object) -> object:
        if not isinstance(path, int) and str(path).startswith(str(folder / "cache")):
            raise OSError(code, os.strerror(code), path)
        return real(path, *args, **named)

    monkeypatch.setattr(os, of, refuse)
    (said,), kernels = in_child(start)
    assert os.strerror(code) in said and "set FQCOMPILE_CACHE_DIR" in said
    assert kernels == {STREAM}


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 25), "made.so/cache"])
def test_a_name_that_cannot_be_is_said_once(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(folder / name))
    (said,), kernels = in_child(start)
    assert "name too long" in said or "Not a directory" in said
    assert "set FQCOMPILE_CACHE_DIR" in said
    assert kernels == {STREAM}


@needs_root
def test_the_home_of_somebody_else_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `sudo -E`: files of root would shut its owner out of his own cache."""
    for name in ("FQCOMPILE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    home = folder / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    monkeypatch.setenv("HOME", str(home))
    (said,), kernels = in_child(start)
    assert f"{home} belongs to user {NOBODY}" in said
    assert kernels == {STREAM}
    assert [p.name for p in home.rglob("*")] == []


@needs_root
def test_where_every_disk_is_full_a_slower_kernel_is_named(folder: Path) -> None:
    """All that is left is memory; what cannot be built has another kernel in its place."""
    (folder / "tmp").rmdir()
    with full(folder), mounted(folder / "tmp", "size=64k,mode=1777"):
        warnings, kernels = in_child(start)
    assert STREAM not in kernels and len(kernels) == 1
    slower, lost = warnings if "x86" in warnings[0] else reversed(warnings)
    assert "a slower one" in slower and "No space left" in slower
    assert "set FQCOMPILE_CACHE_DIR" in lost


def test_a_healthy_cache_is_filled_and_says_nothing(folder: Path) -> None:
    for _ in range(2):
        assert in_child(start) == Start([], {STREAM})
    assert {p.name for p in (folder / "cache").rglob("*.so")} == {library(folder).name}
    assert len(list((folder / "cache" / "weights").glob("*.safetensors"))) == 2
    assert not list((folder / "tmp").iterdir())


def library(folder: Path) -> Path:
    """Where the library of this compiler lies."""
    command = [native._compiler(), *native._FLAGS, *ISA.flags]
    return folder / "cache" / "x86" / f"{ISA.name}-{native._digest(command)}.so"


@pytest.mark.few(2)
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "zeros", "text"])
def test_a_damaged_library_is_built_anew(damage: str, folder: Path) -> None:
    """To load the first of them ends the process, with SIGBUS."""
    in_child(start)
    path = library(folder)
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut": whole[: middle // 4],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "zeros": bytes(len(whole)),
        "text": b"no library",
    }[damage]
    path.write_bytes(damaged)
    (said,), kernels = in_child(start)
    assert str(path) in said and "built anew" in said
    assert kernels == {STREAM}
    assert path.read_bytes() == whole
    assert in_child(start) == Start([], {STREAM})


def test_a_compiler_may_speak_in_any_encoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "g++"
    script = path.read_bytes().replace(b"echo 1", b"printf 'g++ \\344\\366\\374\\377\\n'")
    path.write_bytes(script)
    assert in_child(start) == Start([], {STREAM})
    path.write_bytes(
        script.replace(b"while", b"printf 'Fehler: \\344\\377 error\\n' >&2; exit 1\n")
    )
    shutil.rmtree(folder / "cache")
    (said,), kernels = in_child(start)
    assert "failed with 1: Fehler: \\xe4\\xff error" in said
    assert STREAM not in kernels


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "g++"), OSError(8, "no")]
)
def test_a_compiler_that_may_not_run(
    error: OSError, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **named: object) -> str:
        raise error

    monkeypatch.undo()
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", refuse)
    (said,), kernels = in_child(start)
    assert "no C++ compiler: install g++" in said
    assert STREAM not in kernels


@contextmanager
def planted(folder: Path) -> Iterator[Path]:
    """A library under our name that leaves a file behind where it is loaded."""
    mark = folder / "tmp" / "mark"
    source = folder / "planted.c"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) void run(void) "
        f'{{ FILE *file = fopen("{mark}", "w"); if (file) fclose(file); }}\n'
    )
    where = library(folder)
    where.parent.mkdir(parents=True)
    subprocess.run(["g++", "-xc", "-shared", "-fPIC", source, "-o", where], check=True)
    content = where.read_bytes()
    where.write_bytes(content + sha256(content).digest())
    where.chmod(0o644)
    yield mark


def test_what_is_planted_would_run(folder: Path) -> None:
    """Or the tests below would show nothing."""
    with planted(folder) as mark:
        in_child(start)
    assert mark.exists()


def _open_directory(folder: Path) -> None:
    (folder / "cache" / "x86").chmod(0o777)


def _open_parent(folder: Path) -> None:
    (folder / "cache").chmod(0o777)


def _open_file(folder: Path) -> None:
    library(folder).chmod(0o666)


def _open_to_a_group(folder: Path) -> None:
    os.chown(folder / "cache" / "x86", -1, 1234)
    (folder / "cache" / "x86").chmod(0o775)


def _directory_of_another(folder: Path) -> None:
    os.chown(folder / "cache" / "x86", 1234, -1)


def _parent_of_another(folder: Path) -> None:
    os.chown(folder / "cache", 1234, -1)


def _file_of_another(folder: Path) -> None:
    os.chown(library(folder), 1234, -1)


def _link_in_a_shared_folder(folder: Path) -> None:
    """A link of another user in a folder such as /tmp leads to a directory that is our own."""
    shared = folder / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (folder / "cache").rename(folder / "real")
    (shared / "link").symlink_to(folder / "real")
    os.chown(shared / "link", 1234, 1234, follow_symlinks=False)
    (folder / "cache").symlink_to(shared / "link")


ROOT_ONLY = [
    _open_to_a_group,
    _directory_of_another,
    _parent_of_another,
    _file_of_another,
    _link_in_a_shared_folder,
]


@pytest.mark.parametrize(
    "arrange",
    [
        _open_directory,
        _open_parent,
        _open_file,
        *(pytest.param(arrange, marks=needs_root) for arrange in ROOT_ONLY),
    ],
)
def test_code_that_others_could_have_written_is_not_run(
    arrange: Callable[[Path], None], folder: Path
) -> None:
    with planted(folder) as mark:
        arrange(folder)
        warnings, kernels = in_child(start)
    assert not mark.exists()
    assert len(warnings) == 1
    assert "others may write to" in warnings[0] or "belongs to user 1234" in warnings[0]
    assert "set FQCOMPILE_CACHE_DIR" in warnings[0]
    assert kernels == {STREAM}


@needs_root
@pytest.mark.parametrize("home", [True, False])
@pytest.mark.parametrize("kind", ["directory", "link", "file"])
def test_the_fallback_is_not_what_another_has_prepared(
    kind: str, home: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody was faster to make the directory that this user would fall back to, or has alone."""
    (folder / "cache").mkdir()
    (folder / "cache").chmod(0o777)
    if not home:
        monkeypatch.setattr(native, "cache_directory", place.fallback_directory)
        monkeypatch.setattr(disk_cache, "cache_directory", place.fallback_directory)
    taken = folder / "tmp" / "fqcompile-0"
    (folder / "mine").mkdir()
    {
        "directory": taken.mkdir,
        "link": lambda: taken.symlink_to(folder / "mine"),
        "file": taken.touch,
    }[kind]()
    os.chown(taken, 1234, 1234, follow_symlinks=False)
    (said,), kernels = in_child(start)
    assert kernels == {STREAM}
    assert str(taken) in said and said.count("set FQCOMPILE_CACHE_DIR") == 1
    assert not home or (str(folder / "cache") in said and "others may write to" in said)
    assert not list((folder / "mine").iterdir())
    assert list((folder / "tmp").iterdir()) == [taken]  # what was built for this process is gone


def _entry(folder: Path) -> Path:
    return next((folder / "cache" / "weights").glob("*.safetensors"))


@pytest.mark.parametrize("target", [library, _entry], ids=["library", "weights"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a pipe", "device"])
def test_what_would_be_waited_for_is_not_opened(
    kind: str, target: Callable[[Path], Path], folder: Path
) -> None:
    in_child(start)
    path = target(folder)
    path.unlink()
    pipe = folder / "pipe"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o600 | stat.S_IFSOCK)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(pipe)
        path.symlink_to(pipe)
    (said,), kernels = in_child(start, seconds=60)
    assert f"{path} is neither a file nor a directory" in said
    assert said.count("set FQCOMPILE_CACHE_DIR") == 1
    assert kernels == {STREAM}


@needs_root
def test_weights_that_others_could_have_written_are_not_used(folder: Path) -> None:
    """The digest in a file speaks for its whole, not for who wrote it."""
    weights = folder / "cache" / "weights"
    put(DiskCache(weights, 2**30), "a")
    own = entry(seed=7)
    for change, reason in [
        (lambda: os.chown(weights, 1234, -1), "belongs to user 1234"),
        (lambda: (os.chown(weights, 0, -1), weights.chmod(0o757)), "others may write"),
        (
            lambda: (weights.chmod(0o755), (weights / "a.safetensors").chmod(0o646)),
            "others may write",
        ),
    ]:
        change()

        def use(reason: str = reason) -> None:
            found = DiskCache(weights, 2**30)
            assert_same(found.get_or_make("a", lambda: own), own)
            assert found.hits == 0

        in_child(use)
    (weights / "a.safetensors").chmod(0o644)
    in_child(
        lambda: assert_same(DiskCache(weights, 2**30).get_or_make("a", unwanted), entry(seed=97))
    )


@needs_root
def test_in_a_folder_such_as_tmp_the_first_user_has_the_cache(folder: Path) -> None:
    with of_mode(0o1777)(folder):
        assert in_child(start, NOBODY) == Start([], {STREAM})
        (said,), kernels = in_child(start)
    assert f"belongs to user {NOBODY}" in said and "set FQCOMPILE_CACHE_DIR" in said
    assert kernels == {STREAM}


@needs_root
def test_a_cache_that_root_fills_is_read_by_others(folder: Path) -> None:
    """Nothing is written there, and nothing needs to be said or built."""
    assert in_child(start) == Start([], {STREAM})
    before = {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*")}
    assert in_child(start, NOBODY) == Start([], {STREAM})
    assert {p: p.stat().st_mtime_ns for p in (folder / "cache").rglob("*")} == before
    assert not list((folder / "tmp").iterdir())
