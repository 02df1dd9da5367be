"""The backend "finequant", found through the entry point group torch_dynamo_backends."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx
from torch._dynamo.convert_frame import compile_lock

from fqcompile.config import FineQuantConfig
from fqcompile.locks import fork_safe
from fqcompile.passes.variants import compile_graph

fork_safe(compile_lock)  # held while this package quantizes: else a child could compile nothing


def finequant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Quantise the constant weights of one captured graph and compile it.

    Args:
        gm, example_inputs: as Dynamo passes them; the graph is copied, never changed.
        mode, options: as given to `torch.compile`; see `FineQuantConfig`.
        name: the graph's name in reports, where torch passes one.

    Raises:
        OptionError: an option is unknown or its value is not allowed.
    """
    return compile_graph(gm, example_inputs, FineQuantConfig.from_options(options, mode), name)
