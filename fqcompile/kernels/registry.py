"""The templates in order of preference; selection takes the first one that accepts the spec.

Packed weights are converted into the layout of the kernel that runs them here, and back.

To add a template: write its file, add it to TEMPLATES.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from fqcompile.errors import KernelBuildError, NoKernelError
from fqcompile.kernels.cpu.aten_packed import INT4PACK, INT8PACK
from fqcompile.kernels.cpu.stream import X86_STREAM
from fqcompile.kernels.epilogue import HAS_TRITON, Epilogue
from fqcompile.kernels.spec import GemmSpec, LaunchTable, gpu_of
from fqcompile.kernels.template import DEQUANTIZE, MOST_GATHERED, Layout, Routing, Template
from fqcompile.kernels.tuning.launches import tuned_launches
from fqcompile.tensor.format import Format
from fqcompile.tensor.quantized import QuantizedTensor

if HAS_TRITON:
    from fqcompile.kernels.triton.template import TRITON_GEMMS

    _TRITON: tuple[Template, ...] = TRITON_GEMMS
else:
    _TRITON = ()

_CPU = (X86_STREAM, INT4PACK, INT8PACK)
TEMPLATES: dict[str, Template] = {t.name: t for t in (*_TRITON, *_CPU, DEQUANTIZE)}
LAYOUTS: dict[str, Layout] = {t.layout.name: t.layout for t in TEMPLATES.values()}
Routed = Literal["grouped", "gathered"]  # how rows are told their experts


@dataclass(frozen=True)
class KernelChoice:
    """A template and the configurations to launch it with; `str()` is what the op carries."""

    template: Template
    launches: LaunchTable | None = None

    def __str__(self) -> str:
        name = self.template.name
        return name if self.launches is None else f"{name}:{self.launches}"


def select_kernel(spec: GemmSpec, layout: str | None = None) -> KernelChoice:
    """The first template that accepts `spec`, with its heuristic configurations.

    `layout`: the name of the layout, if the weight is packed already.

    Raises:
        NoKernelError: every template refused; the message has the reason of each.
    """
    refusals = []
    for template in TEMPLATES.values():
        reason = template.refuse(spec)
        if reason is None and layout not in (None, template.layout.name):
            reason = f"reads the layout {template.layout.name!r}, not {layout!r}"
        if reason is None:
            return KernelChoice(template, template.launches(spec))
        refusals.append(f"{template.name}: {reason}")
    raise NoKernelError(f"no kernel for {spec}:\n  " + "\n  ".join(refusals))


@cache
def parse_kernel(text: str) -> KernelChoice:
    """The choice that `str(choice)` wrote.

    Raises:
        NoKernelError: the template is not installed; the message lists the installed ones.
    """
    name, _, launches = text.partition(":")
    if name not in TEMPLATES:
        raise NoKernelError(f"kernel {name!r} is not installed; there are {', '.join(TEMPLATES)}")
    return KernelChoice(TEMPLATES[name], LaunchTable.parse(launches) if launches else None)


EVERY_STEP: list[bool] = []  # not empty inside of `every_step_built`, in whatever thread


@contextmanager
def every_step_built() -> Iterator[None]:
    """Inside, each call runs all configurations of its kernel, whatever the number of rows, so that
    none is compiled in a later call."""
    EVERY_STEP.append(True)
    try:
        yield
    finally:
        EVERY_STEP.pop()


def build_every_step(
    choice: KernelChoice,
    x: torch.Tensor,
    weight: QuantizedTensor,
    routing: Routing | None,
    epilogue: Epilogue,
) -> None:
    """Run every configuration; one that does not build is reported by the call that needs it.

    While a CUDA graph is captured only the call itself runs: each replay would run all of them.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    least = 1
    for bound, config in choice.launches.steps if choice.launches else ():
        for rows, told in _calls_of_a_step(x, weight, routing, least, bound):
            with suppress(KernelBuildError):
                choice.template.run(rows, weight, told, epilogue, config)
        least = least if bound is None else bound + 1


def _calls_of_a_step(
    x: torch.Tensor,
    weight: QuantizedTensor,
    routing: Routing | None,
    least: int,
    bound: int | None,
) -> Iterator[tuple[torch.Tensor, Routing | None]]:
    """x and routing: as they are, or for ids the step's first and last number of rows, since those
    that are sorted by expert run another kernel."""
    if routing is None or routing.ids is None:
        yield x, routing
        return
    sorted_from = MOST_GATHERED * weight.qweight.shape[0] + 1
    for m in sorted({min(least, sorted_from), min(bound or sorted_from, sorted_from)}):
        yield x[:1].repeat(m, 1), Routing(ids=routing.ids[:1].repeat(m))


def in_kernel_layout(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """From the plain layout to that of the kernel which runs it here for activations of `dtype`."""
    spec = spec_of(weight.format, dtype, weight.scale.dtype, weight.qweight.device, None)
    return select_kernel(spec).template.layout.pack(weight)


def in_plain_layout(weight: QuantizedTensor) -> QuantizedTensor:
    """The plain layout again, bit for bit."""
    return LAYOUTS[weight.format.layout].unpack(weight)


@cache
def kernel_for(
    format: Format,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: torch.device,
    routing: Routed | None,
) -> str | None:
    """The operator's `kernel`, for any number of rows; None where nothing reads that layout."""
    spec = spec_of(format, dtype, scale_dtype, device, routing)
    try:
        choice = select_kernel(spec, format.layout)
    except NoKernelError:
        return None
    return str(KernelChoice(choice.template, tuned_launches(spec, choice.template, "off").launches))


def dequantized_because(spec: GemmSpec) -> str | None:
    """Why each call on a GPU dequantizes the whole weight, which takes longer than the dense
    product; None where a kernel reads its codes, and on other devices."""
    if spec.device_type != "cuda":
        return None
    refusals = [template.refuse(spec) for template in _TRITON]
    if None in refusals:
        return None
    return f"the GPU kernel {refusals[0]}" if refusals else "Triton is not installed"


def spec_of(
    format: Format,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: torch.device,
    routing: Routed | None,
) -> GemmSpec:
    """Any number of rows of x; experts without a routing as grouped ones."""
    return GemmSpec(
        m=1,
        n=format.rows,
        k=format.k,
        bits=format.bits,
        levels=format.levels,
        group_size=format.group_size,
        dtype=dtype,
        scale_dtype=scale_dtype,
        device_type=device.type,
        needs_backward=True,
        m_range=(0, None),
        gpu=gpu_of(device) if device.type == "cuda" and torch.cuda.is_available() else None,
        experts=format.experts,
        routing=(routing or "grouped") if format.experts else None,
    )
