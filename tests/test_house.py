"""The package keeps its rules: layers, sizes, docstrings, annotations. Read from the source alone.

`check(sources)` takes {module path: source} and returns one line per broken rule, with file and
line; the tests give it the package, and small made-up trees on which each rule is seen to fire.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fqcompile"

# Imports point to an earlier line, or stay inside their own folder. `checkpoint` stands above
# `modules`, as `quantize_checkpoint` does on disk what `quantize_` does in memory.
LAYERS = [
    {"errors", "locks", "torch_compat", "hf_compat"},
    {"files"},
    {"options"},
    {"distributed"},
    {"config"},
    {"tensor"},
    {"native"},
    {"quant"},
    {"kernels"},
    {"weights", "report", "estimator"},
    {"passes"},
    {"backend", "modules"},
    {"checkpoint", "compiled", "explain"},
    {"demo", "interop", "integrations"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__"},
]
# What may import less than all that is below it.
ONLY = {"estimator": {"errors", "kernels"}}
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
PIPELINE = tuple("capture normalize match plan rewrite fuse select lower".split())
PASS_HELPERS = set(
    """attention attention_forms calibrate choices effects einsum expert_bias fold fuse_patterns
    gather kept naming op_nodes probe probe_inputs products state""".split()
)
# What runs the passes, before them, after them or around them: each may import earlier ones.
PASS_DRIVERS = tuple("pipeline sharded summary variants".split())

# Names of others that have no promise are in these two files alone; what else begins with a line
# below is ours, or as old as what it belongs to: nn.Module, namedtuple, the standard library.
COMPAT = {"torch_compat.py", "hf_compat.py"}
OTHERS = ("torch", "triton", "transformers")
OLD = set(
    """_modules _parameters _buffers _replace _getframe _at_fork_reinit _is_owned _axis
    _weights""".split()
)

MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 300, 50, 110
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: str) -> str:
    """fqcompile.quant.affine from "quant/affine.py"; a package for its __init__.py."""
    parts = ["fqcompile", *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(path: str) -> str:
    """The folder or top-level file that a module belongs to, as LAYERS names it."""
    return path.removesuffix(".py").split("/")[0]


def imports(node: ast.AST, known: set[str]) -> Iterator[tuple[str, int]]:
    """The package's modules that this statement imports, and its line."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and (node.level or node.module):
        # A submodule imported by name is an import of that submodule.
        whole = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in known else str(node.module) for name in whole]
    else:
        return
    for name in dict.fromkeys(names):
        if name.split(".")[0] == "fqcompile":
            yield name, node.lineno


def check(sources: Mapping[str, str]) -> list[str]:
    """Every broken rule as "file:line: what is wrong and what to do"."""
    known = {module_name(path) for path in sources}
    found: list[str] = []
    edges: dict[str, set[str]] = {}
    for path, source in sources.items():
        tree = ast.parse(source)
        text = _unnamed(path)
        if text:
            found.append(f"{path}:1: {text}")
        found += [f"{path}:{line}: {text}" for line, text in _file_rules(path, source, tree)]
        for name, line in (hit for node in ast.walk(tree) for hit in imports(node, known)):
            edges.setdefault(module_name(path), set()).add(name)
            text = _layer_rule(path, name, known)
            if text:
                found.append(f"{path}:{line}: {text}")
    cycle = _cycle(edges)
    if cycle:
        found.append(f"import cycle: {' -> '.join(cycle)}")
    return found


def _unnamed(path: str) -> str | None:
    """Each folder and top-level file has a layer, and each file of passes/ its part there."""
    folder, _, stem = path.removesuffix(".py").rpartition("/")
    if unit_of(path) not in RANK:
        return f"{unit_of(path)} is in no layer: name it in LAYERS"
    if folder == "passes" and stem not in {"__init__", *PIPELINE, *PASS_HELPERS, *PASS_DRIVERS}:
        return f"{stem} is neither a pass, nor a helper of passes, nor what runs them: name it"
    return None


def _layer_rule(path: str, target: str, known: set[str]) -> str | None:
    if target not in known:
        return f"imports {target}, which does not exist"
    target_path = target.removeprefix("fqcompile").lstrip(".").replace(".", "/") or "__init__"
    own, other = unit_of(path), unit_of(target_path)
    if own == other == "passes":
        return _pass_rule(path, target)
    if own == other or own not in RANK or other not in RANK:  # a unit in no layer is told once
        return None
    if other not in ONLY.get(own, {other}):
        return f"{own} imports {target} of {other}: it may import {', '.join(sorted(ONLY[own]))}"
    if RANK[other] >= RANK[own]:
        return f"{own} imports {target} of {other}: imports point downward only"
    return None


