"""The library in a process that never imports this package: it defines the operators and runs them.

One process makes every call; what it gives is what Python gives here, bit for bit.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fqcompile
from fqcompile.errors import KernelBuildError
from fqcompile.kernels import op
from fqcompile.kernels.cpu import attention, stream
from fqcompile.native import library as native
from fqcompile.native.isa import ISAS, OVERRIDE, Isa
from fqcompile.native.library import build
from tests.native.paths import NAMES, path
from tests.native.test_operator import UNUSUAL, USUAL, call, routed

CHILD = """
import sys, torch
calls, out, library = sys.argv[1:]
torch.ops.load_library(library)
found = {}
for name, (operator, arguments) in torch.load(calls, weights_only=False).items():
    packet, _, overload = operator.partition(".")
    run = getattr(getattr(torch.ops.fqcompile, packet), overload or "default")
    try:
        found[name] = run(*arguments)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
torch.save(found, out)
assert "fqcompile" not in sys.modules
"""
THEN_PYTHON = """
import sys, torch
calls, library = sys.argv[1:]
torch.ops.load_library(library)
usual, wrong = torch.load(calls, weights_only=False)
alone = torch.ops.fqcompile.matmul(*usual)
import fqcompile
from fqcompile.kernels.op import matmul_inference
assert torch.equal(matmul_inference(*usual), alone)
try:
    matmul_inference(*wrong)
except RuntimeError as error:
    assert "x has 71 columns" in str(error), error
else:
    raise AssertionError("a wrong x was multiplied")
