"""`bench quantize` on a small weight: its rows, and that a wrong error is not reported."""

import json
from pathlib import Path

import pytest
import torch

from bench.costs import quantize
from tests.bench.made_up_results import cells


def test_rows_have_the_error_of_the_dequantised_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "quantize.json"
    quantize.main(["--n", "64", "--k", "256", "--repeat", "1", "--json", str(path)])
    content = json.loads(path.read_text())
    rows = {row["setting"]: row for row in content["rows"] if "setting" in row}
    assert set(rows) == set(quantize.SETTINGS)
    # Normal numbers: a step of absmax / 7 over a group of 128, uniformly rounded, is about .12.
    assert rows["int4 absmax g128"]["error"] == pytest.approx(0.12, rel=0.1)
    assert rows["int4 mse g128"]["error"] < rows["int4 absmax g128"]["error"]
    assert all(row["weights_per_s"] > 0 for row in rows.values())
    assert {"device", "torch", "commit", "command"} <= set(content["identity"])
    back = [row for row in content["rows"] if "dequantize" in row]
    assert [row["dequantize"] for row in back] == ["int4 g64", "int8 g64"]
    assert cells(capsys.readouterr().out, "int4 mse column")[1:]


def test_an_error_that_is_not_that_of_the_weight_is_no_row() -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    w_hat = w + 0.1 * w.roll(1)
    error = float((w - w_hat).norm() / w.norm())
    quantize.checked(w, w_hat, error)
    for told in (0.9 * error, 1.1 * error):
        with pytest.raises(quantize.WrongResult, match="the plan says"):
            quantize.checked(w, w_hat, told)
