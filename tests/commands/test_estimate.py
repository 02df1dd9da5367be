"""`fqcompile estimate` as a user meets it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fqcompile.cli import main
from tests.estimator.shapes import LLAMA, MIXTRAL


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return str(folder)


def estimated(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    file = tmp_path / "estimate.json"
    assert main(["estimate", *arguments, "--json", str(file)]) == 0
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["assumptions"]
    found: list[dict[str, Any]] = content["estimates"]
    return found


def test_the_table_has_a_line_for_each_way(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "estimate.html"
    arguments = ["--model", model, "--gpu", "l40s", "--tp", "1,2", "--batch", "1,4"]
    found = estimated(tmp_path, *arguments, "--context", "64", "--html", str(page))
    assert [(e["tp"], e["batch"], e["format"]) for e in found] == [
        (tp, batch, form) for tp in (1, 2) for batch in (1, 4) for form in ("bf16", "int8", "int4")
    ]
    printed = capsys.readouterr().out
    assert "my-model (0.0 B parameters) on NVIDIA L40S" in printed
    assert sum(line.split()[5:6] == ["int4"] for line in printed.splitlines()) == 4
    assert "fewest GPUs of those asked about: bf16 1, int8 1, int4 1" in printed
    plain, _, int4 = (e["decode"]["tokens_per_second"] for e in found[:3])
    line = next(line for line in printed.splitlines() if line.split()[5:6] == ["int4"])
    assert f"{int4 / plain:.2f}x" in line
    for estimate in found:
        rates = estimate["prefill"]
        assert rates["ms_per_token"] == pytest.approx(1e3 / rates["tokens_per_second"])
        rates = estimate["decode"]
        wait = estimate["batch"] * 1e3 / rates["tokens_per_second"]
        assert rates["ms_per_token"] == pytest.approx(wait)
    assert "PCIe 4.0 x16, 64 GB/s" in printed
    assert "cost" not in printed.split("By arithmetic")[0]
    html = page.read_text(encoding="utf-8")
    assert "<circle" in html
    assert "my-model" in html
    assert "://" not in html
    points = re.findall(r"\n([\d.]+) ms per token.*?cx=\"([\d.]+)%", html, re.S)
    by_wait = sorted((float(wait), float(left)) for wait, left in points)
    assert len(by_wait) == 12
    assert by_wait[0][1] < by_wait[-1][1]


def test_page_labels_its_points_and_marks_what_does_not_fit(tmp_path: Path) -> None:
    page = tmp_path / "estimate.html"
    arguments = ["--model", "llama-3-70b", "--gpu", "h200", "--tp", "1,2", "--batch", "64"]
    assert main(["estimate", *arguments, "--context", "4096", "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    labels = re.findall(r'data-label="([^"]*)"', html)
    assert labels == [
        "int4, 1 h200, tp 1",
        "bf16, 2 h200, tp 2",
        "int8, 2 h200, tp 2",
        "int4, 2 h200, tp 2",
    ]
    assert html.count('<td class="bad">does not fit</td>') == 2 * 2
    assert html.count('<rect class="over" width="100.00%"') == 2
    assert "cost of 1M" not in html, "no price was given"


def test_replicas_multiply_tokens_and_not_their_cost(model: str, tmp_path: Path) -> None:
    common = ["--model", model, "--tp", "2", "--batch", "1", "--context", "64", "--format", "int4"]
    one, many = estimated(tmp_path, *common, "--gpus", "2,4097", "--price", "h200=3.6")
    assert (one["gpus"], many["gpus"], many["replicas"]) == (2, 4096, 2048)
    rates = [e["decode"]["tokens_per_second"] for e in (one, many)]
    assert rates[1] == pytest.approx(2048 * rates[0])
    costs = [e["decode"]["cost_of_a_million_tokens"] for e in (one, many)]
    # Two GPUs at 3.6 an hour: 0.002 a second.
    assert costs[0] == costs[1] == pytest.approx(0.002 * 1e6 / rates[0])


def test_what_is_not_possible_is_said_beside_what_is(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = estimated(
        tmp_path, "--model", model, "--tp", "1,3", "--context", "64,5000", "--batch", "1"
    )
    assert [e["refusal"] is None for e in found[::3]] == [True, False, False, False]
    printed = capsys.readouterr().out
    assert "not possible: tp 3 neither divides" in printed
    assert "not possible: context 5000: my-model has positions for 4096" in printed
    too_few = estimated(tmp_path, "--model", model, "--tp", "4", "--gpus", "2", "--context", "64")
    assert {e["refusal"] for e in too_few} == {"2 GPUs are fewer than the 4 of a replica"}


def test_a_model_that_does_not_fit_has_bytes_and_no_speed(tmp_path: Path) -> None:
    arguments = ["--model", "opt-175b", "--gpu", "a100-80", "--batch", "1", "--format", "bf16"]
    (found,) = estimated(tmp_path, *arguments)
    assert found["fits"] is False
    assert found["decode"] is found["prefill"] is None
    assert found["memory"]["weights"] == pytest.approx(350e9, rel=0.01)


def test_formulas_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MIXTRAL), encoding="utf-8")
    arguments = ["--model", str(config), "--batch", "1", "--context", "8", "--formulas"]
    assert main(["estimate", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "experts that tokens meet = E*(1 - (1 - k/E)**tokens)" in printed
    assert "bytes of keys and values = 4*KV*layers*tokens*width" in printed
    assert "experts gate_up of " in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "h300"], "no GPU is called 'h300'; there are h200"),
        (["--gpu", "rtx4090"], "; did you mean 'rtx-4090'?"),
        (["--model", "opt-175"], "qwen3-235b-a22b; did you mean 'opt-175b'?"),
        (["--format", "int3"], "no format is called 'int3'"),
        (["--price", "cheap"], "--price 'cheap'"),
        (["--price", "nan"], "--price 'nan'"),
        (["--price", "l4=1"], "no GPU of this estimate is called 'l4'"),
        (["--network", "0"], "--network 0: give GB/s, more than 0"),
        (["--network", "nan"], "--network nan: give GB/s, more than 0"),
    ],
)
def test_wrong_arguments_are_named(
    model: str, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", "--model", model, *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_the_papers_claim_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """OPT-175B on 2 GPUs instead of 8."""
    sizes = ["--tp", "1,2,4,8", "--batch", "1", "--group", "64"]
    assert main(["estimate", "--model", "opt-175b", "--gpu", "a100-80", *sizes]) == 0
    expected = "fewest GPUs of those asked about: bf16 8, int8 4, int4 2"
    assert expected in capsys.readouterr().out
