"""The decorator: a function or a forward method, compiled by FineQuant."""

from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

import torch

from fqcompile.backend import NAME
from fqcompile.config import FineQuantConfig

F = TypeVar("F", bound=Callable[..., Any])


@overload
def finequant(function: F, /) -> F: ...
@overload
def finequant(
    *, fullgraph: bool = False, dynamic: bool | None = None, **options: object
) -> Callable[[F], F]: ...
def finequant(
    function: F | None = None,
    /,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: object,
) -> F | Callable[[F], F]:
    """Compile a function or a forward method with `torch.compile(backend="finequant")`.

        @fqcompile.finequant
        def forward(self, x): ...

        @fqcompile.finequant(bits=8, fullgraph=True)
        def forward(self, x): ...

    Args:
        fullgraph, dynamic: as for `torch.compile`.
        options: those of `FineQuantConfig`; checked here, when the function is defined.

    Raises:
        OptionError: an option is unknown or its value is not allowed.
    """
    FineQuantConfig.from_options(options)

    def compile_function(function: F) -> F:
        compiled: Any = torch.compile(
            function,
            backend=NAME,
            fullgraph=fullgraph,
            dynamic=dynamic,
            options=dict(options) or None,  # type: ignore[arg-type]
        )
        return cast(F, compiled)

    return compile_function if function is None else compile_function(function)
