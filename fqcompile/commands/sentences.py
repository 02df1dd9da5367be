"""Real sentences that every Python has: first lines of the standard library's docstrings."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_MIN_LENGTH, _MAX_LENGTH = 40, 120


def stdlib_sentences(count: int) -> list[str]:
    """The first `count` distinct sentences, in an order that does not depend on the machine."""
    sentences: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for sentence in _docstring_sentences(path):
            sentences[sentence] = None
            if len(sentences) == count:
                return list(sentences)
    return list(sentences)


def _docstring_sentences(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if _MIN_LENGTH <= len(line) <= _MAX_LENGTH and line.endswith("."):
                yield line
