"""The package that users install: an sdist, the wheel built from it, and a clean environment.

The environment sees the libraries of the one that runs the tests, but not this checkout.
"""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("fqcompile", "pyproject.toml", "README.md", "LICENSE")

TWO_LAYERS = """
import pathlib, sys
import torch
from torch import nn
import fqcompile

assert pathlib.Path(fqcompile.__file__).is_relative_to(sys.prefix), fqcompile.__file__
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
x = torch.randn(4, 256)
with torch.no_grad():
    found = torch.compile(model, backend="finequant")(x)
    fqcompile.fake_quantize_(model, fqcompile.reports()[-1])
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
print([site.status for site in fqcompile.reports()[-1].sites])
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What it prints; the test fails with it where the command does."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools writes beside its sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    run(sys.executable, "-c", build, cwd=copy)
    [built] = (copy / "dist").glob("fqcompile-*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist alone, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    [unpacked] = folder.glob("fqcompile-*")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--quiet", "--wheel-dir", "dist", unpacked, cwd=folder)
    [built] = (folder / "dist").glob("fqcompile-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment in which the wheel was installed."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, "--quiet", "--disable-pip-version-check", wheel, cwd=home)
    # After the install: pip would find this checkout's own entry there and install nothing.
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return python.parent


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory from which nothing of this checkout is imported, and an empty cache."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    package = ROOT / "fqcompile"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {Path(name).suffix for name in files} >= {".py", ".typed", ".cpp", ".h", ".json"}
    assert files - packed == set()
    beside = {name.partition("/")[0] for name in packed - files}
    assert {name.rpartition(".")[2] for name in beside} == {"dist-info"}


@pytest.mark.slow
def test_the_wheel_names_its_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        [license_file] = (
            n for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE")
        )
        about = archive.read(metadata).decode()
        terms = archive.read(license_file)
    assert "License-Expression: Apache-2.0\n" in about
    assert "License ::" not in about
    assert "Description-Content-Type: text/markdown\n" in about
    assert terms == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_doctor_runs_from_the_wheel(installed: Path, apart: Path) -> None:
    text = run(installed / "fqcompile", "doctor", cwd=apart)
    assert "fqcompile" in text
    assert str(ROOT) not in text


@pytest.mark.slow
def test_a_model_compiles_from_the_wheel(installed: Path, apart: Path) -> None:
    text = run(installed / "python", "-W", "ignore", "-c", TWO_LAYERS, cwd=apart)
    assert text.splitlines()[-1] == "['quantized', 'quantized']"
