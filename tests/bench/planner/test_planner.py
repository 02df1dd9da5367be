"""`bench planner`: each measured row beside a prediction that is done by hand here."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.planner import run as planner
from bench.planner.rows import CPU_FLOPS_OF_A_THREAD, CPU_LAUNCH_SECONDS
from fqcompile.kernels.roofline import LAUNCH_SECONDS
from fqcompile.kernels.spec import H200


def write(root: Path, device: str, name: str, rows: list[Any], **settings: Any) -> None:
    folder = root / device.lower().replace(" ", "-")
    folder.mkdir(exist_ok=True)
    content = {"identity": {"device": device}, "settings": settings, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def layer(contender: str, us: float, m: int = 1, **more: Any) -> dict[str, Any]:
    about = {"n": 4096, "k": 1024, "m": m, "bits": 4, "group": 128}
    return {**about, "contender": contender, "us": us, **more}


def found(root: Path, tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "errors.json"
    planner.main(["--results", str(root), "--json", str(file)])
    content: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return content


def test_layers_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        layer("fqcompile bf16", 200.0, threads=2),
        layer("fqcompile bf16", 500.0, m=100, threads=1),
        layer("F.linear bf16", 900.0, threads=2),
        layer("fqcompile fp32", 1.0, threads=2),
        layer("onnxruntime level 4", 1.0, threads=2),
        {"n": 4096, "k": 1024, "m": 1, "contender": "fqcompile bf16", "failure": "no"},
    ]
    write(tmp_path, "Some CPU", "kernels-cpu", rows, read_bandwidth={"1": 1e10, "2": 2e10})
    few, many, plain = found(tmp_path, tmp_path)
    packed = 4096 * 1024 // 2 + 4096 * 8 * 2 + 2 * (4096 + 1024)
    assert few["predicted"] == pytest.approx(1e3 * (packed / 2e10 + CPU_LAUNCH_SECONDS))
    assert few["error"] == pytest.approx(few["predicted"] / 0.2 - 1)
    computed = 2 * 100 * 4096 * 1024 / CPU_FLOPS_OF_A_THREAD
    assert many["predicted"] == pytest.approx(1e3 * (computed + CPU_LAUNCH_SECONDS))
    moved = 2 * (4096 * 1024 + 4096 + 1024)
    assert plain["predicted"] == pytest.approx(1e3 * (moved / 2e10 + CPU_LAUNCH_SECONDS))
    assert "layer, 100 rows, 1 threads" in capsys.readouterr().out


def test_layers_and_models_on_a_gpu(tmp_path: Path) -> None:
    rows = [layer("cuBLAS", 10.0), layer("fqcompile closed form", 9.0), layer("gemlite", 1.0)]
    write(tmp_path, H200.name, "kernels", rows)
    model = {"model": "tiny", "layers": 2, "of_layers": 4, "batch": 1, "tokens": 64}
    steps = [{**model, "phase": "decode", "way": way, "ms": 1.0} for way in ("inductor", "int4")]
    prefill = {**model, "phase": "prefill", "tokens": 1024, "way": "int8", "ms": 2.0}
    write(tmp_path, H200.name, "models", [*steps, prefill, {**prefill, "model": "unknown"}])
    compared = found(tmp_path, tmp_path)
    plain = compared[0]
    moved = 2 * (4096 * 1024 + 4096 + 1024)
    expected = 1e3 * (moved / H200.bandwidth + LAUNCH_SECONDS)
    assert plain["predicted"] == pytest.approx(expected)
    assert [row["part"] for row in compared] == ["layer", "layer", "decode", "decode", "prefill"]
    assert all(row["predicted"] > 0 for row in compared)


def test_experts(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "top_k": 2, "hidden_size": 256, "moe_intermediate_size": 128}
    row = {"tokens": 1, "dtype": "bf16", "form": "grouped_mm", "ours": False, "ms": 1.0}
    write(tmp_path, "Some CPU", "expert-decode", [row, {**row, "dtype": "fp32"}], **sizes)
    write(tmp_path, "Some CPU", "kernels-cpu", [], read_bandwidth={"2": 1e9})
    (compared,) = found(tmp_path, tmp_path)
    weights = 2 * 3 * 256 * 128 * 2  # two experts of three matrices
    rows = 2 * 2 * ((256 + 128) + (128 + 256))
    seconds = (weights + rows) / 1e9 + 2 * CPU_LAUNCH_SECONDS
    assert compared["predicted"] == pytest.approx(1e3 * seconds)


def test_a_device_without_figures_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "NVIDIA X", "kernels", [layer("cuBLAS", 1.0)])
    assert found(tmp_path, tmp_path) == []
    assert "NVIDIA X: estimator/devices.py has no figures for it" in capsys.readouterr().out


def test_what_is_stored_is_compared(tmp_path: Path) -> None:
    """Groups of 64 are assumed, 4.25 bits; the adaptive rule takes at the finest 32, 4.5 bits."""
    planner.main(["--json", str(tmp_path / "errors.json")])
    rows = json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))
    sizes = [row["error"] for row in rows if row["part"].startswith("weights")]
    assert sizes
    assert max(map(abs, sizes)) < 1 - 4.25 / 4.5
    assert median(map(abs, sizes)) < 0.01
