"""The paths of the x86 kernel: instruction sets that it is compiled for, and which one is here.

FQCOMPILE_CPU_ISA names a narrower path than the widest one, or "none", to be used instead.
"""

import os
import sys
from dataclasses import dataclass

from fqcompile.errors import KernelBuildError
from fqcompile.torch_compat import has_feature

OVERRIDE = "FQCOMPILE_CPU_ISA"


@dataclass(frozen=True)
class Isa:
    """A path: its name, and the instructions that it is compiled for, as compilers name them."""

    name: str
    instructions: tuple[str, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's; operator.cpp gets those alone that let it ask for the instructions."""
        is_here = "&&".join(f'__builtin_cpu_supports("{name}")' for name in self.instructions)
        asks = f'-DFQCOMPILE_ISA="{self.name}"', f"-DFQCOMPILE_ISA_IS_HERE={is_here}"
        # Older clang cannot ask for f16c, which every processor with AVX2 has.
        return (*asks, "-mf16c", *(f"-m{name}" for name in self.instructions))

    def supported(self) -> bool:
        """Whether this processor has the instructions."""
        return has_feature(self.name)


_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
ISAS = {
    isa.name: isa
    for isa in (
        Isa("avx512_bf16", (*_AVX512, "avx512bf16")),
        Isa("avx512", _AVX512),
        Isa("avx2", _AVX2),
    )
}


def chosen_isa() -> Isa:
    """The path that FQCOMPILE_CPU_ISA names, else the widest one that this processor has.

    Raises:
        KernelBuildError: there is none.
    """
    wanted = os.environ.get(OVERRIDE)
    if wanted == "none":
        raise KernelBuildError(f"{OVERRIDE}=none says so")
    if wanted and wanted not in ISAS:
        raise KernelBuildError(f"{OVERRIDE}={wanted!r} is not one of {', '.join(ISAS)}, none")
    if sys.platform != "linux":
        raise KernelBuildError(f"is built on linux, not {sys.platform}")
    for isa in [ISAS[wanted]] if wanted else ISAS.values():
        if isa.supported():
            return isa
    raise KernelBuildError(f"this processor has none of {wanted or ', '.join(ISAS)}")
