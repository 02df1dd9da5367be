"""Locks that outlive neither their holder nor a fork, and that readers cannot hold."""

import ast
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.convert_frame import compile_lock

import fqcompile
import fqcompile.backend
from fqcompile import locks
from fqcompile.files import trusted
from fqcompile.files.trusted import cache_directory
from fqcompile.locks import fork_safe, locked
from fqcompile.native import library as native
from fqcompile.native.isa import ISAS
from fqcompile.weights.disk_cache import DiskCache
from fqcompile.weights.store import WeightStore
from tests.children import FORK, NOBODY, in_child, needs_root, open_folder
from tests.helpers import assert_close, finequant
from tests.native.paths import NAMES, copying_compiler
from tests.tiers import examples
from tests.weights.test_disk_cache_entries import assert_same, entry

PACKAGE = Path(fqcompile.__file__).parent
fcntl = pytest.importorskip("fcntl")


def held_by_a_thread(enter: Callable[[], object]) -> tuple[threading.Thread, threading.Event]:
    """A thread that is inside what `enter` makes until the event is set."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with enter():  # type: ignore[attr-defined]
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    return thread, leave


def test_a_child_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    """It was forked while another thread held it, and lives on."""
    path = tmp_path / "lock"
    thread, leave = held_by_a_thread(lambda: locked(path))
    child = FORK.Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    with pytest.raises(TimeoutError), locked(path, 0.0):  # nor does it release it
        pass
    leave.set()
    thread.join()
    with locked(path, 5.0):
        assert child.is_alive()
    child.kill()
    child.join()


def test_a_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    path, (ours, theirs) = tmp_path / "lock", FORK.Pipe()

    def fork_inside() -> None:
        with locked(path):
            if child := os.fork():
                theirs.send(child)
            time.sleep(60)

    parent = FORK.Process(target=fork_inside, daemon=True)
    parent.start()
    assert ours.poll(60)
    child = ours.recv()
    parent.kill()
    parent.join()
    try:
        with locked(path, 5.0):
            os.kill(child, 0)  # lives
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_that_is_forked_inside_leaves_as_one_that_holds_nothing(tmp_path: Path) -> None:
    """Another descriptor of the same number must not be closed in place of the lock's."""

    def leave_twice() -> str:
        with locked(tmp_path / "other"):
            return "alive"

    with locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            try:
                descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
            except BaseException:
                os._exit(1)
    if child == 0:  # after the end of the block
        try:
            for descriptor in descriptors:
                os.fstat(descriptor)
            os._exit(0 if leave_twice() == "alive" else 2)
        except BaseException:
            os._exit(3)
    assert os.waitpid(child, 0)[1] == 0
    with locked(tmp_path / "lock", 0.0):
        pass


@pytest.mark.parametrize("kind", ["of a store", "of Dynamo", "own"])
def test_a_lock_that_another_thread_holds_is_free_in_a_child(kind: str) -> None:
    lock = {
        "of a store": lambda: WeightStore()._lock,
        "of Dynamo": lambda: compile_lock,
        "own": lambda: fork_safe(threading.RLock()),
    }[kind]()
    thread, leave = held_by_a_thread(lambda: lock)
    try:
        assert in_child(partial(lock.acquire, timeout=20), seconds=60)
        assert not lock.acquire(blocking=False)
    finally:
        leave.set()
        thread.join()


def test_a_lock_of_the_thread_that_forks_stays_its_own() -> None:
    lock = fork_safe(threading.RLock())
    with lock:
        in_child(lock.release)
    assert not lock._is_owned()  # type: ignore[attr-defined]


def test_every_lock_of_the_package_is_fork_safe() -> None:
    """A lock on a file has one owner, and one between threads is known to it."""
    for path in PACKAGE.rglob("*.py"):
        if path.name == "locks.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        safe = {
            id(argument)
            for call in calls
            if ast.unparse(call.func) == "fork_safe"
            for argument in call.args
        }
        for call in calls:
            name = ast.unparse(call.func)
            made = name.rpartition(".")[2] in ("Lock", "RLock", "Condition", "Semaphore")
            assert not made or id(call) in safe, f"{path}:{call.lineno}: {name}() outside fork_safe"
            assert "flock" not in name and "lockf" not in name, f"{path}:{call.lineno}: {name}"


