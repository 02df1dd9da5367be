"""Builds the package's C++ on first use and loads it: the widest path that this processor has.

The compiler is the one that Inductor uses for CPU graphs. The library is kept in the cache
directory under a name derived from the source, the compiler, the flags and torch's version, so it
is built once for all processes and again for another version. Importing this module builds nothing.

<name>.so   the library, and its SHA-256: loading a damaged library would crash the process
"""

import ctypes
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

import torch

from fqcompile.errors import KernelBuildError
from fqcompile.files.trusted import (
    cache_directory,
    check_trusted,
    fallback_directory,
    replace_file,
    warn_unusable,
    writing,
)
from fqcompile.native.interface import DEFINITIONS
from fqcompile.native.isa import Isa, chosen_isa
from fqcompile.torch_compat import InvalidCxxCompiler, cpp_compiler

log = logging.getLogger("fqcompile")

_SOURCES = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".h", ".cpp"))
# What the dispatcher calls is compiled for any processor, so that it can refuse those that lack the
# kernels' instructions. Linked first: of a function in several objects, the first is taken.
_FIRST = "operator.cpp"
# Inductor's own builds take minutes at most; a compiler that hangs must not hang a model.
_TIME_LIMIT = 600.0
_DIGEST_BYTES = sha256().digest_size
# What is not written as a fused multiply-add is none: the quantizer's bits depend on it.
_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-math-errno", "-ffp-contract=off"),
    *DEFINITIONS,
)


@dataclass(frozen=True)
class NativeLibrary:
    """Its functions; each takes the bytes of its arguments, see the C++ file that has it.

    All but `serve` raise MemoryError where memory is short.
    """

    isa: str
    matmul: Callable[[bytes], int]
    serve: Callable[[bytes | None], None]
    dequantize: Callable[[bytes], int]
    attention: Callable[[bytes], int]
    search: Callable[[bytes], int]
    encode: Callable[[bytes], int]


def native_library() -> NativeLibrary:
    """The kernel for this machine, built if no process has built it before.

    Raises:
        KernelBuildError: no path fits this processor, or it does not build; the text says why. It
            is not tried again in this process.
    """
    found = loaded()
    if isinstance(found, str):
        raise KernelBuildError(found)
    return found


def library_path() -> Path:
    """The operators for x86 CPUs as one file, for processes that load them without this package.

    `torch.ops.load_library(path)` in Python and `dlopen` in C++ define and implement the operators
    that exported programs call. The file, which may be copied, needs libtorch of the version that
    is here, and the instructions of this processor; with FQCOMPILE_CPU_ISA=avx2, only those of any
    x86 processor since 2015.

    Raises:
        KernelBuildError: no path fits this processor, it does not build, or it cannot be kept in
            the cache directory.
    """
    return build(chosen_isa(), cache_directory() / "x86")


def refusal() -> str | None:
    """Build the kernel; return why that is impossible here, or None."""
    found = loaded()
    return found if isinstance(found, str) else None


@cache
def loaded() -> NativeLibrary | str:
    """The kernel, or why there is none; found out once in a process."""
    try:
        isa = chosen_isa()
    except KernelBuildError as error:
        return str(error)
    try:
        return _built_somewhere(isa)
    except KernelBuildError as error:
        log.warning("the kernel for x86 is not used, but a slower one: %s", error)
        return str(error)


def _built_somewhere(isa: Isa) -> NativeLibrary:
    """In the cache; where that cannot be used in the fallback; for this process alone at last.

    Raises:
        KernelBuildError: in none of them; it is that of the first.
    """
    kept, fallback = cache_directory() / "x86", fallback_directory() / "x86"
    try:
        return load(isa, build(isa, kept))
    except KernelBuildError as error:
        try:
            found = load(isa, build(isa, fallback))
        except KernelBuildError:
            found = _built_for_now(isa, error)
        warn_unusable(kept, error.__cause__ or error)  # the cause has no remedy, the warning one
        return found


