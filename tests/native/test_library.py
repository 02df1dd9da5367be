"""Building the x86 kernel: once, together with others, and what is said where it fails."""

import multiprocessing
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fqcompile.errors import KernelBuildError
from fqcompile.files.trusted import cache_directory
from fqcompile.kernels.cpu import attention, stream
from fqcompile.kernels.epilogue import Epilogue
from fqcompile.native import isa
from fqcompile.native import library as native
from fqcompile.native.isa import ISAS, OVERRIDE, chosen_isa
from fqcompile.native.library import build, load
from tests.kernels.cpu.test_stream import SPEC, packed
from tests.native.paths import NAMES, library, path
from tests.strategies import make_problem

if not NAMES:
    pytest.skip("this processor has none of the kernel's paths", allow_module_level=True)

ISA = ISAS[NAMES[-1]]
ROOT = Path(__file__).parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_widest_path_is_chosen_and_the_override_narrows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    assert chosen_isa().name == NAMES[0]
    for name in NAMES:
        monkeypatch.setenv(OVERRIDE, name)
        assert chosen_isa().name == name


@pytest.mark.parametrize(
    ("value", "text"),
    [("none", "FQCOMPILE_CPU_ISA=none says so"), ("sse2", "'sse2' is not one of avx512_bf16")],
)
def test_the_override_may_refuse(value: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, value)
    with pytest.raises(KernelBuildError, match=text):
        chosen_isa()


def test_a_processor_without_any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.setattr(isa, "has_feature", lambda feature: False)
    with pytest.raises(KernelBuildError, match="this processor has none of avx512_bf16, avx512"):
        chosen_isa()


