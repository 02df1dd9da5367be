"""The backend "finequant", found through the entry point group torch_dynamo_backends.

This module registers the backend when it is imported, in one thread that holds the import lock.
torch would register an entry point in every thread that asks for the name before it is known, and
all threads but the first would fail with "duplicate name". So the entry point is None, for which
torch registers nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fqcompile.config import FineQuantConfig
from fqcompile.locks import fork_safe
from fqcompile.passes.variants import compile_graph
from fqcompile.torch_compat import compile_lock, register_backend

fork_safe(compile_lock)  # held while this package quantizes: else a child could compile nothing


def finequant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Quantize the constant weights of one captured graph and compile it.

    Args:
        gm, example_inputs: as Dynamo passes them; the graph is copied, never modified.
        mode, options: as given to `torch.compile`; see `FineQuantConfig`.
        name: the graph's name in reports, if torch passes one.

    Raises:
        OptionError: an option is unknown or its value is not allowed.
    """
    return compile_graph(gm, example_inputs, FineQuantConfig.from_options(options, mode), name)


NAME = "finequant"
register_backend(finequant, name=NAME)
REGISTERED = None
