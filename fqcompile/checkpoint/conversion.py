"""Convert a checkpoint's tensors to a model's and back, with the converters of transformers.

experts.0.gate_proj.weight, experts.0.up_proj.weight, experts.1. ...  <->  experts.gate_up_proj
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fqcompile.checkpoint.hugging_face import BoundedComputing
from fqcompile.errors import CheckpointError
from fqcompile.hf_compat import (
    conversion_mapping,
    converted_name,
    initialize_missing,
    kept_types,
    loading,
    mark_initialized,
    move_missing,
    renamed,
)

Read = Callable[[str], Tensor]


@dataclass
class _Step:
    """A conversion of some tensors of one side into one or several of the other.

    `sources` maps each pattern to the names that match it; `target` is the first name of the
    result.
    """

    target: str
    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def _convert(
        self, model: Any, given: Callable[[str], Any], sources: dict[str, list[str]]
    ) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, names in sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, given(name))
        results = converter.convert(self.target, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in results.items()}

    @contextmanager
    def _refusing(self, names: str) -> Iterator[None]:
        """Turn errors that converters raise for unexpected tensors into a CheckpointError."""
        try:
            yield
        except (RuntimeError, ValueError, KeyError, IndexError, StopIteration) as error:
            raise CheckpointError(f"{names} cannot become {self.target}: {error}") from error


@dataclass
class Conversion(_Step):
    """A step from the checkpoint's tensors to the model's."""

    @property
    def targets(self) -> list[str]:
        """The names of the model's tensors that this step produces."""
        first, *others = getattr(self.converter, "target_patterns", [self.target])
        return [self.target, *(self.target.replace(first, other) for other in others)]

    def run(self, model: Any, read: Read) -> dict[str, Tensor]:
        """The model's tensors by name.

        Raises:
            CheckpointError: the tensors are not of shapes that can be converted.
        """
        with self._refusing(f"{', '.join(self.names[:3])}, ..."):
            if self._is_stack():
                return {self.target: self._stack(model, read)}
            return self._convert(model, lambda name: partial(read, name), self.sources)

    def _is_stack(self) -> bool:
        """Whether each expert can be converted alone."""
        operations = getattr(self.converter, "operations", [])
        kinds = [type(operation).__name__ for operation in operations]
        return (
            kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
            and [operation.dim for operation in operations] in ([0], [0, 1])
            and len({len(names) for names in self.sources.values()}) == 1
        )

    def _stack(self, model: Any, read: Read) -> Tensor:
        """Convert expert by expert: converting the whole stack at once needs twice the memory."""
        experts = len(next(iter(self.sources.values())))
        result: Tensor | None = None
        for expert in range(experts):
            own = {pattern: [names[expert]] for pattern, names in self.sources.items()}
            (matrix,) = self._convert(model, lambda name: partial(read, name), own).values()
            if result is None:
                result = matrix.new_empty((experts, *matrix.shape[1:]))
            result[expert] = matrix[0]
        assert result is not None
        return result


def conversions(model: Any, names: Iterable[str]) -> tuple[list[Conversion], list[str]]:
    """The steps in the order of `from_pretrained`, and tensor names that the model lacks."""
    mapping = conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, loading().WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, loading().WeightConverter)]
    converters += _of_single_experts(model)
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Conversion] = {}
    unknown = []
    for name in sorted(names, key=loading().dot_natural_key):
        target, pattern = loading().rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = loading().rename_source_key(name, [], [], prefix, known)
        if target not in known:
            unknown.append(name)
            continue
        if pattern is None:
            pattern, converter = name, loading().WeightRenaming(name, target)
        else:
            converter = by_pattern[pattern]
        conversion = found.setdefault(target, Conversion(target, converter))
        conversion.sources.setdefault(pattern, []).append(name)
    return list(found.values()), unknown


def _of_single_experts(model: Any) -> list[Any]:
    """Steps for Llama 4, whose quantized checkpoints have one linear per expert, not [E, K, N].

    transformers then builds the model with these linears, and has no converters for the names.
    """
    if not any(type(module).__name__ == "Llama4TextExperts" for module in model.modules()):
        return []
    merge, turn = loading().MergeModulelist(0), loading().Transpose(1, 2)
    parts = [f"feed_forward.experts.*.{own}_proj.weight" for own in ("gate", "up", "down")]
    gate_up, down = (f"feed_forward.experts.{own}_proj" for own in ("gate_up", "down"))
    return [
        loading().WeightConverter(parts[:2], gate_up, [merge, loading().Concatenate(1), turn]),
        loading().WeightConverter(parts[2], down, [merge, turn]),
    ]


def target_types(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """The dtype in which `from_pretrained` would load a tensor of that name."""
    known, plan = model.state_dict(), kept_types(model, dtype)
    pattern = loading().build_glob_alternation(plan)[0] if plan else None

    def of(name: str) -> torch.dtype:
        if pattern is not None and pattern.search(name):
            return torch.float32  # what models keep in a type of its own, they keep in this
        own: torch.dtype = known[name].dtype
        return own

    return of


def initialize(model: Any, missing: Iterable[str], where: object) -> None:
    """Compute tensors that a checkpoint lacks: buffers such as rotary frequencies, and `missing`.

    All others are marked as initialized and stay on the meta device. `where` is for errors.

    Raises:
        CheckpointError: the tensors would be absurdly large.
    """
    names = set(missing)
    with BoundedComputing(where):
        move_missing(model, names)
        for name, tensor in _state(model):
            if name not in names:
                mark_initialized(tensor)
        initialize_missing(model)


def _state(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters(remove_duplicate=False)
    persistent = model.state_dict(keep_vars=True)
    yield from ((n, b) for n, b in model.named_buffers() if n in persistent)


@dataclass
class Reversion(_Step):
    """A step from the model's tensors to a checkpoint's, as transformers saves models.

    `converter` is None if only the name changes, to `target`.
    """

    renamings: list[Any] = field(default_factory=list)

    def run(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors by name.

        Raises:
            CheckpointError: the tensors are not of shapes that can be converted.
        """
        if self.converter is None:
            (name,) = self.names
            return {self.target: tensors[name]}
        with self._refusing(", ".join(self.names[:3])):
            found = self._convert(model, tensors.__getitem__, self.sources)
        return {self._renamed(name): tensor for name, tensor in found.items()}

    def _renamed(self, name: str) -> str:
        return renamed(name, self.renamings)


def reversions(model: Any, names: Iterable[str]) -> list[Reversion]:
    """The steps by which `save_pretrained` writes a model that was built from its config."""
    mapping = conversion_mapping(model, add_legacy=False)
    backwards = [
        entry.reverse_transform()
        for entry in reversed(mapping)
        if not isinstance(entry, loading().PrefixChange)  # it is unknown if there was one
    ]
    renamings = [m for m in backwards if isinstance(m, loading().WeightRenaming)]
    converters = [m for m in backwards if isinstance(m, loading().WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, Reversion] = {}
    for name in sorted(names, key=loading().dot_natural_key):
        target, pattern = converted_name(name, converters)
        if pattern is None:
            target, pattern = renamed(name, renamings), name
        entry = found.setdefault(
            target, Reversion(target, by_pattern.get(pattern), renamings=renamings)
        )
        entry.sources.setdefault(pattern, []).append(name)
    return list(found.values())
