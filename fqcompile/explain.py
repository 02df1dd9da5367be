"""A dry run: what the backend would do to a model, without compiling it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fqcompile.config import FineQuantConfig
from fqcompile.dry_run import dry_run
from fqcompile.passes.pipeline import Recorder, analyse
from fqcompile.passes.summary import plan_of
from fqcompile.report import Plan, Site


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
        state = analyse(module, args, measuring_nothing, Recorder())
        for site in plan_of(state).sites:
            # A weight met in several graphs, as after a graph break, is one site.
            sites.setdefault((site.name, hash(site.shape)), site)

    dry_run(model, example_inputs, example_kwargs or {}, collect)
    return Plan(tuple(sites.values()), config.as_dict())
