"""Reading a config.json that anybody may have written: each key is there and a sensible number."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fqcompile.errors import EstimateError

_MOST = 10**9  # more than any side of a model: a slip of the pen


@dataclass(frozen=True)
class ConfigFields:
    """The content of a config.json, and where it is from.

    Where versions of transformers spell a key differently, a name is both, with " or " between.
    """

    content: Mapping[str, Any]
    where: str

    def require(self, *names: str) -> None:
        """Raise, with all of them, where keys are missing."""
        missing = [name for name in names if self._value(name) is None]
        if missing:
            kind = self.content.get("model_type")
            raise EstimateError(
                f"{self.where} lacks {', '.join(missing)}, which a model of type {kind!r} has"
            )

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` up; `default` where the key is absent or null."""
        value = self._value(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= _MOST:
            raise EstimateError(
                f"{self.where}: {name} is {value!r}; it must be a whole number from {least} to "
                f"{_MOST}"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise EstimateError(f"{self.where}: {name} is {value!r}; it must be true or false")
        return value

    def has(self, name: str) -> bool:
        """Whether the key is there, and not null."""
        return self._value(name) is not None

    def _value(self, name: str) -> Any:
        found = (self.content.get(spelling) for spelling in name.split(" or "))
        return next((value for value in found if value is not None), None)

    def layer_numbers(self, name: str) -> list[int]:
        """A list of numbers of layers, empty where there is none."""
        value = self._value(name) or []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise EstimateError(f"{self.where}: {name} is {value!r}; it must list layer numbers")
        return value


def read_fields(path: Path) -> ConfigFields:
    """The keys of a config.json.

    Raises:
        EstimateError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EstimateError(f"{path} cannot be read: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise EstimateError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise EstimateError(f"{path} holds a {type(content).__name__}, not the keys of a model")
    return ConfigFields(content, str(path))