def test_a_lock_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    path.chmod(0o666)  # as an earlier version left it
    for name in ("lock", "new"):
        with locked(tmp_path / name):
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@needs_root
def test_who_may_only_read_cannot_hold_a_lock() -> None:
    """Not even while he watches the directory from before there was one."""
    with open_folder() as folder:
        put = folder / "weights"
        assert_same(DiskCache(put, 2**30).get_or_make("a", entry), entry())

        def hold_all() -> list[str]:
            held = []
            for path in folder.rglob("*"):
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.append(path.name)
                except PermissionError:
                    continue
            return held

        assert ".lock" not in in_child(hold_all, NOBODY)


def test_who_holds_a_lock_for_ever_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a reader who had opened the file of an earlier version, or a process that is stopped."""
    cache = tmp_path / "cache" / "weights"
    cache.mkdir(parents=True)
    brief = partial(locked, seconds=0.3)
    monkeypatch.setattr(trusted, "locked", lambda path, seconds: brief(path))
    with (cache / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start = time.monotonic()
        found = DiskCache(cache, 2**30)
        for key in "ab":
            assert_same(found.get_or_make(key, entry), entry())
        assert time.monotonic() - start < 20
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"another process holds {cache / '.lock'}" in said
    assert "set FQCOMPILE_CACHE_DIR" in said


def test_waiting_is_said_and_ends_when_the_holder_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 0.1)
    thread, leave = held_by_a_thread(lambda: locked(tmp_path / "lock"))
    threading.Timer(0.5, leave.set).start()
    with locked(tmp_path / "lock", 30.0):
        assert leave.is_set()
    thread.join()
    (said,) = caplog.messages
    assert said == f"waiting for another process, which holds {tmp_path / 'lock'}, for up to 30 s"


CHILDREN = examples(48)


def model(scale: float) -> nn.Module:
    """Without random numbers: for those PyTorch has locks that a child may find taken."""
    layers = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    for number, weight in enumerate(layers.requires_grad_(False).parameters()):
        weight.copy_(scale * torch.arange(weight.numel()).add(number).sin().view(weight.shape))
    return layers


class Other(nn.Module):
    """Code of its own: Dynamo locks the guards of a function while a thread checks them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, _, self.second = model(scale)  # type: ignore[misc]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def check(compiled: nn.Module, dense: nn.Module) -> None:
    """That it computes with the weights that `dense` has, dequantized."""
    x = torch.arange(3 * 128).cos().view(3, 128)
    assert_close(compiled(x), dense(x), k=256, depth=2)


def oracle(scale: float) -> nn.Module:
    plan = fqcompile.explain(model(scale), torch.ones(3, 128), granularity=64, calibration=None)
    return fqcompile.fake_quantize_(model(scale), plan)


def test_children_of_a_busy_process_do_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads compile, quantize, keep weights and build, and all the while children are forked.

    Each child calls what its parent has compiled, compiles anew, and quantizes.
    """
    if NAMES:
        made = native.build(ISAS[NAMES[0]], cache_directory() / "x86")
        compiler = copying_compiler(tmp_path, made)
        monkeypatch.setattr(native, "_compiler", lambda: compiler)
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FQCOMPILE_CACHE_SIZE", "1")
    monkeypatch.setattr("fqcompile.weights.disk_cache.LEAST_WEIGHTS", 1)
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)
    dense = [oracle(scale) for scale in (1, 2, 3)]
    torch._dynamo.reset()
    compiled = finequant(model(1), granularity=64, calibration=None)
    check(compiled, dense[0])
    kept = entry()
    stop, problems = threading.Event(), []

    def repeat(work: Callable[[int], object]) -> None:
        count = 3
        while not stop.is_set():
            count += 1
            try:
                work(count)
            except Exception as error:
                problems.append(error)
                return

    def compile_another(count: int) -> None:
        finequant(Other(count), granularity=64, bits=(4, 8)[count % 2])(torch.ones(2, 128))

    def quantize(count: int) -> None:
        fqcompile.quantize_(model(count), granularity=32)

    def keep(count: int) -> None:
        DiskCache(tmp_path / "weights", 2**30).get_or_make(f"{count}", lambda: kept)

    def build(count: int) -> None:
        for path in (tmp_path / "x86").glob("*.so"):
            path.unlink()
        native.build(ISAS[NAMES[0]], tmp_path / "x86")

    def use(number: int) -> None:
        check(compiled, dense[0])
        check(finequant(model(1 + number), granularity=64, calibration=None), dense[number])
        packed = model(1 + number)
        fqcompile.quantize_(packed, granularity=64, calibration=None)
        check(packed, dense[number])

    works = [compile_another, quantize, keep, *([build] if NAMES else [])]
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        for number in range(CHILDREN):
            in_child(partial(use, 1 + number % 2), seconds=60)
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    assert not problems
    assert not any(thread.is_alive() for thread in threads)
