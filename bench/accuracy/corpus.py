"""Text that is on every machine: the standard library's sources, and their docstrings with them.

A file is held out by the hash of its name, never a part of a file; its bytes are counted as read.
"""

import ast
import hashlib
import re
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

SUFFIXES = (".py", ".txt")
# Tests repeat each other, and tables of code points are no language.
_SKIPPED = set("site-packages dist-packages __pycache__ test tests idle_test encodings".split())
_HELD_OUT = 12  # one file in so many
_LEAST_BYTES = 2000
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class Document:
    """A file: its name below the library's folder, and its text."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % _HELD_OUT == 0


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and to evaluate on, each in the order of their names' hashes."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """Of all names and texts: another Python has another library."""
        whole = hashlib.sha256()
        for document in (*self.train, *self.held_out):
            whole.update(f"{document.name}\0{document.text}\0".encode())
        return whole.hexdigest()[:12]


def split(documents: list[Document]) -> Corpus:
    """Held out are one in twelve; the order is fixed by the names alone, and like a shuffle."""
    shuffled = sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).hexdigest())
    train = tuple(d for d in shuffled if not d.held_out)
    return Corpus(train, tuple(d for d in shuffled if d.held_out))


@lru_cache
def stdlib_corpus() -> Corpus:
    """The library of the Python that runs this, about 12 MB; files that are not UTF-8 left out."""
    root = Path(sysconfig.get_path("stdlib"))
    return split([d for path in sorted(root.rglob("*")) for d in _read(path, root)])


def _read(path: Path, root: Path) -> list[Document]:
    name = path.relative_to(root)
    if path.suffix not in SUFFIXES or _SKIPPED & set(name.parts) or not path.is_file():
        return []
    content = path.read_bytes()
    if len(content) < _LEAST_BYTES:
        return []
    try:
        return [Document(name.as_posix(), content.decode())]
    except UnicodeDecodeError:
        return []


def german_text() -> str:
    """The messages of Django's German translation, about 3500 words; "" if it is not installed."""
    found = find_spec("django")
    folders = [] if found is None else found.submodule_search_locations or []
    paths = sorted(p for f in folders for p in Path(f).rglob("locale/de/LC_MESSAGES/*.po"))
    entries = [e for p in paths for e in p.read_text(encoding="utf-8").split("\n\n")[1:]]
    return "\n".join(filter(None, map(_translation, entries)))


def _translation(entry: str) -> str:
    """Of an entry of a .po file; its last form, where it has a plural."""
    return "".join(map(ast.literal_eval, _STRING.findall(entry.rpartition("\nmsgstr")[2])))
