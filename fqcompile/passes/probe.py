"""Probe: run a graph eagerly before planning, to record the inputs of its matmuls.

x = embedding(ids, w_0); y = linear(x, w_1); ...   ->   x = embedding(ids, w_0); note(0, x);
                                                        y = linear(x, w_1); ...; note(9, z)

Products that read the same rows share a note. The graph runs up to its last note, on inputs that
`probe_inputs` makes from those of a call. Other instances of the class run the same graph with
their own weights.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from fqcompile.distributed.shards import is_dtensor
from fqcompile.passes.effects import bodies, has_effects
from fqcompile.passes.probe_inputs import (
    Sizes,
    Tables,
    copied,
    each_run,
    has_places,
    many_short,
    sizes_of,
    tables_of,
)
from fqcompile.passes.state import GraphState, WeightSite, copy_module, example, placeholders
from fqcompile.quant.calibration import Moments, fixed_random_numbers
from fqcompile.torch_compat import FakeTensor
from fqcompile.weights.recipe import target_name

log = logging.getLogger("fqcompile")

# What enters a range, and what leaves it: autocast, and the levels of torch.func and forward AD.
_RANGES = {
    "_enter_autocast": "_exit_autocast",
    "_saved_tensors_hooks_disable": "_saved_tensors_hooks_enable",
    "_vmap_increment_nesting": "_vmap_decrement_nesting",
    "_grad_increment_nesting": "_grad_decrement_nesting",
    "_jvp_increment_nesting": "_jvp_decrement_nesting",
    "_enter_dual_level": "_exit_dual_level",
}
_MODES = frozenset(("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"))


class ProbeError(Exception):
    """A graph could not be run as a probe; the message says why."""


def note(number: int, x: Tensor, routing: Tensor | None) -> None:
    """Marks a product in the graph: the interpreter records the arguments."""


@dataclass(frozen=True)
class Probe:
    """A graph up to its last product.

    Attributes:
        sites: the sites; a note's number is the index here of the first one that it is for.
        numbers: for each site, the number of its note.
        tables: see `tables_of`.
        keeps_sizes: see `has_places`.
        written: positions of inputs that a run may write to.
        talks: whether the graph has collectives, which all ranks must run.
        begin: the begin token of the model that was compiled first; other instances of the class
            that run this graph get the same.
    """

    module: fx.GraphModule
    sites: Sequence[WeightSite]
    numbers: Sequence[int]
    tables: Mapping[int, int]
    keeps_sizes: bool
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
        module, numbers = _noted(state, sites)
        talks = any(_talks(node) for node in module.graph.nodes)
        tables = tables_of(state, max(site.node for site in sites)) if sites else {}
        arguments = [n for n, node in enumerate(inputs) if node not in state.named]
        keeps = has_places(placeholders(module.graph), arguments, tables)
        return cls(module, sites, numbers, tables, keeps, written, talks, state.begin_token)

    def run(self, args: Sequence[Any], *, random: bool) -> tuple[list[Moments], str]:
        """Run the graph; return the moments of each site's inputs, and what the inputs were.

        `random`: replace token ids, if the graph has any, by random ones. If it does not run on
        these, or to values that are not finite, it runs on those of the call, unless it has
        collectives.

        Raises:
            ProbeError: the graph could not be run; the message says why.
        """
        if any(isinstance(arg, FakeTensor) for arg in args):
            raise ProbeError("the values of its inputs are not available while it is compiled")
        inputs, failed = placeholders(self.module.graph), ""
        for sizes, tables in self._attempts(args, random):
            each = [Moments(site.shape) for site in self.sites]
            moments = [each[number] for number in self.numbers]
            devices = [arg.device for arg in args if isinstance(arg, Tensor)]
            try:
                with fixed_random_numbers(devices):
                    for given in each_run(inputs, args, sizes, tables, self.written, self.begin):
                        _Interpreter(self, moments).whole(given)
                if tables and not self.talks:  # else there is nothing else to run on
                    self._check_finite(each)
            except Exception as error:
                log.debug("a probe failed at sizes %s", sizes, exc_info=True)
                failed = f"{type(error).__name__}: {error}"
            else:
                instead = f", since random ids failed: {failed}" if failed else ""
                return moments, "synthetic" if tables else f"first_call{instead}"
        raise ProbeError(failed)

    def _check_finite(self, each: Sequence[Moments]) -> None:
        """Raise where a row is not, as of ids that no call has: it hides all that are."""
        for site, moments in zip(self.sites, each, strict=True):
            if not moments.total.isfinite().all():
                raise ValueError(f"inputs of {site.name} are not finite")

    def _attempts(self, args: Sequence[Any], random: bool) -> Iterator[tuple[Sizes, Tables]]:
        """Sizes and tables to run at, one after the other until a run succeeds.

        A graph may be valid for some sizes only, as for sequences within a window, or for some ids.
        """
        inputs = placeholders(self.module.graph)
        own, tables = sizes_of(inputs, args), self.tables if random else {}
        if tables:
            short = own if self.keeps_sizes else many_short(inputs, own, tables)
            if short != own:
                yield short, tables
            yield own, tables
        if not (tables and self.talks):  # other ranks, where ids did not fail, would not run again
            yield own, {}


def _is_parameter(value: object) -> bool:
    return isinstance(value, nn.Parameter)


class _Interpreter(fx.Interpreter):
    """Runs a graph with notes, without gradients; `whole` leaves every range even on an error."""

    def __init__(self, probe: Probe, moments: Sequence[Moments]) -> None:
        super().__init__(probe.module)
        self.extra_traceback = False  # or it would print the graph into the message of an error
        self._probe, self._moments = probe, moments
        self._leave: list[Callable[[], object]] = []  # the ranges that were entered, in order
        calls = [node.target for node in probe.module.graph.nodes if node.op == "call_function"]
        self._leaving = {target_name(target): target for target in calls}
        self._attributes: dict[str, Any] = {}

    def whole(self, inputs: Sequence[Any]) -> None:
        try:
            self.run(*inputs, enable_io_processing=False)
        finally:
            for leave in reversed(self._leave):
                leave()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is note:
            number, x, routing = args
            count_rows(self._moments[number], self._probe.sites[number], x, routing)
            return None
        name = target_name(target)
        if name in _MODES:
            return None
        result = super().call_function(target, args, kwargs)
        if name == "_enter_autocast":  # the graph may end inside of it
            self._leave.append(partial(result.__exit__, None, None, None))
        elif name in _RANGES:
            self._leave.append(self._leaving[_RANGES[name]])
        elif name in _RANGES.values():
            self._leave.pop()
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Copy a tensor attribute of the graph once: any node may write to it."""
        if target not in self._attributes:
            value = super().get_attr(target, args, kwargs)
            fixed = not isinstance(value, Tensor) or _is_parameter(value)
            self._attributes[target] = value if fixed else copied([value], {})[0]
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


