"""What became of one weight: the row of a plan or of a compile report."""

import math
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, kw_only=True)
class Site:
    """A linear or a stack of experts whose weight was looked at.

    `shape` is (N, K) or (E, N, K), `group_size` is K where one scale serves a whole column, and
    `relative_error` is the delivered ‖w-ŵ‖/‖w‖; `expert_errors` has that of each expert. `least_us`
    is what moving its bytes takes, or on a GPU computing if that is longer, for the rows of the
    example call. With `free_weights`, `freed` says whether the original was released, else
    `not_freed` why. `recipe` says how to find the weight in a model again; it is there for
    `fake_quantize_` and never written out.
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
    least_us: float | None = None
    recipe: object | None = field(default=None, repr=False, compare=False)

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def per_column(self) -> bool:
        """Whether one scale serves each whole output column."""
        return self.group_size is not None and self.group_size >= self.shape[-1]

    def as_dict(self) -> dict[str, object]:
        """The fields as JSON holds them, without the recipe."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recipe"}
        return {**named, "shape": list(self.shape)}
