"""Benchmarks stand alone: a folder imports its own files and core/, and no benchmark another."""

import ast
from collections.abc import Iterator
from pathlib import Path

from bench.__main__ import BENCHMARKS, MODULES, module_of

BENCH = Path(__file__).parents[2] / "bench"
FILES = {
    ".".join(path.relative_to(BENCH.parent).with_suffix("").parts): path
    for path in BENCH.rglob("*.py")
}
MOST_LINES, MOST_FILES = 300, 10


def imported(name: str) -> Iterator[str]:
    """The files of bench that this one imports."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (found for found in (*parts, str(node.module)) if found in FILES)


def reached(name: str) -> set[str]:
    found, todo = set(), [name]
    while todo:
        here = todo.pop()
        if here not in found:
            found.add(here)
            todo += imported(here)
    return found


def folder(name: str) -> str:
    """ "" of a file that lies in none."""
    return name.split(".")[1] if name.count(".") > 1 else ""


def test_no_benchmark_imports_another() -> None:
    for name in FILES:
        if folder(name):
            foreign = [n for n in imported(name) if folder(n) not in ("core", folder(name))]
            assert not foreign, f"{name} imports {foreign}: what is shared lies in bench/core"


def test_to_measure_models_few_files_are_read() -> None:
    found = reached(module_of("models")) - {module_of("models")}
    assert len(found) <= MOST_FILES, sorted(found)


def test_every_benchmark_is_a_module_with_a_main() -> None:
    assert set(MODULES) <= set(BENCHMARKS)
    for name in BENCHMARKS:
        tree = ast.parse(FILES[module_of(name)].read_text(encoding="utf-8"))
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def test_files_are_short() -> None:
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in FILES.items()}
    assert max(lines.values()) <= MOST_LINES, max(lines, key=lambda name: lines[name])