def stand_in(tmp_path: Path, script: str) -> str:
    """A compiler that tells its version and then does what `script` says."""
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\n{script}\n')
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo 'x.cpp:1: error: no such thing' >&2; exit 3", "failed with 3: x.cpp:1: error: no"),
        ("kill -9 $$", "failed with -9"),
    ],
    ids=["error", "killed"],
)
def test_a_failing_compiler_is_named_and_leaves_nothing(
    script: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = stand_in(tmp_path, script)
    monkeypatch.setattr(native, "_compiler", lambda: compiler)
    with pytest.raises(KernelBuildError, match=re.escape(text)):
        build(ISA, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_compiler", lambda: str(tmp_path / "none"))
    with pytest.raises(KernelBuildError, match="does not run"):
        build(ISA, tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(KernelBuildError, match="set FQCOMPILE_CACHE_DIR to a directory"):
        build(ISA, file / "cache")


def test_what_is_no_library_does_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    with pytest.raises(KernelBuildError, match=r"broken\.so does not load"):
        load(ISA, broken)


@pytest.mark.slow
def test_importing_builds_nothing_and_without_a_compiler_the_next_template_is_chosen(
    tmp_path: Path,
) -> None:
    code = (
        "import os\n"
        "from fqcompile.kernels.registry import select_kernel\n"
        "from fqcompile.kernels.cpu.stream import X86_STREAM\n"
        "from tests.kernels.cpu.test_stream import SPEC\n"
        "print(os.listdir(os.environ['FQCOMPILE_CACHE_DIR']))\n"
        "print(select_kernel(SPEC), X86_STREAM.refuse(SPEC))\n"
    )
    nowhere = {"CXX": "/nowhere/g++", "PATH": "/nowhere"}
    done = run(code, FQCOMPILE_CACHE_DIR=str(tmp_path), **nowhere)
    assert done.stdout.startswith("[]\naten_int4pack no C++ compiler"), done.stdout + done.stderr


@pytest.mark.slow
def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    """A compiler that takes its time and counts its runs, and three processes."""
    made = build(ISA, cache_directory() / "x86")
    compiler = stand_in(
        tmp_path,
        f'echo run >> {tmp_path}/runs; sleep 2\nwhile [ "$1" != -o ]; do shift; done\n'
        f'cp {made} "$2"',
    )
    code = (
        "from fqcompile.native import library as native\n"
        f"native._compiler = lambda: {compiler!r}\n"
        "print(native.native_library().isa)\n"
    )
    environment = {**os.environ, "FQCOMPILE_CACHE_DIR": str(tmp_path), OVERRIDE: ISA.name}
    start = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(start, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [p.communicate(timeout=120)[0] for p in processes] == [f"{ISA.name}\n"] * 3
    mains = [path for path in native._SOURCES if path.suffix == ".cpp"]
    assert (tmp_path / "runs").read_text() == "run\n" * (len(mains) + 1)  # and the linker
    names = sorted(p.name for p in (tmp_path / "x86").iterdir())
    assert names[0] == ".lock" and names[1].endswith(".so") and len(names) == 2


def test_the_name_follows_source_compiler_and_flags(tmp_path: Path) -> None:
    command = [native._compiler(), *ISA.flags]
    assert native._digest(command) == native._digest(command)
    assert native._digest(command) != native._digest([*command, "-g"])
    assert native._digest(command) != native._digest([stand_in(tmp_path, ""), *ISA.flags])


def test_it_brings_no_openmp_runtime_of_its_own() -> None:
    """Its loops are PyTorch's: the threads of two runtimes would wait for each other's cores."""
    library(NAMES[0])
    content = build(ISAS[NAMES[0]], cache_directory() / "x86").read_bytes()
    assert b"torch_parallel_for" in content
    assert not re.search(rb"lib[gi]?omp|GOMP_|__kmpc_", content)


def problem() -> tuple[torch.Tensor, stream.QuantizedTensor]:
    p = make_problem(leading=(3,), n=640, k=256, dtype=torch.bfloat16)
    return p.x, packed(p)


def multiply(x: torch.Tensor, weight: stream.QuantizedTensor) -> torch.Tensor:
    return stream._run(x, weight, None, Epilogue(), None)


def test_a_forked_child_computes_after_its_parent_used_threads() -> None:
    """libgomp's threads are not in the child; waiting for them would never end."""
    x, weight = problem()
    with path(NAMES[0], threads=2):
        want = multiply(x, weight)
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(multiply(x, weight).float().tolist()))
        child.start()
        child.join(60)
        alive = child.is_alive()
        child.kill()
    assert not alive, "the child hangs"
    assert queue.get() == want.float().tolist()


@pytest.mark.slow
def test_threads_are_those_that_torch_has() -> None:
    """With one thread no other is started, with three two more; the result is the same."""
    code = (
        "import os, torch\n"
        "from tests.native.test_library import multiply, problem\n"
        "torch.set_num_threads(1)\n"
        "x, weight = problem()\n"
        "first, sums = len(os.listdir('/proc/self/task')), set()\n"
        "for threads in (1, 3):\n"
        "    torch.set_num_threads(threads)\n"
        "    sums.add(multiply(x, weight).float().sum().item())\n"
        "    print(len(os.listdir('/proc/self/task')) - first)\n"
        "assert len(sums) == 1\n"
    )
    done = run(code)
    assert done.stdout == "0\n2\n", done.stderr


def test_python_threads_may_call_it_at_once() -> None:
    x, weight = problem()
    with path(NAMES[0], threads=2):
        want = multiply(x, weight)
        found: list[torch.Tensor] = []
        threads = [
            threading.Thread(target=lambda: found.extend(multiply(x, weight) for _ in range(50)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 200
    assert all(torch.equal(y, want) for y in found)


def test_memory_that_is_short_is_an_error_in_any_thread() -> None:
    """Of a thread of PyTorch's, a lost exception would be a part of the result that is missing."""
    q, v = torch.zeros(1, 1, 1, 1 << 24), torch.zeros(1, 1, 300, 8)
    wide = (q, q.expand(1, 1, 300, q.shape[3]), v, None, None, 1.0, 0.0, False, False)
    small = (v[..., :1, :], v, v, *wide[3:])
    before = resource.getrlimit(resource.RLIMIT_AS)
    for threads in (1, 2):
        with path(NAMES[0], threads):
            attention.attention(*small)  # threads start
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 23), before[1]))
            try:
                with pytest.raises(MemoryError, match="bad_alloc"):
                    attention.attention(*wide)
                with pytest.raises(MemoryError, match="no memory for its sums"):
                    attention._impl(*wide)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
            assert torch.equal(attention.attention(*small), attention._impl(*small))


def test_refusal_is_that_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "loaded", lambda: "the compiler is out to lunch")
    assert stream.X86_STREAM.refuse(SPEC) == "the compiler is out to lunch"
    with pytest.raises(KernelBuildError, match="out to lunch"):
        native.native_library()