def _pass_rule(path: str, target: str) -> str | None:
    own, other = Path(path).stem, target.rpartition(".")[2]
    if own in PIPELINE and other not in PASS_HELPERS:
        return f"pass {own} imports {target}: a pass may import {', '.join(sorted(PASS_HELPERS))}"
    if own in PASS_HELPERS and other not in PASS_HELPERS:
        return f"helper {own} imports {target}: passes import helpers, never the reverse"
    if own in PASS_DRIVERS and other in PASS_DRIVERS[PASS_DRIVERS.index(own) :]:
        return f"{own} imports {target}: of what runs passes, each imports earlier ones"
    return None


def _file_rules(path: str, source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    lines = len(source.splitlines())
    if lines > MAX_FILE:
        yield MAX_FILE, f"file has {lines} lines, at most {MAX_FILE}: split it by concern"
    if not ast.get_docstring(tree):
        yield 1, "module has no docstring"
    if path not in COMPAT:
        yield from _private_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _hidden_imports(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function_rules(node)
        if isinstance(node, ast.ExceptHandler):
            yield from _handler_rules(node)


def _private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OTHERS:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr not in OLD:
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if own or node.attr.startswith("__") else [f".{node.attr}"]
        else:
            continue
        for name in names:
            if any(part.startswith("_") for part in name.split(".")):
                text = f"uses {name}, of others and private: take it from torch_compat or hf_compat"
                yield node.lineno, text


def _hidden_imports(node: Function | ast.ClassDef) -> Iterator[tuple[int, str]]:
    for inner in node.body:
        for statement in ast.walk(inner):
            names = [name for name, _ in imports(statement, set())]
            if names:
                yield statement.lineno, f"{node.name} imports {names[0]} inside: move it to the top"


def _is_kernel(node: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def _function_rules(node: Function) -> Iterator[tuple[int, str]]:
    limit = MAX_KERNEL if _is_kernel(node) else MAX_FUNCTION
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if lines > limit:
        yield node.lineno, f"{node.name} has {lines} lines, at most {limit}"
    if node.name.startswith("_") or _is_kernel(node):
        return
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
    bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
    if bare or node.returns is None:
        missing = ", ".join([*bare, *(["the result"] if node.returns is None else [])])
        yield node.lineno, f"{node.name} is public and has no annotation for {missing}"


def _handler_rules(node: ast.ExceptHandler) -> Iterator[tuple[int, str]]:
    if node.type is None:
        yield node.lineno, "bare except: name the exception"
    elif any(name in ast.unparse(node.type) for name in ("ImportError", "ModuleNotFoundError")):
        yield node.lineno, "except ImportError hides a broken module: ask importlib.util.find_spec"


def _cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """Some cycle of the import graph, first module repeated at the end; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            found = visit(target, [*trail, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := visit(module, []))), [])


def test_package_keeps_the_rules_of_the_house() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    sources = {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in paths}
    assert len(sources) > 40, f"only {len(sources)} files found under {PACKAGE.name}"
    broken = check(sources)
    assert not broken, "\n".join(broken)


def test_all_eight_passes_are_files_of_their_own() -> None:
    missing = [word for word in PIPELINE if not (PACKAGE / "passes" / f"{word}.py").is_file()]
    assert not missing, f"no passes/{missing}.py"


GOOD = {
    "__init__.py": '"""d"""\nfrom fqcompile.backend import run\n',
    "backend.py": '"""d"""\nfrom fqcompile.passes import fuse\n\ndef run(x: int) -> int: ...\n',
    "passes/__init__.py": '"""d"""\n',
    "passes/state.py": '"""d"""\nfrom fqcompile.quant import qtype\n',
    "passes/fuse.py": '"""d"""\nfrom fqcompile.passes import state\n',
    "passes/pipeline.py": '"""d"""\nfrom fqcompile.passes import fuse\n',
    "passes/variants.py": '"""d"""\nfrom fqcompile.passes import match, pipeline\n',
    "checkpoint/load.py": '"""d"""\n',
    "interop/load.py": '"""d"""\nfrom fqcompile.checkpoint import load\n',
    "commands/export.py": '"""d"""\nfrom fqcompile.interop import load\n',
    "passes/match.py": '"""d"""\nimport fqcompile.passes.state\n',
    "quant/__init__.py": '"""d"""\n',
    "quant/qtype.py": '"""d"""\nfrom fqcompile.errors import E\n',
    "errors.py": '"""d"""\nclass E(Exception):\n    def __str__(self) -> str: ...\n',
}


def test_checker_accepts_a_tree_that_keeps_the_rules() -> None:
    assert check(GOOD) == []


LONG_BODY = "\n".join(["    x = 1"] * 51)
BROKEN = [
    (
        "errors.py",
        "from fqcompile.quant import qtype\n",
        "errors.py:2: errors imports fqcompile.quant.qtype of quant: ",
    ),
    (
        "quant/qtype.py",
        "import fqcompile.backend\n",
        "quant/qtype.py:2: quant imports fqcompile.backend of backend",
    ),
    ("backend.py", "import fqcompile\n", "backend.py:2: backend imports fqcompile of __init__"),
    (
        "checkpoint/load.py",
        "from fqcompile.interop import load\n",
        "checkpoint/load.py:2: checkpoint imports fqcompile.interop.load of interop: imports point",
    ),
    (
        "interop/load.py",
        "import fqcompile.commands.export\n",
        "interop/load.py:2: interop imports fqcompile.commands.export of commands",
    ),
    (
        "modules/quantize.py",
        "from fqcompile.backend import run\n",
        "modules/quantize.py:2: modules imports fqcompile.backend of backend: imports point",
    ),
    (
        "estimator/costs.py",
        "from fqcompile.quant import qtype\n",
        "estimator/costs.py:2: estimator imports fqcompile.quant.qtype of quant: it may import",
    ),
    ("anew.py", "", "anew.py:1: anew is in no layer: name it in LAYERS"),
    ("passes/anew.py", "", "passes/anew.py:1: anew is neither a pass, nor a helper of passes"),
    (
        "passes/pipeline.py",
        "from fqcompile.passes import variants\n",
        "passes/pipeline.py:2: pipeline imports fqcompile.passes.variants: of what runs passes",
    ),
    (
        "passes/fuse.py",
        "from fqcompile.passes.match import m\n",
        "passes/fuse.py:2: pass fuse imports fqcompile.passes.match: a pass may",
    ),
    (
        "passes/state.py",
        "from fqcompile.passes import fuse\n",
        "passes/state.py:2: helper state imports fqcompile.passes.fuse",
    ),
    (
        "backend.py",
        "from fqcompile.nothing import x\n",
        "backend.py:2: imports fqcompile.nothing, which does not exist",
    ),
    (
        "backend.py",
        "def _f():\n    from fqcompile import errors\n",
        "backend.py:3: _f imports fqcompile",
    ),
    (
        "backend.py",
        "class A:\n    import fqcompile.errors\n",
        "backend.py:3: A imports fqcompile.errors inside",
    ),
    (
        "backend.py",
        "from torch._dynamo import exc\n",
        "backend.py:2: uses torch._dynamo.exc, of others and private",
    ),
    ("backend.py", "import torch\n\nx = torch._C\n", "backend.py:4: uses ._C, of others"),
    ("backend.py", "x = 1\n" * 300, "backend.py:300: file has 301 lines, at most 300"),
    ("backend.py", f"def _f():\n{LONG_BODY}\n", "backend.py:2: _f has 52 lines, at most 50"),
    ("backend.py", "try:\n    x = 1\nexcept:\n    raise\n", "backend.py:4: bare except"),
    (
        "backend.py",
        "try:\n    import a\nexcept (ImportError, OSError):\n    a = 1\n",
        "backend.py:4: except ImportError",
    ),
    (
        "backend.py",
        "def f(x, *, y: int) -> int:\n    return x\n",
        "backend.py:2: f is public and has no annotation for x",
    ),
    ("backend.py", "def f(*args: int):\n    return 1\n", "has no annotation for the result"),
]


@pytest.mark.parametrize(("path", "source", "expected"), BROKEN, ids=[e for _, _, e in BROKEN])
def test_checker_names_file_line_and_rule(path: str, source: str, expected: str) -> None:
    broken = check({**GOOD, path: f'"""d"""\n{source}'})
    assert any(expected in line for line in broken), broken


def test_checker_wants_module_docstrings() -> None:
    assert check({**GOOD, "errors.py": "class E: ...\n"}) == [
        "errors.py:1: module has no docstring"
    ]


def test_checker_allows_long_kernels_up_to_their_own_limit() -> None:
    kernel = f'"""d"""\n@triton.jit\ndef k(a, b):\n{LONG_BODY}\n'
    assert check({**GOOD, "backend.py": kernel}) == []
    longer = kernel + f"{LONG_BODY}\n{LONG_BODY}\n"
    assert any("at most 110" in line for line in check({**GOOD, "backend.py": longer}))


def test_checker_finds_cycles() -> None:
    a = '"""d"""\nfrom fqcompile.quant.b import y\n'
    b = '"""d"""\nfrom fqcompile.quant.a import x\n'
    broken = check({**GOOD, "quant/a.py": a, "quant/b.py": b})
    assert broken == ["import cycle: fqcompile.quant.a -> fqcompile.quant.b -> fqcompile.quant.a"]
