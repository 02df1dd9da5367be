"""fqcompile doctor: what this machine has, and what that means for the kernels."""

import argparse

import torch

from fqcompile.doctor import diagnose
from fqcompile.kernels.cpu import native_library
from fqcompile.kernels.cpu.stream import X86_STREAM
from fqcompile.kernels.registry import TEMPLATES
from fqcompile.kernels.spec import GemmSpec, gpu_of
from fqcompile.kernels.template import Template


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> None:
    print(diagnose(kernel_availability()))


def kernel_availability() -> list[tuple[str, str | None]]:
    """Each template, with None where it serves a bf16 decode matmul here, else why not."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: list[tuple[str, str | None]] = []
    for template in TEMPLATES.values():
        reasons = [template.refuse(_decode_spec(device, b)) for device in devices for b in (4, 8)]
        rows.append((_named(template), None if None in reasons else reasons[0]))
    return rows


def _named(template: Template) -> str:
    """With the path that the x86 kernel takes here, where it is built."""
    if template is not X86_STREAM or native_library.refusal() is not None:
        return template.name
    return f"{template.name} ({native_library.native_library().isa})"


def _decode_spec(device_type: str, bits: int) -> GemmSpec:
    group_size = 64 if bits == 4 else 4096
    bf16 = torch.bfloat16
    gpu = gpu_of(torch.device("cuda")) if device_type == "cuda" else None
    return GemmSpec(1, 4096, 4096, bits, group_size, bf16, bf16, device_type, gpu=gpu)
