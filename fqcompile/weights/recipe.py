"""WeightRecipe: how a site's matrix [N, K] is computed from constant inputs of the graph.

    w_q, w_k, w_v --cat--> [3N, K]        in_proj --chunk--> [0] --t--> [K, N]

Folding the weight-only part of a graph into a recipe gives later passes a single matrix, and allows
the same steps to be run again on another instance's weights.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fqcompile.errors import UnquantizableWeight
from fqcompile.torch_compat import OpOverload, OpOverloadPacket, memory_id, tree_map_only

# Pure functions and methods that only move elements: each element of the result is one of a source.
MOVING = frozenset(
    """t T mT transpose swapaxes swapdims permute movedim view reshape contiguous flatten unflatten
    squeeze unsqueeze expand expand_as narrow select chunk split tensor_split unbind cat concat
    concatenate stack hstack vstack clone detach alias adjoint getitem getattr broadcast_to
    _get_data_attr""".split()
)
CASTS = frozenset("to float half bfloat16 type".split())
# Pure arithmetic: merged adapters, normalized weights. Foldable, but not invertible.
ARITHMETIC = frozenset(
    """add sub mul div truediv neg matmul mm bmm addmm linear norm sum mean abs sqrt rsqrt square
    pow reciprocal exp tanh sigmoid softplus norm_except_dim _weight_norm amax amin maximum minimum
    clamp clamp_min clamp_max linalg_norm linalg_vector_norm normalize mv dot vdot outer einsum
    round""".split()
)
FOLDABLE = MOVING | CASTS | ARITHMETIC
_REPEATING = frozenset("expand expand_as broadcast_to repeat repeat_interleave tile".split())


@dataclass(frozen=True)
class Ref:
    """The index of a value: the sources come first, then the results of the steps."""

    index: int


@dataclass(frozen=True, eq=False)
class Step:
    """One folded node; `args` and `kwargs` name earlier values by `Ref`."""

    target: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return target_name(self.target)

    def run(self, values: list[Any]) -> Any:
        args, kwargs = tree_map_only(Ref, lambda r: values[r.index], (self.args, self.kwargs))
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


def target_name(target: object) -> str:
    """A call's plain name: "cat" for torch.cat, "getitem" for operator.getitem.

    An overload of an aten operator has its operator's name: "cat" for aten.cat.default. A function
    that is not PyTorch's own keeps its full name: another library's `mm` is not torch.mm.
    """
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload | OpOverloadPacket):
        packet = str(getattr(target, "overloadpacket", target))
        return packet.removeprefix("aten.") if packet.startswith("aten.") else str(target)
    name = str(getattr(target, "__name__", target))
    package = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    known = package in ("torch", "_operator", "math", "builtins")
    return name if known else f"{package}.{name}"


@dataclass(frozen=True, eq=False)
class WeightRecipe:
    """Steps from `num_sources` constant tensors to one matrix. No steps: the source itself."""

    num_sources: int = 1
    steps: tuple[Step, ...] = ()

    def __call__(self, *sources: Tensor) -> Tensor:
        values: list[Any] = list(sources)
        for step in self.steps:
            values.append(step.run(values))
        result: Tensor = values[-1]
        return result

    def then(self, method: str, *args: Any) -> "WeightRecipe":
        """This recipe followed by one more tensor method on its result."""
        last = Ref(self.num_sources + len(self.steps) - 1)
        return WeightRecipe(self.num_sources, (*self.steps, Step(method, (last, *args), {})))

    @cached_property
    def key(self) -> str:
        """A key that is equal, in every graph, for recipes that compute the same."""
        steps = ";".join(f"{s.name}{s.args}{sorted(s.kwargs.items())}" for s in self.steps)
        return f"{self.num_sources}:{steps}"

    @property
    def repeats(self) -> bool:
        """Whether matrices of a stack may be one and the same, which must keep equal codes."""
        return any(step.name in _REPEATING for step in self.steps)

    def check_writable(self) -> None:
        """Check that each element of the result is an element of a source.

        Raises:
            UnquantizableWeight: a step computes (adds, multiplies), so there is no one element to
                write to.
        """
        for step in self.steps:
            if step.name not in MOVING | CASTS:
                raise UnquantizableWeight(
                    f"the weight is computed by {step.name!r} from other tensors, so its "
                    "dequantized value has no place to be written; merge it into one parameter"
                )

    def write_back(self, sources: tuple[Tensor, ...], value: Tensor) -> None:
        """Store `value` [N, K] into the sources' elements that the recipe reads, in place.

        Raises:
            UnquantizableWeight: see `check_writable`.
        """
        self.check_writable()
        flat = torch.cat([s.detach().reshape(-1) for s in sources])
        flat[self._element_indices(sources).reshape(-1)] = value.reshape(-1).to(flat.dtype)
        parts = flat.split([s.numel() for s in sources])
        with torch.no_grad():
            for source, part in zip(sources, parts, strict=True):
                source.copy_(part.view(source.shape))

    def elements_read(self, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """For each source, the flat mask of its elements that occur in the result."""
        sizes = [source.numel() for source in sources]
        mask = torch.zeros(sum(sizes), dtype=torch.bool, device=sources[0].device)
        mask[self._element_indices(sources).reshape(-1)] = True
        masks: tuple[Tensor, ...] = mask.split(sizes)
        return masks

    def _element_indices(self, sources: tuple[Tensor, ...]) -> Tensor:
        """For each element of the result, its position in the concatenated sources."""
        values: list[Any] = []
        offset = 0
        for source in sources:
            index = torch.arange(offset, offset + source.numel(), device=source.device)
            values.append(index.view(source.shape))
            offset += source.numel()
        result: Tensor = self._places(values)
        return result

    def _places(self, values: list[Any]) -> Any:
        """The result of the steps on the sources `values`, with casts ignored."""
        for step in self.steps:
            cast = step.name in CASTS
            values.append(values[step.args[0].index] if cast else step.run(values))
        return values[-1]


IDENTITY = WeightRecipe()
TRANSPOSE = WeightRecipe(1, (Step("t", (Ref(0),), {}),))
_PLAINEST = (IDENTITY, IDENTITY.then("transpose", -2, -1))


def simplified(recipe: WeightRecipe, sources: tuple[Tensor, ...]) -> WeightRecipe:
    """The recipe, or the identity or one transpose if its result is the same view of its source.

    A weight that is read as w and elsewhere through w.mT.mT then has one packed copy.
    """
    if recipe.num_sources != 1 or any(step.name not in MOVING for step in recipe.steps):
        return recipe
    (source,) = sources
    result = recipe(source)
    for plain in _PLAINEST:
        if source.dim() >= 2 and _is_same_view(plain(source), result):
            return plain
    return recipe


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    same_memory = memory_id(a) == memory_id(b)
    places = [(t.shape, t.stride(), t.storage_offset(), t.dtype) for t in (a, b)]
    return same_memory and places[0] == places[1]


assert operator.getitem.__name__ in MOVING