def _built_for_now(isa: Isa, error: KernelBuildError) -> NativeLibrary:
    """In a directory that nobody could have prepared; what is loaded needs no file any longer.

    Raises:
        KernelBuildError: `error`, where that fails too.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="fqcompile-") as fresh:
            return load(isa, build(isa, Path(fresh) / "x86"))
    except (KernelBuildError, OSError):
        raise error from None


def build(isa: Isa, directory: Path) -> Path:
    """The shared library for `isa` in `directory`, compiled if it is not there.

    Raises:
        KernelBuildError: the compiler is missing or fails, or the directory cannot be written, or
            others may write to it.
    """
    compiler = _compiler()
    command = [compiler, *_FLAGS, *isa.flags]
    path = directory / f"{isa.name}-{_digest(command)}.so"
    try:
        if _is_whole(path):
            return path
        with writing(directory, seconds=_TIME_LIMIT):
            if not _is_whole(path):  # built by another process meanwhile
                if path.exists():
                    log.warning("%s is not as it was written: it is built anew", path)
                _compile(command, path)
    except OSError as error:
        raise KernelBuildError(
            f"cannot be built in {directory} ({error}); set FQCOMPILE_CACHE_DIR to a directory "
            "that you alone can write to"
        ) from error
    return path


def _is_whole(path: Path) -> bool:
    try:
        check_trusted(path)
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _compiler() -> str:
    try:
        return cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        raise KernelBuildError(
            "no C++ compiler: install g++ or clang++, or set CXX; Inductor on CPU needs it too"
        ) from error


def _digest(command: list[str]) -> str:
    """A digest of everything that determines the library."""
    version = _run([command[0], "--version"])
    parts = [*command, version, torch.__version__, f"{_DIGEST_BYTES} bytes follow"]
    parts += [path.read_text(encoding="utf-8") for path in _SOURCES]
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    """Compile to temporary files first, so that `path` is always a complete library."""
    torch_at, mains = Path(torch.__file__).parent, [s for s in _SOURCES if s.suffix == ".cpp"]
    mains.sort(key=lambda source: source.name != _FIRST)
    for_any = [flag for flag in command if not flag.startswith("-m")]
    *objects, made = (path.with_name(name) for name in (*(f".{s.stem}.o" for s in mains), ".made"))
    # What lies between the compiler and the linker fits where the library does.
    run = partial(_run, environment={**os.environ, "TMPDIR": str(path.parent.absolute())})
    parts = [
        [
            *(for_any if source.name == _FIRST else command),
            *(f"-I{torch_at}/include", "-c", str(source), "-o", str(part)),
        ]
        for source, part in zip(mains, objects, strict=True)
    ]
    linking = [*command, *map(str, objects), "-o", str(made), f"-L{torch_at}/lib"]
    for file in (*objects, made):
        file.unlink(missing_ok=True)  # a pipe of that name would be waited for
    try:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(run, parts))
        run([*linking, "-ltorch_cpu", "-lc10"])
        content = made.read_bytes()
        replace_file(path, [content, sha256(content).digest()])
    finally:
        for file in (*objects, made):
            file.unlink(missing_ok=True)


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",  # a compiler may speak in any encoding
            timeout=_TIME_LIMIT,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"the compiler {command[0]} does not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise KernelBuildError(
            f"the compiler {command[0]} failed with {done.returncode}: {lines[0].strip()}"
        )
    return done.stdout


def load(isa: Isa, path: Path) -> NativeLibrary:
    """The functions of the shared library at `path`.

    Raises:
        KernelBuildError: it is not one, or not one of ours.
    """
    try:
        library = ctypes.CDLL(str(path))
        functions = {
            name: getattr(library, f"fqcompile_{name}")
            for name in ("matmul", "serve", "dequantize", "attention", "search", "encode")
        }
    except (OSError, AttributeError) as error:
        raise KernelBuildError(f"{path} does not load: {error}") from error
    for name, function in functions.items():
        function.argtypes, function.restype = [ctypes.c_char_p], None
        if name != "serve":
            function.restype, function.errcheck = ctypes.c_int64, _has_memory
    return NativeLibrary(isa.name, **functions)


def _has_memory(code: int, *_: object) -> int:
    if code < 0:
        raise MemoryError("the x86 kernel found no memory for its sums")
    return code
