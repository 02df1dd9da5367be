"""How large the house is, and how much of it one weight walks through, beside what is aimed at.

    python -m tests.oracle.measures [--static] [--names]     # --static: runs nothing of the package

A walk is the files and functions of the package that a step runs, in a fresh process with an empty
cache, for Linear, ReLU, Linear under the inner backend "eager". Lines are those of Python files.
"""

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import torch
from tabulate import tabulate
from torch import nn

import fqcompile
from bench.__main__ import module_of
from fqcompile.backend import finequant

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("fqcompile", "bench", "tests")
WALKS = ("compile, first call", "second call", "quantize_", "its eager call", "save", "load")
SMALL = 60  # lines below which a module that one other imports could be a part of it
_PACKED = re.compile(r"(Packed|Quantized)\w*|Format")  # names of types that describe such a weight
Sources = Mapping[str, str]  # {"bench.core.steps": text}; a package is called as its folder


@dataclass(frozen=True)
class Measure:
    """One number, the most that it may become, and what it counts."""

    value: float
    goal: float
    names: Sequence[str] = ()

    @property
    def reached(self) -> bool:
        return self.value <= self.goal


def sources_of(root: Path = ROOT) -> dict[str, str]:
    """The text of every module below the folders of the checkout."""
    found = {}
    for path in sorted(p for folder in FOLDERS for p in (root / folder).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def static_measures(sources: Sources, readme: str) -> dict[str, Measure]:
    """What the sources alone tell."""
    package = _below("fqcompile", sources)
    lengths = sorted(host_functions(package))
    lonely, packed = small_with_one_importer(package), packed_types(package)
    bench = imported_by(["bench.__main__", module_of("models")], _below("bench", sources))
    return {
        "lines of the package": Measure(_lines(package), 19_000),
        "files of the package": Measure(len(package), 150),
        f"modules below {SMALL} lines with one importer": Measure(len(lonely), 10, lonely),
        "types that describe a packed weight": Measure(len(packed), 4, packed),
        "length of host functions, median": Measure(statistics.median(lengths), 9),
        "length of host functions, 90th percentile": Measure(
            statistics.quantiles(lengths, n=10)[-1], 28
        ),
        "lines of bench": Measure(_lines(_below("bench", sources)), 7_000),
        # Ten, and two since for llama.cpp: its calls, and the file that it reads.
        "files of bench that `bench models` imports": Measure(len(bench), 12, bench),
        "lines of tests": Measure(_lines(_below("tests", sources)), 27_000),
        "lines of the README": Measure(len(readme.splitlines()), 150),
    }


def walk_measures() -> dict[str, Measure]:
    """Files and functions of each step, run in a process of its own."""
    goals = {WALKS[0]: (40, 280), WALKS[2]: (20, 110), WALKS[3]: (8, 20)}
    found: dict[str, Measure] = {}
    for step, names in walks().items():
        files = sorted({name.partition(":")[0] for name in names})
        most = goals.get(step, (float("inf"), float("inf")))
        found[f"{step}: files run"] = Measure(len(files), most[0], files)
        found[f"{step}: functions run"] = Measure(len(names), most[1])
    return found


def _below(folder: str, sources: Sources) -> dict[str, str]:
    return {name: text for name, text in sources.items() if name.split(".")[0] == folder}


def _lines(sources: Sources) -> int:
    return sum(len(text.splitlines()) for text in sources.values())


def imports_of(text: str, known: Sources) -> Iterator[str]:
    """The modules of `known` that a text imports, anywhere in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A submodule imported by name is an import of that submodule.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in names if name in known)


def small_with_one_importer(sources: Sources) -> list[str]:
    importers: dict[str, set[str]] = {name: set() for name in sources}
    for name, text in sources.items():
        for target in imports_of(text, sources):
            importers[target] |= {name} - {target}
    packages = {name.rpartition(".")[0] for name in sources}
    return [
        name
        for name, text in sources.items()
        if len(importers[name]) == 1 and len(text.splitlines()) < SMALL and name not in packages
    ]


def packed_types(sources: Sources) -> list[str]:
    nodes = (node for text in sources.values() for node in ast.walk(ast.parse(text)))
    classes = (node.name for node in nodes if isinstance(node, ast.ClassDef))
    return sorted(name for name in classes if _PACKED.fullmatch(name))


def host_functions(sources: Sources) -> Iterator[int]:
    """Lines of every function that no GPU runs."""
    nodes = (node for text in sources.values() for node in ast.walk(ast.parse(text)))
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def imported_by(names: Sequence[str], sources: Sources) -> list[str]:
    """Those modules and all that they import, at once or later, packages around them included."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in sources and name not in found:
            found.add(name)
            todo += [name.rpartition(".")[0], *imports_of(sources[name], sources)]
    return sorted(found)


class _Walk:
    """Records the functions of the package that are run within it, on any new thread too."""

    def __init__(self) -> None:
        self._codes: set[CodeType] = set()

    def __enter__(self) -> "_Walk":
        threading.setprofile(self._hook)
        sys.setprofile(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _hook(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self._codes.add(frame.f_code)

    def names(self) -> list[str]:
        """ "weights/store.py:WeightStore.plan"."""
        home = f"{Path(fqcompile.__file__).parent}{os.sep}"
        own = [code for code in self._codes if code.co_filename.startswith(home)]
        return sorted({f"{c.co_filename.removeprefix(home)}:{c.co_qualname}" for c in own})


def _two_linears() -> nn.Sequential:
    """Other weights each time: the package keeps what it quantized."""
    layers = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    return layers.to(torch.bfloat16).requires_grad_(False).eval()


def _walk_here(folder: Path) -> dict[str, list[str]]:
    options = {"min_elements": 0, "inner_backend": "eager"}
    model, packed, same = _two_linears(), _two_linears(), _two_linears()
    compiled = torch.compile(model, backend=finequant, options=options)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    calls = (
        lambda: compiled(x),
        lambda: compiled(x),
        lambda: fqcompile.quantize_(packed, min_elements=0),
        lambda: packed(x),
        lambda: fqcompile.save(packed, folder / "saved"),
        lambda: fqcompile.load(same, folder / "saved"),
    )
    found = {}
    for step, call in zip(WALKS, calls, strict=True):
        with torch.no_grad(), _Walk() as walk:
            call()
        found[step] = walk.names()
    return found


def walks() -> dict[str, list[str]]:
    """{step: "file:function" of all that it runs}, of a process with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"FQCOMPILE_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "tests.oracle.measures", "--walk", folder],
            env=os.environ | own,
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--static", action="store_true", help="without what runs the package")
    parser.add_argument("--names", action="store_true", help="also what is counted, by name")
    parser.add_argument("--walk", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.walk:
        print(json.dumps(_walk_here(arguments.walk)))
        return
    measures = static_measures(sources_of(), (ROOT / "README.md").read_text(encoding="utf-8"))
    if not arguments.static:
        measures |= walk_measures()
    rows = [
        (what, m.value, "" if m.goal == float("inf") else m.goal, "" if m.reached else "missed")
        for what, m in measures.items()
    ]
    print(tabulate(rows, ("", "today", "to reach", ""), floatfmt=".0f"))
    for what, measure in measures.items() if arguments.names else ():
        if measure.names:
            print(f"\n{what}:", *measure.names, sep="\n  ")


if __name__ == "__main__":
    main()
