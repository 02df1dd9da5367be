"""`bench readme`: the tables that results give, and a README that has none stays as it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import readme
from bench.results import Results

IDENTITY = {
    "device": "NVIDIA X",
    "torch": "2.13",
    "triton": "3.7",
    "commit": "abc",
    "command": "python -m bench kernels",
}
EMPTY = "# t\n<!-- bench:kernels -->\n<!-- /bench:kernels -->\nend\n"


def kernel_row(contender: str, us: float, over: float | None = None, m: int = 1) -> dict[str, Any]:
    layer = {"n": 64, "k": 32, "m": m, "contender": contender, "detail": "t:16x16x16x1w4s2"}
    times = {"us": us, "low": us - 1, "high": us + 1, "of_ideal": 5 / us, "over_cublas": over}
    return layer | {"ideal_us": 5.0} | times


@pytest.fixture
def root(tmp_path: Path) -> Path:
    settings = {"bits": 4, "group": 128, "dtype": "bf16"}
    path = tmp_path / "results" / "nvidia-x" / "kernels.json"
    results = Results(IDENTITY, settings, path)
    results.add(kernel_row("fqcompile closed form", 10.0, 2.0))
    results.add(kernel_row("fqcompile tuned", 8.0, 2.5), kernel_row("cuBLAS", 20.0, 1.0))
    results.add({"n": 64, "k": 32, "m": 1, "contender": "gemlite", "failure": "not installed"})
    return tmp_path / "results"


def test_the_table_has_the_best_of_ours_beside_the_others(root: Path) -> None:
    text = readme.with_results(EMPTY, root)
    row = next(line for line in text.splitlines() if line.startswith("| 64 x 32"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["64 x 32", "1", "8.0 [7.0, 9.0]", "62%", "20.0 [19.0, 21.0]", "2.50x"]
    assert "NVIDIA X, torch 2.13, triton 3.7, commit abc: `python -m bench kernels`" in text
    assert text.startswith("# t\n<!-- bench:kernels -->\n")
    assert text.endswith("<!-- /bench:kernels -->\nend\n")


def test_a_second_time_changes_nothing(root: Path) -> None:
    text = readme.with_results(EMPTY, root)
    assert readme.with_results(text, root) == text


def test_models_are_those_with_all_layers(root: Path) -> None:
    row = {"model": "opt", "phase": "decode", "batch": 4, "tokens": 64, "way": "int4"}
    row |= {"of_layers": 8, "ms": 2.0, "over_inductor": 3.0, "low": 1.9, "high": 2.1}
    results = Results(IDENTITY, {"dtype": "bf16"}, root / "nvidia-x" / "models.json")
    results.add(row | {"layers": 4}, row | {"layers": 8, "extrapolated_from": [2, 4], "ms": 4.0})
    text = readme.with_results(EMPTY + "<!-- bench:models -->\n<!-- /bench:models -->\n", root)
    rows = [line for line in text.splitlines() if line.startswith("| opt")]
    assert len(rows) == 1
    assert "extrapolated from 2 and 4 layers" in rows[0]
    assert "| 1000" in rows[0]


def test_tuned_cases_have_their_best_of_the_second_measurement(tmp_path: Path) -> None:
    trial = {"low": 9.0, "high": 11.0, "spread": 0.2, "of_ideal": 0.5}
    case: dict[str, Any] = {
        "n": 64, "k": 32, "experts": 0, "rows": 16, "ideal_us": 5.0, "best": "b", "choice": "a",
        "choice_over_best": 1.25, "verdict": "slower",
        "final": {"b": {"microseconds": 8.0, "low": 7.0, "high": 9.0}},
        "trials": [
            {"config": "a", "microseconds": 10.0, **trial},
            {"config": "b", "microseconds": 9.5, **trial},
            {"config": "c", "refusal": "out of resource"},
        ],
    }  # fmt: skip
    refused = {"config": "a", "refusal": "out of resource"}
    none = {"best": None, "final": {}, "trials": [refused], "choice_over_best": None}
    settings = {"bits": 4, "group": 128, "dtype": "bf16"}
    results = Results(IDENTITY, settings, tmp_path / "nvidia-x" / "tune.json")
    results.add(case, case | none)
    text = readme.with_results("<!-- bench:tune -->\n<!-- /bench:tune -->\n", tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| 64 x 32")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    best = ["b", "8.0 [7.0, 9.0]", "62%"]
    assert cells == ["64 x 32", "16", *best, "a", "1.25x, slower", "3"]


def test_without_results_the_readme_stays_as_it_is(tmp_path: Path) -> None:
    for text in ("no markers", EMPTY):
        assert readme.with_results(text, tmp_path) == text
    file = tmp_path / "README.md"
    file.write_text("as it is")
    readme.main([], file, tmp_path)
    assert file.read_text() == "as it is"


def test_results_without_a_place_for_them_are_told(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("no markers")
    with pytest.raises(SystemExit, match="no place for them: <!-- bench:kernels -->"):
        readme.main([], file, root)
    assert file.read_text() == "no markers"


def test_check_writes_nothing(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(EMPTY)
    with pytest.raises(SystemExit, match="differs from the results"):
        readme.main(["--check"], file, root)
    assert file.read_text() == EMPTY
    readme.main([], file, root)
    readme.main(["--check"], file, root)


def test_the_readme_of_this_checkout_is_as_its_results_have_it() -> None:
    readme.main(["--check"])


def test_committed_results_say_what_they_are_of() -> None:
    for path in readme.RESULTS.glob("*/*.json"):
        content = json.loads(path.read_text())
        assert {"device", "torch", "commit", "command"} <= set(content["identity"]), path
