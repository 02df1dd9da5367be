"""Every path of the x86 kernel that this processor has, built once for all tests of a process."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fqcompile.errors import KernelBuildError
from fqcompile.files.trusted import cache_directory
from fqcompile.kernels.cpu.stream import serve
from fqcompile.native import library as native_library
from fqcompile.native.isa import ISAS
from fqcompile.native.library import NativeLibrary, build, load

if os.environ.get("FQTEST_SANITIZE"):  # as `make sanitize` does, which preloads their runtime
    native_library._FLAGS += (
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    )

NAMES = [isa.name for isa in ISAS.values() if isa.supported()]
_libraries: dict[str, NativeLibrary] = {}


def library(name: str) -> NativeLibrary:
    """The path called `name`; the test is skipped where no C++ compiler is found."""
    if name not in _libraries:
        try:
            isa = ISAS[name]
            _libraries[name] = load(isa, build(isa, cache_directory() / "x86"))
        except KernelBuildError as error:
            if "no C++ compiler" not in str(error):
                raise
            pytest.skip(str(error))
    return _libraries[name]


def copying_compiler(folder: Path, made: Path) -> str:
    """A stand-in for g++ that takes no time: it copies `made` to what it is asked to build."""
    shutil.copy(made, folder / "made.so")
    (folder / "made.so").chmod(0o644)
    (folder / "g++").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\n'
        f'while [ "$1" != -o ]; do shift; done; exec cp {folder}/made.so "$2"\n'
    )
    (folder / "g++").chmod(0o755)
    return str(folder / "g++")


@contextmanager
def path(name: str, threads: int = 1) -> Iterator[None]:
    """Within it the kernel takes this path, with so many threads."""
    before, was = native_library.loaded, torch.get_num_threads()
    found = library(name)
    native_library.loaded = lambda: found
    serve(found)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        native_library.loaded = before
        serve(None)
        torch.set_num_threads(was)