def _rows_of(site: WeightSite) -> tuple[object, ...]:
    """What `count_rows` depends on, of a product without experts."""
    roles = site.contraction
    order = [roles.x_dims.index(i) for i in (*roles.rows, *roles.contracted)]
    return roles.x, roles.x_singles, tuple(order), site.shape[-1]


def _experts(site: WeightSite, ids: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """The expert of each element of the batch, flat on the CPU, and the sizes of the batch."""
    if ids is not None:
        return ids.flatten().cpu(), tuple(ids.shape)
    roles, out = site.contraction, example(site.node)
    assert out is not None
    sizes = tuple(int(out.shape[roles.out_dims.index(i)]) for i in roles.batch)
    return torch.arange(prod(sizes), device="cpu"), sizes


def _notes(state: GraphState, sites: Sequence[WeightSite]) -> Iterator[int]:
    """The number of each site's note: its own, or of an earlier one that counts the same rows."""
    known: dict[object, int] = {}
    number = {site.node: number for number, site in enumerate(sites)}
    for node in state.graph.nodes:
        if has_effects(node):  # it may write to the rows
            known.clear()
        if node in number:
            site, own = sites[number[node]], number[node]
            yield own if site.contraction.of_experts else known.setdefault(_rows_of(site), own)


def _noted(state: GraphState, sites: Sequence[WeightSite]) -> tuple[fx.GraphModule, list[int]]:
    """A copy of the graph with notes, truncated after the last of them; the number of each site."""
    module, mapping = copy_module(state.module)
    graph, last, numbers = module.graph, None, list(_notes(state, sites))
    for number in sorted(set(numbers)):
        site = sites[number]
        roles = site.contraction
        routing = None if roles.routing is None else mapping[roles.routing]
        with graph.inserting_before(mapping[site.node]):
            last = graph.call_function(note, (number, mapping[roles.x], routing))
    graph.output_node().args = (None,)
    for node in reversed([n for n in graph.nodes if n.op not in ("placeholder", "output")]):
        if node is last:
            break
        graph.erase_node(node)
    return module, numbers


def _talks(node: fx.Node) -> bool:
    """Whether the node, or a body that it runs, may communicate with other ranks."""
    inner = any(_talks(each) for body in bodies(node).values() for each in body.nodes)
    call = node.op in ("call_function", "call_method")
    shared = is_dtensor(node.meta.get("example_value")) or "c10d" in target_name(node.target)
    return inner or (call and shared)
