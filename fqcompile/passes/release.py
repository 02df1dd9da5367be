"""Which originals a graph that runs quantised needs no more; each goes when its last site is done.

x -> linear(w) -> ... -> linear(w)       w goes after the second
embedding(ids, w), linear(x, w)          w stays: the embedding reads it as it is
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from fqcompile.passes.base import GraphState, part_of
from fqcompile.passes.fold import ConstantFolder
from fqcompile.passes.sites import ExpertSite, WeightSite
from fqcompile.quant.choose import QuantPlan
from fqcompile.weights.freed import freed_by, is_freed
from fqcompile.weights.packed import PackedPart
from fqcompile.weights.recipe import target_name
from fqcompile.weights.release import bring_back, module_counts, release, why_kept


def dense_readers(state: GraphState) -> dict[fx.Node, str]:
    """By constant input: what reads it that is no site which it is the weight of."""
    folder = ConstantFolder(state)
    sites = {site.node: site for site in state.sites}
    gathers = {n for s in state.sites if isinstance(s, ExpertSite) for n in s.gather}

    def reader(node: fx.Node) -> str | None:
        for user in node.users:
            site = sites.get(user)
            if site is not None and _only_weight(site, node):
                continue
            passes_on = user in gathers or folder.is_constant(user)
            found = reader(user) if passes_on else target_name(user.target)
            if found is not None:
                return found
        return None

    found = {source: reader(source) for source in state.constants}
    return {source: name for source, name in found.items() if name is not None}


def _only_weight(site: WeightSite, node: fx.Node) -> bool:
    routing = site.routing if isinstance(site, ExpertSite) else None
    return node is site.weight and node not in (site.x, site.bias, routing)


def undo(state: GraphState) -> list[str]:
    """Bring back, dequantised, what this compilation has freed; the parameters' names."""
    freed = [weight for weight in state.freed if is_freed(weight)]
    names = [freed_by(weight).name for weight in freed]
    for weight in freed:
        bring_back(weight)
    return names


class Releases:
    """The originals among `args`, told of each site's decision in turn.

    Two inputs may be one weight, so all is counted by the weights' identity.

    Attributes:
        now: free what no open site reads; else only say so in `kept`.
        kept: by the id of each weight that sites read: why it stays, or None where it goes.
        freed: what has been freed.
    """

    def __init__(self, state: GraphState, args: Sequence[Any], now: bool) -> None:
        self._state, self._args, self.now = state, args, now
        self._open = Counter(id(w) for site in state.sites for w in self._weights(site))
        self._parts: dict[int, dict[object, PackedPart]] = {}
        self.kept: dict[int, str | None] = {}
        self.freed: list[Tensor] = []
        for source, reader in state.dense_readers.items():
            self.kept[id(args[state.constants[source]])] = f"{reader} reads it as it is"
        for site in state.sites:
            if site.settled:
                self.decided(site, str(site.reason))

    def decided(self, site: WeightSite, decision: QuantPlan | str) -> None:
        """A site's plan, or why it stays."""
        for source, weight in zip(site.sources, self._weights(site), strict=True):
            self._open[id(weight)] -= 1
            if isinstance(decision, str):
                self.kept.setdefault(id(weight), f"{site.name} is kept: {decision}")
            else:
                part = part_of(self._state, site, decision)
                self._parts.setdefault(id(weight), {})[part.key] = part
            if not self._open[id(weight)] and id(weight) not in self.kept:
                self.kept[id(weight)] = self._let_go(source, weight)

    def _let_go(self, source: fx.Node, weight: Any) -> str | None:
        if is_freed(weight):
            return None
        parts = list(self._parts[id(weight)].values())
        reason = why_kept(weight, parts, self._modules)
        if reason is None and self.now:
            reason = release(weight, parts, self._state.names[source], self._state.name)
            self.freed += [] if reason else [weight]
        return reason

    @cached_property
    def _modules(self) -> Mapping[int, int]:
        return module_counts()

    def _weights(self, site: WeightSite) -> list[Any]:
        return [self._args[self._state.constants[source]] for source in site.sources]
