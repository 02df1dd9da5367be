"""Contenders: ways to run one layer on the same weight and input, ours among them.

A contender holds as many copies of its weight as no cache keeps, made once for each shape.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fqcompile.kernels.epilogue import Epilogue
from fqcompile.kernels.registry import select_kernel
from fqcompile.kernels.spec import DENSE, Config, GemmSpec
from fqcompile.kernels.template import Template
from fqcompile.kernels.tuning.launches import CLOSED_FORM, Mode, tuned_launches
from fqcompile.kernels.tuning.measure import (
    difference,
    packed_copies,
    random_problem,
    reference,
    rotation,
)
from fqcompile.tensor.quantized import QuantizedTensor

Run = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Contender:
    """`run(x, weights[i])` is the layer.

    Attributes:
        detail: the configuration, or the version of the library.
        quantizes: it quantized ŵ by its own rule, so its result may be a step of the codes away.
    """

    name: str
    detail: str
    run: Run
    weights: Sequence[Any]
    quantizes: bool = False


class Problem:
    """One layer: its weight and x for the largest M, and what must come out, in fp64."""

    def __init__(self, spec: GemmSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.weight, self._x = random_problem(spec, spec.m, device)

    def x(self, m: int) -> Tensor:
        return self._x[:m]

    def expected(self, m: int) -> Tensor:
        return self._expected[:m]

    @cached_property
    def _expected(self) -> Tensor:
        return reference(self._x, self.weight, self.spec)

    @cached_property
    def w_hat(self) -> Tensor:
        """[N, K] in x's dtype."""
        return self.weight.dequantize(self.spec.dtype)

    @cached_property
    def dense_copies(self) -> list[Tensor]:
        """As many copies of ŵ as `rotation` says, for all who multiply by it."""
        copies, _ = rotation(self.w_hat.nbytes)
        return [self.w_hat, *(self.w_hat.clone() for _ in range(copies - 1))]


def wrong_result(y: Tensor, expected: Tensor, contender: Contender, spec: GemmSpec) -> str | None:
    """How `y` is wrong, or None: to rounding, or for who quantizes ŵ anew to two steps of a code.

    The codes are uniform, so a weight is 2^bits/√12 steps in the mean square; twice the error of
    rounding to a step, 1/√12 of it, is 2^(1 - bits) of that.
    """
    if not contender.quantizes:
        return difference(y, expected, spec.k)
    if y.shape != expected.shape or not bool(y.isfinite().all()):
        return "another shape, or not all elements are finite"
    error, allowed = float((y.double() - expected).norm() / expected.norm()), 2.0 ** (1 - spec.bits)
    return None if error <= allowed else f"relative error {error:.2g}, allowed {allowed:.2g}"


class Ours:
    """Our kernel on one layer: for each M the closed form, the same with its split-K shares added
    the other way, what a dynamic number of rows runs where that is something else, what tuning
    found, and `dense`."""

    def __init__(self, problem: Problem) -> None:
        self.spec = problem.spec
        self.template: Template = select_kernel(problem.spec).template
        self.weights, _ = packed_copies(problem.weight, self.template.layout)

    def contenders(self, spec: GemmSpec, tune: Mode) -> Iterator[Contender]:
        """Those for the rows of `spec`; the tuned one where there is one."""
        closed = self.template.launches(spec)
        if closed is None:
            yield self._contender("fqcompile", None)
            return
        config = closed.at(spec.m)
        yield self._contender("fqcompile closed form", config)
        if config is not DENSE and config.SPLIT_K > 1:
            other = replace(config, last_finishes=not config.last_finishes)
            yield self._contender("fqcompile other finish", other)
        opened = self.template.launches(replace(spec, m_range=(1, None)))
        if opened is not None and opened.at(spec.m) != config:
            yield self._contender("fqcompile dynamic", opened.at(spec.m))
        chosen = tuned_launches(spec, self.template, tune)
        if chosen.launches is not None and chosen.source != CLOSED_FORM:
            yield self._contender("fqcompile tuned", chosen.launches.at(spec.m))
        yield self._contender("fqcompile dense", DENSE)

    def _contender(self, name: str, config: Config | None) -> Contender:
        epilogue = Epilogue(activation=self.spec.activation, gated=self.spec.gated)

        def run(x: Tensor, weight: QuantizedTensor) -> Tensor:
            return self.template.run(x, weight, None, epilogue, config)

        kernel = self.template.name if config is None else f"{self.template.name}:{config}"
        return Contender(name, kernel, run, self.weights)
