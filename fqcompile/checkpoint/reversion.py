"""From a model's tensors to a checkpoint's, by the converters of transformers: as it saves models.

experts.gate_up_proj  ->  experts.0.gate_proj.weight, experts.0.up_proj.weight, experts.1. ...
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fqcompile.errors import CheckpointError
from fqcompile.hf_compat import conversion_mapping, converted_name, loading, renamed


@dataclass
class Reversion:
    """Some tensors of the model, by the pattern that they match, that become some of a checkpoint.

    `converter` is None where a name alone changes, to `target`.
    """

    target: str
    converter: Any
    renamings: list[Any]
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def run(self, model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors by name.

        Raises:
            CheckpointError: the tensors are not of shapes that can be converted.
        """
        if self.converter is None:
            (name,) = self.names
            return {self.target: tensors[name]}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, tensors[name])
        try:
            found = converter.convert(self.target, model=model, config=model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, StopIteration) as error:
            own = ", ".join(self.names[:3])
            raise CheckpointError(f"{own} cannot become {self.target}: {error}") from error
        return {self._renamed(k): v[0] if isinstance(v, list) else v for k, v in found.items()}

    def _renamed(self, name: str) -> str:
        return renamed(name, self.renamings)


def reversions(model: Any, names: Iterable[str]) -> list[Reversion]:
    """What becomes what when `save_pretrained` writes a model that was built from its config."""
    mapping = conversion_mapping(model, add_legacy=False)
    backwards = [
        entry.reverse_transform()
        for entry in reversed(mapping)
        if not isinstance(entry, loading().PrefixChange)  # whether there was a prefix nobody knows
    ]
    renamings = [m for m in backwards if isinstance(m, loading().WeightRenaming)]
    converters = [m for m in backwards if isinstance(m, loading().WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, Reversion] = {}
    for name in sorted(names, key=loading().dot_natural_key):
        target, pattern = converted_name(name, converters)
        if pattern is None:
            target, pattern = renamed(name, renamings), name
        entry = found.setdefault(target, Reversion(target, by_pattern.get(pattern), renamings))
        entry.sources.setdefault(pattern, []).append(name)
    return list(found.values())
