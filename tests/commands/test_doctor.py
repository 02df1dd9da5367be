"""The machine report, on machines that are and that are not there."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fqcompile.commands import doctor


def line(report: str, name: str) -> str:
    """The text behind a name; every name occurs once."""
    (found,) = (row for row in report.splitlines() if row.split()[:1] == [name] and row[0] == " ")
    return found.split(maxsplit=1)[1]


def test_versions_and_devices_are_those_of_this_process() -> None:
    report = doctor.diagnose()
    assert line(report, "python") == platform.python_version()
    assert line(report, "numpy") == importlib.metadata.version("numpy")
    cpu = line(report, "cpu")
    assert torch.backends.cpu.get_cpu_capability() in cpu
    assert f"{torch.get_num_threads()} threads" in cpu


def test_missing_distribution_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTIONS", ("no-such-distribution",))
    assert line(doctor.diagnose(), "no-such-distribution") == "not installed"


def test_gpu_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = SimpleNamespace(
        name="Some GPU", major=9, minor=0, multi_processor_count=132, total_memory=139 * 2**30
    )
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1\nGCC version: 12\n")
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    report = doctor.diagnose()
    assert line(report, "cuda:0") == "Some GPU, capability 9.0, 132 SMs, 139 GiB"
    assert line(report, "driver") == "NVIDIA UNIX x86_64 Kernel Module  580.1"
    assert line(report, "Triton") == "installed, with a GPU"


def test_machine_without_gpu_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "absent")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    report = doctor.diagnose()
    assert line(report, "cuda") == "no device visible to torch"
    assert line(report, "driver") == "no NVIDIA driver on this machine"
    assert line(report, "build") == "for CUDA 13.0"
    assert line(report, "Triton") == "installed; no GPU to run its kernels on"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert line(doctor.diagnose(), "Triton") == "not installed: NVIDIA kernels need it"


def put_program(folder: Path, name: str) -> str:
    program = folder / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return str(program)


def test_compiler_is_that_of_cxx_else_of_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert line(doctor.diagnose(), "C++").startswith("no g++ or clang++ on the path: x86 kernels")
    clang = put_program(tmp_path, "clang++")
    assert line(doctor.diagnose(), "C++") == clang
    gcc = put_program(tmp_path, "g++")
    assert line(doctor.diagnose(), "C++") == gcc
    monkeypatch.setenv("CXX", f"{clang} -O1")
    assert line(doctor.diagnose(), "C++") == clang
    monkeypatch.setenv("CXX", os.fspath(tmp_path / "absent"))
    assert "absent as CXX says" in line(doctor.diagnose(), "C++")


def entry_point(value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint("finequant", value, "torch_dynamo_backends")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "not registered: install the package (pip install -e .)"),
        (["fqcompile.backend:finequant"], "fqcompile.backend:finequant"),
        (["other:f", "fqcompile.backend:finequant"], "fqcompile.backend:finequant, other:f"),
    ],
)
def test_entry_point_is_resolved(
    monkeypatch: pytest.MonkeyPatch, values: list[str], text: str
) -> None:
    points = importlib.metadata.EntryPoints(map(entry_point, values))
    monkeypatch.setattr(importlib.metadata, "entry_points", points.select)
    assert line(doctor.diagnose(), "finequant") == text


def test_kernels_are_listed_with_the_reason_against_them() -> None:
    report = doctor.diagnose([("x86_int4", None), ("dequant_gemm", "no CUDA device")])
    assert line(report, "x86_int4") == "available"
    assert line(report, "dequant_gemm") == "unavailable: no CUDA device"
    assert "kernels" in report.splitlines()
    assert "kernels" not in doctor.diagnose().splitlines()


def test_the_cache_says_what_it_holds_and_how_to_clear_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert line(doctor.diagnose(), "quantized") == "off, as FQCOMPILE_CACHE_SIZE says"
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FQCOMPILE_CACHE_SIZE", "2.5")
    folder = tmp_path / "weights"
    said = "of at most 2.5 GiB (FQCOMPILE_CACHE_SIZE), in " + f"{folder}: delete it to clear"
    assert line(doctor.diagnose(), "quantized") == f"0 weights, 0.00 {said}"
    folder.mkdir()
    for name in ("a", "b"):
        with (folder / f"{name}.safetensors").open("wb") as file:
            file.truncate(3 * 2**28)
    assert line(doctor.diagnose(), "quantized") == f"2 weights, 1.50 {said}"
