"""docs/guide/exported.md, all of it: compiled by Inductor and g++, and run without fqcompile."""

import copy
import os
import re
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fqcompile
from fqcompile.native import library as native
from tests.docs.stand_ins import two_layers
from tests.helpers import assert_close

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "exported.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
# It may be installed where the tests run.
ALONE = "import sys, torch\nsys.modules['fqcompile'] = None\n"


def blocks(language: str) -> list[str]:
    return [text for own, text in BLOCKS if own == language]


def run(*command: str, folder: Path) -> str:
    """What it prints, in a folder where this checkout's package is not found."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bk,nk->bn", x.view(-1, 256), self.rows.weight)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with the page's package, program and library; and the oracle's model."""
    if (reason := native.refusal()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = two_layers()
    plan = fqcompile.quantize_(copy.deepcopy(model))
    export, package, *_ = blocks("python")
    with chdir(folder):
        exec(export + package, {"model": copy.deepcopy(model), "x": torch.randn(3, 256)})
    return folder, fqcompile.fake_quantize_(model, plan)


@pytest.mark.slow
def test_it_runs_in_python_without_fqcompile(made: tuple[Path, Any]) -> None:
    folder, oracle = made
    x = torch.randn(7, 512)[:, ::2]
    torch.save(x, folder / "x.pt")
    program = 'torch.export.load("program.pt2").module()(x)'
    code = (
        f"{ALONE}x = torch.load('x.pt')\n{blocks('python')[2]}\n"
        f"torch.save([y.detach(), {program}.detach()], 'y.pt')\n"
    )
    run(sys.executable, "-W", "ignore", "-c", code, folder=folder)
    with torch.no_grad():
        expected = oracle(x)
    for actual in torch.load(folder / "y.pt"):
        assert_close(actual, expected, k=256, depth=2)


@pytest.mark.slow
def test_a_program_whose_weights_are_read_otherwise_runs_without_fqcompile(
    made: tuple[Path, Any],
) -> None:
    """By a cell and by what has no packed form, decomposed as the page says."""
    folder, x = made[0], torch.randn(3, 256)
    cell = nn.Sequential(nn.GRUCell(256, 256), nn.Flatten(0), Table())
    oracle = copy.deepcopy(cell)
    fqcompile.fake_quantize_(oracle, fqcompile.quantize_(cell))
    with torch.no_grad():
        program = torch.export.export(cell, (x,)).run_decompositions({})
        expected = oracle(x)
    torch.export.save(program, folder / "cell.pt2")
    torch.save(x, folder / "x.pt")
    load = "torch.ops.load_library('libfqcompile.so')\nx = torch.load('x.pt')\n"
    code = f"{ALONE}{load}torch.save(torch.export.load('cell.pt2').module()(x).detach(), 'y.pt')"
    run(sys.executable, "-W", "ignore", "-c", code, folder=folder)
    assert_close(torch.load(folder / "y.pt"), expected, k=256, depth=2)


@pytest.mark.slow
def test_strides_other_than_the_example_are_told_where_pytorch_checks_them(
    made: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = re.search(r"`(AOTI_\w+)=1`", PAGE.read_text(encoding="utf-8"))
    assert setting is not None
    package = torch._inductor.aoti_load_package(str(made[0] / "model.pt2"))
    x = torch.randn(256, 7).t()
    monkeypatch.setenv(setting[1], "1")
    package(x.contiguous())
    with pytest.raises(RuntimeError, match="unmatched stride"):
        package(x)


@pytest.mark.slow
def test_without_the_library_the_operator_is_named(made: tuple[Path, Any]) -> None:
    """As the page quotes it; the program's error is in PyTorch's log, on stderr."""
    code = (
        f"{ALONE}import os\nos.dup2(1, 2)\n"
        "for run in ("
        "    lambda: torch._inductor.aoti_load_package('model.pt2')(torch.ones(3, 256)),\n"
        "    lambda: torch.export.load('program.pt2'),\n"
        "):\n"
        "    try:\n        run()\n"
        "    except RuntimeError as error:\n        print(error)\n"
    )
    printed = run(sys.executable, "-c", code, folder=made[0])
    told = " ".join(PAGE.read_text(encoding="utf-8").split())
    for error in (
        "Could not find schema for fqcompile::matmul.inference",
        "failed to resolve torch.ops.fqcompile.matmul.inference",
    ):
        assert error in printed and error in told


@pytest.mark.slow
def test_the_copied_library_is_not_taken_for_the_package(made: tuple[Path, Any]) -> None:
    code = "from importlib import util\nimport sys\nsys.path.append(sys.argv[1])\n"
    code += "print(util.find_spec('fqcompile').origin)"
    found = run(sys.executable, "-c", code, str(PAGE.parents[2]), folder=made[0])
    assert found.strip() == fqcompile.__file__


@pytest.mark.slow
def test_it_runs_in_cpp(made: tuple[Path, Any]) -> None:
    folder, oracle = made
    (folder / "run.cpp").write_text(blocks("cpp")[0], encoding="utf-8")
    printed = run("bash", "-euc", blocks("sh")[0], folder=folder)
    with torch.no_grad():
        expected = oracle(torch.ones(3, 256)).norm()
    assert_close(torch.tensor(float(printed)), expected, k=256, depth=2)
