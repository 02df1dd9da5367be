"""bench kernels --device cpu, without what compiles: right results are timed, wrong ones named."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bench.kernels import cpu as kernels_cpu
from bench.kernels import cpu_ways
from bench.kernels import run as kernels
from bench.kernels.cpu_ways import Way, ways
from fqcompile.native import library as native_library
from fqcompile.tensor.quantized import QuantizedTensor
from tests.bench.made_up_results import cells

pytestmark = pytest.mark.skipif(
    native_library.refusal() is not None, reason=str(native_library.refusal())
)


def few(weight: QuantizedTensor) -> Iterator[Way]:
    """Ours, the same gone wrong, and one that fails."""
    ours = next(ways(weight))
    yield ours
    yield replace(ours, name="wrong", run=lambda x, w: ours.run(x, w) * 1.1)
    yield replace(ours, name="failing", run=lambda x, w: 1 / 0)


def test_rows_and_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(kernels_cpu, "ways", few)
    monkeypatch.setattr(cpu_ways, "APART", 1 << 16)
    kernels.main(["--device", "cpu", "--shapes", "128x256", "--m", "1,3", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "wrong: wrong result: relative error 0.1" in printed
    assert "failing: ZeroDivisionError" in printed
    *line, read = cells(printed, "128 x 256")
    assert line[1:3] == ["1", "1"]
    assert read.endswith("%")
    (last,) = [line for line in printed.splitlines() if "fqcompile bf16" in line and "0.02" in line]
    assert [cell.strip() for cell in last.split("|")][2:5] == ["0.02", "1", "fqcompile bf16"]


def test_copies_lie_far_apart() -> None:
    assert cpu_ways.copies_of(1 << 20) == 97
    assert cpu_ways.copies_of(1 << 30) == 2


def test_every_way_computes_the_layer() -> None:
    """Those that do not compile."""
    weight, x = kernels_cpu.random_problem(
        kernels_cpu.GemmSpec(1, 128, 256, 4, 128, torch.bfloat16, torch.bfloat16, "cpu"),
        3,
        torch.device("cpu"),
    )
    expected = x.double() @ weight.dequantize(torch.float64).t()
    names = []
    for way in ways(weight):
        if way.compiles:
            continue
        names.append(way.name)
        y = way.run(x.to(way.dtype), way.weights[0])
        assert float((y.double() - expected).norm() / expected.norm()) < 0.03
    assert names[:4] == [
        "fqcompile bf16",
        "fqcompile fp32",
        "aten int4pack bf16",
        "aten int4pack fp32",
    ]