model = torch.nn.Linear(256, 256).requires_grad_(False)
x = torch.randn(3, 256, requires_grad=True)
y = torch.compile(model, backend="finequant", options={"inner_backend": "aot_eager"})(x)
y.sum().backward()
fqcompile.fake_quantize_(model, fqcompile.reports()[-1])
torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
torch.testing.assert_close(x.grad, model.weight.sum(0).expand(3, 256), rtol=1e-4, atol=1e-4)
"""


def zeros_at_the_end() -> list[Any]:
    return [*routed("offsets", [0, 2], bias=True)[:-1], True]


def dequantizing(dtype: torch.dtype) -> list[Any]:
    _, qweight, scale, _, _, bits, levels, group, n, k, *_ = call(n=70, k=72, group_size=32)
    return [qweight, scale, bits, levels, group, n, k, dtype, "x86_stream"]


def reading(ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    qweight, scale, *form = dequantizing(dtype)
    return [qweight, scale, ids, *form]


def attending(*, turned: bool = False, sinks: Tensor | None = None) -> list[Any]:
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    keys = k.transpose(2, 3).contiguous().transpose(2, 3) if turned else k
    return [q, keys, v, torch.rand(3, 9) > 0.3, sinks, 0.25, 5.0, False, True]


def of_kernel(name: str) -> list[Any]:
    arguments = call(k=72)
    arguments[arguments.index("x86_stream")] = name
    return arguments


PYTHON: dict[str, Callable[..., Tensor]] = {
    "matmul": op._matmul_impl,
    "matmul.inference": op._matmul_impl,
    "dequantize": op._dequantize_impl,
    "rows": op._rows_impl,
    "attention": attention._impl,
}
RIGHT: dict[str, tuple[str, Callable[[], list[Any]]]] = {
    **{name: ("matmul.inference", make) for name, make in (USUAL | UNUSUAL).items()},
    "with a backward": ("matmul", USUAL["one row"]),
    "zeros past the last offset": ("matmul", zeros_at_the_end),
    "no rows of experts": (
        "matmul",
        lambda: [
            value[:0] if place == 0 else torch.zeros_like(value) if place == 13 else value
            for place, value in enumerate(routed("offsets", [1, 3]))
        ],
    ),
    "dequantized": ("dequantize", lambda: dequantizing(torch.bfloat16)),
    "rows of a table": ("rows", lambda: reading(torch.tensor([[69, 0, 3], [64, 3, 63]]))),
    "turned rows": ("rows", lambda: reading(torch.randint(70, (2, 80), dtype=torch.int32).mT)),
    "a row": ("rows", lambda: reading(torch.tensor(69), torch.float32)),
    "no rows": ("rows", lambda: reading(torch.empty(2, 0, dtype=torch.int64))),
    "rows apart": (
        "rows",
        lambda: [
            torch.stack((a, a), -1)[..., 0] if place == 0 else a
            for place, a in enumerate(reading(torch.tensor([5])))
        ],
    ),
    "attention": ("attention", attending),
    "attention to turned keys": ("attention", lambda: attending(turned=True)),
    "attention with sinks": ("attention", lambda: attending(sinks=torch.randn(4, 1, 1))),
}
WRONG: dict[str, tuple[str, Callable[[], list[Any]], str]] = {
    "another kernel": (
        "matmul.inference",
        lambda: of_kernel("aten_int4pack"),
        r"fqcompile::matmul: .* without Python's fqcompile.*`import fqcompile`.*"
        r"x=torch.FloatTensor\[3, 72\] on cpu.*bias=None.*kernel=aten_int4pack",
    ),
    "another K": ("matmul", lambda: [torch.ones(3, 71), *call(k=72)[1:]], r"\[3, 71\] on cpu"),
    "another expert": ("matmul", lambda: routed("ids", [0, 2, 0]), "ids=torch.LongTensor"),
    "another device": (
        "matmul", lambda: [torch.ones(3, 72, device="meta"), *call(k=72)[1:]], "on meta",
    ),
    "a float64 result": ("dequantize", lambda: dequantizing(torch.float64), "dtype=7, kernel"),
}  # fmt: skip
NO_ROW: dict[str, tuple[str, Callable[[], list[Any]], str]] = {  # as Python says it
    "one too far": ("rows", lambda: reading(torch.tensor([3, 70])), "row 70 is out of range"),
    "from the end": ("rows", lambda: reading(torch.tensor([-1])), "row -1 is out of range"),
}


def child(code: str, *arguments: Path) -> None:
    """Run code in a new process, from a folder where this package is not found."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=arguments[0].parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return fqcompile.library_path()
    except KernelBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def alone(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """{name: (the arguments of a call, what it gave)}"""
    folder = tmp_path_factory.mktemp("alone")
    torch.manual_seed(0)
    calls = {
        name: (operator, make()) for name, (operator, make, *_) in (RIGHT | WRONG | NO_ROW).items()
    }
    torch.save(calls, folder / "calls.pt")
    child(CHILD, folder / "calls.pt", folder / "out.pt", library)
    found = torch.load(folder / "out.pt")
    return {name: (arguments, found[name]) for name, (_, arguments) in calls.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_it_gives_what_python_gives(name: str, alone: dict[str, tuple[Any, Any]]) -> None:
    arguments, got = alone[name]
    with path(NAMES[0]):
        stream.serve(None)
        want = PYTHON[RIGHT[name][0]](*arguments)
    assert isinstance(got, Tensor), got
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_needs_python_says_so(name: str, alone: dict[str, tuple[Any, Any]]) -> None:
    got = alone[name][1]
    assert isinstance(got, str) and "`import fqcompile`" in got, got
    with pytest.raises(RuntimeError, match=WRONG[name][2]):
        raise RuntimeError(got.replace("\n", " "))


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_ROW)
def test_a_row_that_there_is_not_is_named(name: str, alone: dict[str, tuple[Any, Any]]) -> None:
    arguments, got = alone[name]
    assert isinstance(got, str) and NO_ROW[name][2] in got, got
    for kernel in (op.rows, op._rows_impl):
        with pytest.raises(IndexError, match=NO_ROW[name][2]):
            kernel(*arguments)


@pytest.mark.slow
def test_python_may_come_later(library: Path, tmp_path: Path) -> None:
    torch.save((call(k=72), WRONG["another K"][1]()), tmp_path / "calls.pt")
    code = f"import sys; sys.path.insert(0, {str(Path(fqcompile.__file__).parents[1])!r})\n"
    child(code + THEN_PYTHON, tmp_path / "calls.pt", library)


def test_loaded_beside_python_it_changes_nothing(library: Path) -> None:
    arguments = call(k=72)
    want = op.matmul_inference(*arguments)
    torch.ops.load_library(library)
    assert torch.equal(op.matmul_inference(*arguments), want)


@pytest.mark.slow
def test_a_processor_without_its_instructions_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XOP was in processors from 2011 to 2015; nothing here may run an instruction of it."""
    xop = Isa("xop", (*ISAS["avx2"].instructions, "xop"))
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-O0"))
    library = build(xop, tmp_path)
    calls = {name: (RIGHT[name][0], RIGHT[name][1]()) for name in ("one row", "attention")}
    torch.save(calls, tmp_path / "calls.pt")
    child(CHILD, tmp_path / "calls.pt", tmp_path / "out.pt", library)
    for error in torch.load(tmp_path / "out.pt").values():
        assert re.search("built for xop instructions, .* lacks some.*ISA=avx2 python -c", error)


def test_what_the_dispatcher_calls_runs_on_any_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could not refuse: it has no such instruction, and is the first that is linked."""
    commands: list[list[str]] = []

    def note(command: list[str], **_: Any) -> str:
        commands.append(command)
        Path(command[command.index("-o") + 1]).touch()
        return ""

    monkeypatch.setattr(native, "_run", note)
    native._compile(["g++", *ISAS["avx2"].flags], tmp_path / "made.so")
    *parts, linking = commands
    for part in parts:
        assert ("-mavx2" in part) == (not part[part.index("-c") + 1].endswith("operator.cpp"))
    assert next(a for a in linking if a.endswith(".o")).endswith(".operator.o")


def test_where_there_is_none_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "none")
    with pytest.raises(KernelBuildError, match="FQCOMPILE_CPU_ISA=none says so"):
        fqcompile.library_path()
