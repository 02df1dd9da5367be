"""Dynamo's graph of a plain function or module, the passes run over it, and what they left."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fqcompile.config import FineQuantConfig
from fqcompile.passes.capture import capture
from fqcompile.passes.lower import lower
from fqcompile.passes.op_nodes import is_quantized
from fqcompile.passes.pipeline import PASSES, verify
from fqcompile.passes.select import select
from fqcompile.passes.state import GraphState, part_of
from fqcompile.weights.dispatch import Variant
from fqcompile.weights.recipe import target_name

DEFAULTS: dict[str, object] = {"min_elements": 1, "granularity": 32, "inner_backend": "eager"}


@dataclass
class Captured:
    """A graph as Dynamo hands it to a backend, with the real tensors of that call."""

    module: fx.GraphModule
    args: list[Any]


@dataclass
class Run:
    """The state after the passes, the graph they started from, and each pass's count."""

    state: GraphState
    captured: Captured
    counts: dict[str, int]
    grad: bool = False
    variant: Variant | None = None

    @property
    def ops(self) -> Counter[str]:
        """Calls of the graph by plain name."""
        calls = [n for n in self.state.graph.nodes if n.op in ("call_function", "call_method")]
        return Counter("fq" if is_quantized(n) else target_name(n.target) for n in calls)

    @property
    def linears(self) -> list[fx.Node]:
        return [n for n in self.state.graph.nodes if is_quantized(n)]

    def outputs(self) -> tuple[Tensor, ...]:
        """The rewritten graph on fresh copies of the call's activations."""
        args = self._own_args()
        if self.variant is None:
            if "select" not in self.counts:
                select(self.state)
            self.variant = lower(self.state, args)
        kept = [args[i] for i in self.variant.kept_args]
        # The graph restores the mode that it was captured in.
        with torch.set_grad_enabled(self.grad):
            return tuple(self.variant.inner(*kept, *self.variant.pack(args)))

    def expected(self) -> tuple[Tensor, ...]:
        """Dynamo's graph, each quantized weight replaced by its dequantized value."""
        args = self._own_args()
        for site in self.state.sites:
            if site.plan is None:
                continue
            part = part_of(self.state, site, site.plan)
            given = tuple(self.captured.args[i] for i in part.inputs)
            w_hat = part.quantize(given).dequantize(torch.float32)
            for i, source in zip(part.inputs, given, strict=True):
                if args[i] is source:
                    args[i] = source.detach().clone()
            site.recipe.write_back(tuple(args[i] for i in part.inputs), w_hat)
        with torch.set_grad_enabled(self.grad):
            return tuple(self.captured.module(*args))

    def _own_args(self) -> list[Any]:
        constants = set(self.state.constants.values())
        return [
            arg if i in constants or not isinstance(arg, Tensor) else arg.detach().clone()
            for i, arg in enumerate(self.captured.args)
        ]


def dynamo_graph(
    function: Callable[..., Any], *args: Any, grad: bool = False, dynamic: bool | None = False
) -> Captured:
    """The one graph that Dynamo makes of `function(*args)`."""
    found: list[Captured] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(Captured(module, list(inputs)))
        return module.forward

    torch._dynamo.reset()
    copies = [_copied(a) if isinstance(a, Tensor) else a for a in args]
    with torch.set_grad_enabled(grad):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*copies)
    assert len(found) == 1, f"{len(found)} graphs"
    # The call may have written to its inputs.
    inputs = [_original(a, copies, args) for a in found[0].args]
    return Captured(found[0].module, inputs)


def _copied(tensor: Tensor) -> Tensor:
    """With the dimensions that are marked as dynamic."""
    copy = tensor.clone()
    for dim in getattr(tensor, "_dynamo_dynamic_indices", ()):
        torch._dynamo.mark_dynamic(copy, dim)
    return copy


def _original(value: Any, copies: Sequence[Any], args: Sequence[Any]) -> Any:
    return next((a for c, a in zip(copies, args, strict=True) if c is value), value)


def run_passes(
    function: Callable[..., Any],
    *args: Any,
    until: str = "fuse",
    grad: bool = False,
    dynamic: bool | None = False,
    **options: object,
) -> Run:
    """Capture and every pass up to `until`, each verified. By default no weight is too small."""
    captured = dynamo_graph(function, *args, grad=grad, dynamic=dynamic)
    config = FineQuantConfig(**{**DEFAULTS, **options})
    with torch.set_grad_enabled(grad):
        state = capture(captured.module, captured.args, config)
        verify(state, "capture")
        counts: dict[str, int] = {}
        for name in [] if until == "capture" else PASSES:
            state.matched = []
            counts[name] = PASSES[name](state)
            verify(state, name)
            if name == until:
                break
    return Run(state, captured, counts, grad)


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    """A float32 matrix whose products with unit-variance rows have unit variance."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / k**0.5


def assert_same(run: Run) -> None:
    """The rewritten graph computes what Dynamo's does, in shape, dtype and value."""
    for i, (got, want) in enumerate(zip(run.outputs(), run.expected(), strict=True)):
        assert_same_form(got, want, f"output {i}")
        assert_close(got, want, f"output {i}")


def assert_same_form(got: Tensor, want: Tensor, what: str) -> None:
    """Shape, dtype and strides; a dimension of size one has no stride that anything reads."""

    def form(t: Tensor) -> tuple[object, ...]:
        strides = [s for n, s in zip(t.shape, t.stride(), strict=True) if n != 1]
        return tuple(t.shape), t.dtype, strides if t.numel() else None

    assert form(got) == form(want), f"{what}: {form(got)} where {form(want)} is expected"


def assert_close(got: Tensor, want: Tensor, what: str, scale: float | None = None) -> None:
    """Equal within what the order of fp32 sums allows.

    Two orders of a sum of K products differ by at most 2 K u Σ|x w|, u = 2^-24. Here K <= 128, at
    most 8 linears follow each other, and Σ|x w| <= √K times the largest value met: 8 * 256 * u * 11
    < 2^-9.  Errors grow like √K rather than K, so 2^-12 is never reached by rounding; leaving out
    a bias, a group or a column is 2^-4 or more.
    """
    largest = scale if scale is not None else float(want.abs().max()) if want.numel() else 0.0
    error = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
    assert error <= 2**-12 * (1 + largest), f"{what}: off by {error:.3g}, largest {largest:.3g}"
