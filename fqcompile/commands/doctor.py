"""fqcompile doctor: show versions, devices and compilers, and which kernels can run."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from textwrap import indent

import torch
from tabulate import tabulate

from fqcompile.kernels.cpu.stream import X86_STREAM
from fqcompile.kernels.registry import TEMPLATES
from fqcompile.kernels.spec import GemmSpec, gpu_of
from fqcompile.kernels.template import Template
from fqcompile.native import library as native_library
from fqcompile.report import installed_version
from fqcompile.tensor.format import QTYPES, QType
from fqcompile.weights.disk_cache import SIZE, disk_cache

DISTRIBUTIONS = ("fqcompile", "torch", "triton", "transformers", "numpy", "safetensors")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

Line = tuple[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> None:
    print(diagnose(kernel_availability()))


def kernel_availability() -> list[tuple[str, str | None]]:
    """Each template, with None if it can run a bf16 decode matmul here, else the reason."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: list[tuple[str, str | None]] = []
    for template in TEMPLATES.values():
        tried = product(devices, QTYPES.values())
        reasons = [template.refuse(_decode_spec(device, qtype)) for device, qtype in tried]
        rows.append((_named(template), None if None in reasons else reasons[0]))
    return rows


def _named(template: Template) -> str:
    """The template's name; for the x86 kernel, if built, with the instruction set it uses."""
    if template is not X86_STREAM or native_library.refusal() is not None:
        return template.name
    return f"{template.name} ({native_library.native_library().isa})"


def _decode_spec(device_type: str, qtype: QType) -> GemmSpec:
    group_size = 64 if qtype.bits == 4 else 4096
    bf16 = torch.bfloat16
    gpu = gpu_of(torch.device("cuda")) if device_type == "cuda" else None
    shape = (1, 4096, 4096, qtype.bits, group_size)
    return GemmSpec(*shape, bf16, bf16, device_type, gpu=gpu, levels=qtype.levels)


def _versions() -> list[Line]:
    return [
        ("python", platform.python_version()),
        *((d, installed_version(d)) for d in DISTRIBUTIONS),
    ]


def _cuda_devices() -> list[Line]:
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = (
            f"{device.name}, capability {device.major}.{device.minor}, "
            f"{device.multi_processor_count} SMs, {device.total_memory / 2**30:.0f} GiB"
        )
        lines.append((f"cuda:{index}", text))
    return lines


def _driver() -> str:
    if not NVIDIA_DRIVER.exists():
        return "no NVIDIA driver on this machine"
    return NVIDIA_DRIVER.read_text().splitlines()[0].removeprefix("NVRM version: ").strip()


def _devices() -> list[Line]:
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return [
        ("cpu", f"{platform.machine()}, {cpu}"),
        ("build", f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPU alone"),
        ("driver", _driver()),
        *(_cuda_devices() or [("cuda", "no device visible to torch")]),
    ]


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed: NVIDIA kernels need it"
    if not torch.cuda.is_available():
        return "installed; no GPU to run its kernels on"
    return "installed, with a GPU"


def _compilers() -> list[Line]:
    # Inductor uses CXX without a check, so a g++ on the path does not help if CXX is wrong.
    chosen = shlex.split(os.environ.get("CXX", ""))[:1]
    names = chosen or ["g++", "clang++"]
    found = [path for path in map(shutil.which, names) if path]
    where = "as CXX says" if chosen else "on the path"
    missing = f"no {' or '.join(names)} {where}: x86 kernels and Inductor on CPU need one"
    return [("C++", found[0] if found else missing), ("Triton", _triton())]


def _entry_point() -> str:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="finequant")
    targets = sorted({point.value for point in found})
    if not targets:
        return "not registered: install the package (pip install -e .)"
    return ", ".join(targets)


def _kernel(refusal: str | None) -> str:
    return "available" if refusal is None else f"unavailable: {refusal}"


def _weight_cache() -> str:
    found = disk_cache()
    if found is None:
        return f"off, as {SIZE} says"
    entries, nbytes = found.usage()
    return (
        f"{entries} weights, {nbytes / 2**30:.2f} of at most {found.limit / 2**30:g} GiB ({SIZE}), "
        f"in {found.directory}: delete it to clear"
    )


def _section(title: str, lines: Sequence[Line]) -> str:
    body = tabulate(lines, tablefmt="plain", disable_numparse=True)
    return f"{title}\n{indent(body, '  ')}"


def diagnose(kernels: Sequence[tuple[str, str | None]] = ()) -> str:
    """The report of `fqcompile doctor`.

    `kernels` maps each template to the reason why this machine cannot run it, or None.
    """
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "compilers": _compilers(),
        "backend": [("finequant", _entry_point())],
        "cache": [("quantized", _weight_cache())],
        "kernels": [(name, _kernel(refusal)) for name, refusal in kernels],
    }
    return "\n\n".join(_section(title, lines) for title, lines in sections.items() if lines)
