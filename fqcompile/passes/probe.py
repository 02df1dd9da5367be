"""Probe: run a graph eagerly before planning, to record the inputs of its matmuls.

x = embedding(ids, w_0); y = linear(x, w_1); ...   ->   x = embedding(ids, w_0); note(0, x);
                                                        y = linear(x, w_1); ...; note(9, z)

The graph runs up to its last product, on inputs that `probe_inputs` makes from those of a call.
Other instances of the class run the same graph with their own weights.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from fqcompile.distributed.shards import is_dtensor
from fqcompile.passes.effects import bodies, in_transforms
from fqcompile.passes.probe_inputs import copied, each_run, many_short, sizes_of, tables_of
from fqcompile.passes.state import GraphState, WeightSite, copy_module, example, placeholders
from fqcompile.quant.calibration import Moments, fixed_random_numbers
from fqcompile.torch_compat import FakeTensor
from fqcompile.weights.recipe import target_name

log = logging.getLogger("fqcompile")

_MODES = frozenset(("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"))


class ProbeError(Exception):
    """A graph could not be run as a probe; the message says why."""


def note(number: int, x: Tensor, routing: Tensor | None) -> None:
    """Marks a product in the graph: the interpreter records the arguments."""


@dataclass(frozen=True)
class Probe:
    """A graph up to its last product.

    Attributes:
        sites: the sites; a note's number is the index here.
        tables: see `tables_of`.
        written: positions of inputs that a run may write to.
        talks: whether the graph has collectives, which all ranks must run.
        begin: the begin token of the model that was compiled first; other instances of the class
            that run this graph get the same.
    """

    module: fx.GraphModule
    sites: Sequence[WeightSite]
    tables: Mapping[int, int]
    written: frozenset[int]
    talks: bool
    begin: int | None

    @classmethod
    def of(cls, state: GraphState, sites: Sequence[WeightSite]) -> "Probe":
        """A probe for these sites, in graph order; no pass may have rewritten the graph yet.

        Operators that update running statistics do not declare it. So every input counts as
        written to, except weights and parameters.
        """
        inputs = placeholders(state.graph)
        fixed = {source for site in sites for source in site.sources}
        fixed |= {n for n, arg in zip(inputs, state.args, strict=True) if _is_parameter(arg)}
        written = frozenset(i for i, n in enumerate(inputs) if n in state.written or n not in fixed)
        module = _noted(state, sites)
        talks = any(_talks(node) for node in module.graph.nodes)
        tables = tables_of(state, max(site.node for site in sites)) if sites else {}
        return cls(module, sites, tables, written, talks, state.begin_token)

    def run(self, args: Sequence[Any], *, random: bool) -> list[Moments]:
        """Run the graph and return the moments of each site's inputs.

        `random`: replace token ids, if the graph has any, by random ones.

        Raises:
            ProbeError: the graph could not be run; the message says why.
        """
        if in_transforms(self.module.graph):
            raise ProbeError("it has torch.func transforms")
        if any(isinstance(arg, FakeTensor) for arg in args):
            raise ProbeError("the values of its inputs are not available while it is compiled")
        tables, inputs = self.tables if random else {}, placeholders(self.module.graph)
        tried = [sizes_of(inputs, args)]
        if tables:  # a graph may be valid for some sizes only, as for sequences within a window
            tried.insert(0, many_short(inputs, tried[0], tables))
        for sizes in tried:
            moments = [Moments(site.shape) for site in self.sites]
            devices = [arg.device for arg in args if isinstance(arg, Tensor)]
            try:
                with fixed_random_numbers(devices):
                    for given in each_run(inputs, args, sizes, tables, self.written, self.begin):
                        _Interpreter(self, moments).whole(given)
            except Exception as error:
                log.debug("a probe failed at sizes %s", sizes, exc_info=True)
                reason = f"{type(error).__name__}: {error}"
            else:
                return moments
        raise ProbeError(reason)


def _is_parameter(value: object) -> bool:
    return isinstance(value, nn.Parameter)


class _Interpreter(fx.Interpreter):
    """Runs a graph with notes, without gradients; `whole` exits every mode even on an error."""

    def __init__(self, probe: Probe, moments: Sequence[Moments]) -> None:
        super().__init__(probe.module)
        self._probe, self._moments = probe, moments
        self._entered: list[Any] = []
        self._attributes: dict[str, Any] = {}

    def whole(self, inputs: Sequence[Any]) -> None:
        try:
            self.run(*inputs, enable_io_processing=False)
        finally:
            for mode in reversed(self._entered):
                mode.__exit__(None, None, None)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is note:
            number, x, routing = args
            count_rows(self._moments[number], self._probe.sites[number], x, routing)
            return None
        name = target_name(target)
        if name in _MODES:
            return None
        result = super().call_function(target, args, kwargs)
        if name == "_enter_autocast":
            self._entered.append(result)
        elif name == "_exit_autocast":
            self._entered.remove(args[0])
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Copy a tensor attribute of the graph once: any node may write to it."""
        if target not in self._attributes:
            value = super().get_attr(target, args, kwargs)
            fixed = not isinstance(value, Tensor) or _is_parameter(value)
            self._attributes[target] = value if fixed else copied([value])[0]
        return self._attributes[target]


