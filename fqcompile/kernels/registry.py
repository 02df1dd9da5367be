"""The templates in order of preference; selection takes the first one that accepts the spec.

To add a template: write its file, add it to TEMPLATES.
"""

from dataclasses import dataclass
from functools import cache

from fqcompile.errors import NoKernelError
from fqcompile.kernels.cpu.aten_packed import INT4PACK, INT8PACK
from fqcompile.kernels.cpu.stream import X86_STREAM
from fqcompile.kernels.epilogue import HAS_TRITON
from fqcompile.kernels.spec import GemmSpec, LaunchTable
from fqcompile.kernels.template import DEQUANTIZE, Layout, Template

if HAS_TRITON:
    from fqcompile.kernels.triton.template import TRITON_GEMMS

    _TRITON: tuple[Template, ...] = TRITON_GEMMS
else:
    _TRITON = ()

_CPU = (X86_STREAM, INT4PACK, INT8PACK)
TEMPLATES: dict[str, Template] = {t.name: t for t in (*_TRITON, *_CPU, DEQUANTIZE)}
LAYOUTS: dict[str, Layout] = {t.layout.name: t.layout for t in TEMPLATES.values()}


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
