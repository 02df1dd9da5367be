"""The ways that `bench models` runs a model: as it is, quantised by us, quantised by others.

inductor        16 bits, compiled by Inductor: what the others are held against
int8, int4      ours, adaptive granularity; the output head has 8 bits by default
int4 head       int4, the output head too
torchao int4    torchao's own quantisation in groups of 128, head included, compiled by Inductor

All are compiled with the same settings of Inductor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.table import PLAIN
from fqcompile.backend import finequant
from fqcompile.kernels.tuning.search import WrongResult

GROUP = 128
# Of a product with one matrix. A group of 128 normal numbers spans 5.6 standard deviations, in 15
# steps; rounding to them is 1/√12 of a step in the mean square, .108. Half as much again.
_ALLOWED_INT4 = 0.16
_TRIED_ROWS = 4


@dataclass(frozen=True)
class Way:
    """One of them.

    Attributes:
        options: finequant's; None where Inductor compiles the model.
        package: whose version the row names.
        change: quantises the model in place, before it is compiled.
    """

    name: str
    options: Mapping[str, Any] | None = None
    package: str = "torch"
    change: Callable[[nn.Module], None] | None = None

    @property
    def label(self) -> str:
        return f"{self.package} {version(self.package)}"

    @property
    def missing(self) -> str | None:
        """Why it cannot be had, or None."""
        return None if find_spec(self.package) else f"{self.package} is not installed"

    def compiler(self, inner: str) -> Callable[[Any], Any]:
        """torch.compile as users call it; `inner` other than Inductor has no CUDA graphs."""
        graphs = {"mode": "reduce-overhead"} if inner == "inductor" else {}
        if self.options is None:
            return partial(torch.compile, backend=inner, dynamic=False, **graphs)
        options = {**self.options, "inner_backend": inner, **graphs}
        return partial(torch.compile, backend=finequant, dynamic=False, options=options)


def _torchao_int4(model: nn.Module) -> None:
    """tinygemm's layout on a GPU; on a CPU the one that torchao 0.18 has for it.

    Neither sets Inductor's configuration, which all ways share.
    """
    if next(model.parameters()).device.type == "cuda":
        library = import_module("torchao.quantization")
        form = {"int4_packing_format": "tile_packed_to_4d"}
        config = library.Int4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False, **form)
    else:
        library = import_module("torchao.prototype.quantization.int4")
        config = library.PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    import_module("torchao.quantization").quantize_(model, config)


_ALL = (
    Way(PLAIN),
    Way("int8", {"bits": 8}, "fqcompile"),
    Way("int4", {"bits": 4}, "fqcompile"),
    Way("int4 head", {"bits": 4, "overrides": {"lm_head|embed_tokens": {"bits": 4}}}, "fqcompile"),
    Way("torchao int4", package="torchao", change=_torchao_int4),
)
WAYS = {way.name: way for way in _ALL}


@torch.no_grad()
def check_matrices(changed: nn.Module, model: nn.Module) -> None:
    """Hold every linear layer of `changed` against that of `model`: to what 4 bits allow.

    Raises:
        WrongResult: one is further off.
    """
    originals = dict(model.named_modules())
    for name, module in changed.named_modules():
        if isinstance(module, nn.Linear):
            error = _product_error(module, originals[name])
            if not error <= _ALLOWED_INT4:
                raise WrongResult(f"{name}: relative error {error:.2g}, allowed {_ALLOWED_INT4}")


def _product_error(changed: nn.Linear, original: nn.Module) -> float:
    weight: Any = original.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (_TRIED_ROWS, weight.shape[1])
    x = torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)
    y: Tensor = F.linear(x, changed.weight).double()
    expected = F.linear(x.double(), weight.double())
    return float((y - expected).norm() / expected.norm())
