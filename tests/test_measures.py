"""The measures of the house: each part on a small tree, and what was reached is kept."""

from pathlib import Path

import pytest

from tests.oracle import measures
from tests.oracle.measures import WALKS, sources_of, static_measures

REACHED = (
    "modules below 60 lines with one importer",
    "files of bench that `bench models` imports",
    "length of host functions, median",
    "length of host functions, 90th percentile",
    "lines of the README",
)
TREE = {
    "fqcompile": "from fqcompile.backend import finequant\n",
    "fqcompile.backend": "from fqcompile.passes import match\nimport fqcompile.errors\n",
    "fqcompile.errors": "class FineQuantError(Exception): ...\n",
    "fqcompile.passes": '"""d"""\n',
    "fqcompile.passes.match": "import torch\nimport fqcompile.errors\n\nclass PackedPair: ...\n",
    "fqcompile.passes.long": "x = 1\n" * 60,
    "fqcompile.passes.fuse": "from fqcompile.passes.long import x\n\ndef f():\n    import torch\n",
}


@pytest.mark.parametrize("name", REACHED)
def test_what_was_reached_is_kept(name: str) -> None:
    readme = (measures.ROOT / "README.md").read_text(encoding="utf-8")
    measure = static_measures(sources_of(), readme)[name]
    assert measure.reached, f"{name}: {measure.value}, at most {measure.goal}"


def test_modules_with_one_importer_are_small_and_no_packages() -> None:
    found = measures.small_with_one_importer(TREE)
    assert found == ["fqcompile.backend", "fqcompile.passes.match"]


def test_imports_are_followed_into_functions_and_packages() -> None:
    tree = {"a": "", "a.b": "def f():\n    from a.c.d import x\n", "a.c": "", "a.c.d": "x = 1\n"}
    assert measures.imported_by(["a.b"], tree) == ["a", "a.b", "a.c", "a.c.d"]
    assert measures.imported_by(["a.c"], tree) == ["a", "a.c"]


def test_types_of_packed_weights_go_by_their_names() -> None:
    classes = "PackedPair", "QuantizedWeight", "Format", "WeightFormat", "_Packed"
    tree = {"a": "".join(f"class {name}: ...\n" for name in classes)}
    assert measures.packed_types(tree) == ["Format", "PackedPair", "QuantizedWeight"]


def test_kernels_are_no_host_functions() -> None:
    text = "@triton.jit\ndef k():\n    a = 1\n\n\n@cache\ndef f(\n    a,\n):\n    def g(): ...\n"
    assert sorted(measures.host_functions({"a": text})) == [1, 4]


def test_sources_are_modules_and_packages_of_the_folders(tmp_path: Path) -> None:
    for name in ("fqcompile/__init__.py", "bench/core/steps.py", "docs/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert sources_of(tmp_path) == {"fqcompile": "x = 1\n", "bench.core.steps": "x = 1\n"}


@pytest.mark.slow  # starts a process
def test_each_step_walks_through_the_package() -> None:
    found = measures.walks()
    assert set(found) == set(WALKS)
    assert "passes/match.py:match" in found[WALKS[0]]
    assert not any(name.startswith("passes/") for name in found[WALKS[1]])
    assert any(name.startswith("checkpoint/") for name in found["load"])
