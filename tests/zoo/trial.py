"""One architecture under test: everything that is compared, computed once and kept apart."""

import copy
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

import fqcompile
from fqcompile.report import Plan, Site
from tests.zoo.architecture import Architecture, tensors

OPTIONS: dict[str, Any] = {"min_elements": 256}  # the smallest router that is here
# Why a weight stays as far as a plan knows, where no linear layer of the call multiplies by it.
UNREAD = ("no captured graph reads it", "embedding table")
# Why modules alone, without a graph, keep a parameter that is no linear's own.
UNTOLD = (
    "whose use is not known without a graph: see explain()",
    "may read it as a table, and keeps it",
    "if its matrices are [N, K] or [K, N]",  # of a stack
)
_NO_READERS = ("__get__", "dim", "size", "numel", "embedding")
_INDEX = re.compile(r"\[\d+\]$")


@dataclass
class Trial:
    """Results of an architecture in a dtype, behind an inner backend; each when first asked for."""

    name: str
    architecture: Architecture
    dtype: torch.dtype
    inner_backend: str
    seconds: float = field(default=0.0)

    @cached_property
    def model(self) -> nn.Module:
        """Run once: some rescale their weights in the first call."""
        model = self.architecture.build(self.dtype)
        self.outputs(model)
        return model

    def outputs(self, model: Any, batch: int = 2) -> list[Tensor]:
        """All floating point tensors that a model returns; the same for the same batch."""
        inputs = self.architecture.batch(batch, self.dtype)
        torch.manual_seed(0)
        with torch.no_grad():
            return list(tensors(model(**inputs)))

    @cached_property
    def dense(self) -> list[Tensor]:
        return self.outputs(self.model)

    @cached_property
    def read(self) -> set[str]:
        """Parameters that some call but an embedding's reads when the model runs eagerly."""
        with _Readers() as seen:
            self.outputs(self.model)
        return {name for name, weight in self.parameters.items() if id(weight) in seen.ids}

    @cached_property
    def options(self) -> dict[str, Any]:
        excluded = [f"^{re.escape(name)}$" for name in self.architecture.tables]
        return {**OPTIONS, "exclude": excluded} if excluded else OPTIONS

    def explained(self, batch: int, options: dict[str, Any]) -> Plan:
        inputs = self.architecture.batch(batch, self.dtype)
        torch.manual_seed(0)
        with torch.no_grad():
            return fqcompile.explain(self.model, example_kwargs=inputs, **options)

    @cached_property
    def plan(self) -> Plan:
        return self.explained(2, self.options)

    @cached_property
    def oracle(self) -> nn.Module:
        return fqcompile.fake_quantize_(copy.deepcopy(self.model), self.plan)

    @cached_property
    def other_oracle(self) -> nn.Module:
        """For the other batch, which may choose other experts than the first one did."""
        if not self.architecture.looped:
            return self.oracle
        plan = self.explained(3, self.options)
        return fqcompile.fake_quantize_(copy.deepcopy(self.model), plan)

    @cached_property
    def compiled(self) -> tuple[list[Tensor], list[Tensor], list[Site]]:
        """The results of two batches, and the sites of all graphs of the first."""
        started = time.perf_counter()
        options = {**self.options, "inner_backend": self.inner_backend}
        fqcompile.report.clear_reports()
        torch._dynamo.reset()
        way = torch.compile(self.model, backend="finequant", options=options)
        first = self.outputs(way)
        sites = [site for report in fqcompile.reports() for site in report.sites]
        second = self.outputs(way, 3)
        self.seconds = time.perf_counter() - started
        return first, second, sites

    @cached_property
    def packed(self) -> tuple[nn.Module, Plan]:
        model = copy.deepcopy(self.model)
        return model, fqcompile.quantize_(model, **self.options)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """What a site may be called after: parameters, buffers, plain attributes of a module."""
        attributes = {
            f"{prefix}.{name}".lstrip("."): value
            for prefix, module in self.model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        return {**attributes, **buffers, **self.parameters}

    def sources(self, site: Site) -> list[str]:
        """The parameters that a site's name is made of."""
        return [_INDEX.sub("", part) for part in site.name.split("+")]

    @cached_property
    def by_weight(self) -> dict[int, list[Site]]:
        """The plan's rows by the identity of the parameters that they name."""
        rows: dict[int, list[Site]] = {}
        for site in self.plan.sites:
            for name in self.sources(site):
                if name in self.named:
                    rows.setdefault(id(self.named[name]), []).append(site)
        return rows

    @cached_property
    def linears(self) -> dict[str, Tensor]:
        """Each weight that the model multiplies by in a linear layer or as experts, named once."""
        found: dict[int, tuple[str, Tensor]] = {}
        for prefix, module in self.model.named_modules():
            for name, weight in module.named_parameters(prefix, recurse=False):
                plain = isinstance(module, nn.Linear | Conv1D) and weight.dim() == 2
                stack = "expert" in name and weight.dim() == 3 and 1 not in weight.shape
                if (plain or stack) and weight.numel() >= OPTIONS["min_elements"]:
                    found.setdefault(id(weight), (name, weight))
        return dict(found.values())

    def row(self) -> tuple[object, ...]:
        """What the table at the end says."""
        done = {id(w): w for w in self.linears.values() if self._quantized(w)}
        whole = sum(w.nbytes for w in self.linears.values())
        share = sum(w.nbytes for w in done.values()) / whole if whole else 1.0
        total = self.plan.totals
        return (self.name, total.sites, total.quantized, f"{share:.0%}", f"{self.seconds:.1f}")

    def _quantized(self, weight: Tensor) -> bool:
        return any(site.status == "quantized" for site in self.by_weight.get(id(weight), ()))


class _Readers(TorchFunctionMode):
    """Identities of the tensors that functions of PyTorch take, properties left out."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _NO_READERS:
            self.ids.update(map(id, _flat((args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def _flat(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
