"""What wrote a directory: for whoever wonders about one years later."""

from importlib.metadata import version
from importlib.util import find_spec


def versions() -> dict[str, str]:
    """Of fqcompile, torch and, where it is installed, transformers."""
    names = [name for name in ("fqcompile", "torch", "transformers") if find_spec(name)]
    return {name: version(name) for name in names}