def count_rows(moments: Moments, site: WeightSite, x: Tensor, routing: Tensor | None) -> None:
    """Add the rows of x to the moments, for each expert those rows that it multiplies."""
    roles = site.contraction
    if roles.x_singles:
        x = x.squeeze(roles.x_singles)
    batch = [i for i in roles.batch if i in roles.x_dims]
    order = [roles.x_dims.index(i) for i in (*batch, *roles.rows, *roles.contracted)]
    x, k = x.permute(order), site.shape[-1]
    each = [x.shape[batch.index(i)] if i in batch else 1 for i in roles.batch]
    rows = prod(x.shape[len(batch) : len(batch) + len(roles.rows)])
    x = x.reshape(*each, rows, k)
    if not roles.of_experts:
        moments.add(x)
    elif roles.offsets is not None:
        assert routing is not None
        ends = routing.tolist()
        for expert, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            moments.add(x[start:stop], expert)
    else:
        experts, sizes = _experts(site, routing)
        x = x.expand(*sizes, rows, k).reshape(-1, rows, k)
        for expert in experts.unique().tolist():
            moments.add(x[experts == expert], expert)


def _experts(site: WeightSite, ids: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """The expert of each element of the batch, flat on the CPU, and the sizes of the batch."""
    if ids is not None:
        return ids.flatten().cpu(), tuple(ids.shape)
    roles, out = site.contraction, example(site.node)
    assert out is not None
    sizes = tuple(int(out.shape[roles.out_dims.index(i)]) for i in roles.batch)
    return torch.arange(prod(sizes), device="cpu"), sizes


def _noted(state: GraphState, sites: Sequence[WeightSite]) -> fx.GraphModule:
    """A copy of the graph with notes, truncated after the last of them."""
    module, mapping = copy_module(state.module)
    graph, last = module.graph, None
    for number, site in enumerate(sites):
        roles = site.contraction
        routing = None if roles.routing is None else mapping[roles.routing]
        with graph.inserting_before(mapping[site.node]):
            last = graph.call_function(note, (number, mapping[roles.x], routing))
    graph.output_node().args = (None,)
    for node in reversed([n for n in graph.nodes if n.op not in ("placeholder", "output")]):
        if node is last:
            break
        graph.erase_node(node)
    return module


def _talks(node: fx.Node) -> bool:
    """Whether the node, or a body that it runs, may communicate with other ranks."""
    inner = any(_talks(each) for body in bodies(node).values() for each in body.nodes)
    call = node.op in ("call_function", "call_method")
    shared = is_dtensor(node.meta.get("example_value")) or "c10d" in target_name(node.target)
    return inner or (call and shared)
