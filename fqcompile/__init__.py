"""FineQuant as a torch.compile backend: weight-only int4 and int8, chosen from the weights alone.

model = torch.compile(model, backend="finequant")
"""

from fqcompile.checkpoint.save import save
from fqcompile.checkpoint.stream import quantize_checkpoint
from fqcompile.compiled import finequant, refresh, warm_up
from fqcompile.config import FineQuantConfig
from fqcompile.errors import (
    CheckpointError,
    FineQuantError,
    GraphInvariantError,
    NoKernelError,
    OptionError,
    UnquantizableWeight,
)
from fqcompile.explain import explain
from fqcompile.interop.check import check
from fqcompile.interop.export import export
from fqcompile.interop.findings import Finding
from fqcompile.interop.load import load
from fqcompile.modules.fake_quantize import fake_quantize_
from fqcompile.modules.quantize import quantize_, restore
from fqcompile.native.library import library_path
from fqcompile.report import CompileReport, Plan, Site, reports

__all__ = [
    "CheckpointError",
    "CompileReport",
    "Finding",
    "FineQuantConfig",
    "FineQuantError",
    "GraphInvariantError",
    "NoKernelError",
    "OptionError",
    "Plan",
    "Site",
    "UnquantizableWeight",
    "check",
    "explain",
    "export",
    "fake_quantize_",
    "finequant",
    "library_path",
    "load",
    "quantize_",
    "quantize_checkpoint",
    "refresh",
    "reports",
    "restore",
    "save",
    "warm_up",
]
