"""What became of one weight: the row of a plan or of a compile report."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

LeastTime = float | Callable[[], float | None] | None


class _OnceAsked:
    """A field that is given as a number, or as what computes it when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, site: Any, owner: type | None = None) -> float | None:
        value: LeastTime = None if site is None else site.__dict__[self._name]
        if callable(value):
            value = site.__dict__[self._name] = value()
        return value

    def __set__(self, site: Any, value: LeastTime) -> None:
        site.__dict__[self._name] = value


@dataclass(frozen=True, kw_only=True)
class Site:
    """A linear or a stack of experts whose weight was looked at.

    `shape` is (N, K) or (E, N, K), `group_size` is K where one scale serves a whole column, and
    `relative_error` is the delivered ‖w-ŵ‖/‖w‖; `expert_errors` has that of each expert. `least_us`
    is what moving its bytes takes, or on a GPU computing if that is longer, for the rows of the
    example call; a CPU's bandwidth is measured when it is first asked for. `recipe` says how to
    find the weight in a model again; it is there for `fake_quantize_` and never written out.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    status: str
    reason: str | None = None
    bits: int | None = None
    group_size: int | None = None
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None
    expert_errors: tuple[float, ...] | None = None
    kernel: str | None = None
    least_us: _OnceAsked = _OnceAsked()
    recipe: object | None = field(default=None, repr=False, compare=False)

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def per_column(self) -> bool:
        """Whether one scale serves each whole output column."""
        return self.group_size is not None and self.group_size >= self.shape[-1]

    def but(self, **changes: object) -> Self:
        """The row with these changes; what is computed when it is first read is not computed."""
        return replace(self, **{"least_us": vars(self)["least_us"], **changes})

    def as_dict(self) -> dict[str, object]:
        """The fields as JSON holds them, without the recipe."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recipe"}
        return {**named, "shape": list(self.shape)}
