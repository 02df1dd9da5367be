"""A dry run: what the backend would do to a model, without compiling it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from fqcompile.config import FineQuantConfig
from fqcompile.dry_run import dry_run
from fqcompile.passes.choose import way_out
from fqcompile.passes.localize import localize
from fqcompile.passes.pipeline import Recorder, analyse
from fqcompile.passes.summary import plan_of
from fqcompile.report import Plan, Site

_INDEX = re.compile(r"\[\d+\]$")  # match numbers the parts of one parameter
_NO_GRAPH = (
    "no captured graph reads it: these inputs do not reach it, or a loop over data broke the graph"
)


def explain(
    model: Callable[..., Any],
    *example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: object,
) -> Plan:
    """What `torch.compile(model, backend="finequant", options=options)` would do, as a plan.

    The model runs once, eagerly, on the example inputs; its weights are not changed.

    Raises:
        OptionError: an option is unknown or its value is not allowed.
        UnquantizableWeight: a site must be kept and `on_unsupported="error"`.
    """
    config = FineQuantConfig.from_options(options)
    measuring_nothing = replace(config, autotune="off")
    sites: dict[tuple[str, int], Site] = {}

    def collect(module: fx.GraphModule, args: Sequence[Any]) -> None:
        local = localize(module, args)
        state = analyse(local.module, local.arguments(args), measuring_nothing, Recorder())
        for site in plan_of(state).sites:
            # A weight met in several graphs, as after a graph break, is one site.
            sites.setdefault((site.name, hash(site.shape)), site)

    dry_run(model, example_inputs, example_kwargs or {}, collect)
    unseen = _unseen(model, sites.values(), config.min_elements)
    return Plan((*sites.values(), *unseen), config.as_dict())


def _unseen(model: object, sites: Iterable[Site], min_elements: int) -> Iterator[Site]:
    """The matrices of a module that no graph reads, as sites that are kept."""
    names = {_INDEX.sub("", name) for site in sites for name in site.name.split("+")}
    parameters = model.named_parameters() if isinstance(model, nn.Module) else ()
    modules = model.modules() if isinstance(model, nn.Module) else ()
    experts_way_out = way_out({type(module).__module__ for module in modules})
    for name, weight in parameters:
        if weight.dim() not in (2, 3) or weight.numel() < min_elements:
            continue
        # a graph that began inside a submodule knows the end of the name
        if any(name == known or name.endswith(f".{known}") for known in names):
            continue
        stacked = weight.dim() == 3
        yield Site(
            name=name,
            kind="experts" if stacked else "linear",
            shape=tuple(weight.shape),
            status="kept",
            reason=_NO_GRAPH + (experts_way_out if stacked else ""),
            bytes_before=weight.nbytes,
            bytes_after=weight.nbytes,
        )
