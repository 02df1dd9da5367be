"""`bench readme`: the tables that results give, and a README that has none stays as it is."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from bench import readme
from bench.core.results import Results

IDENTITY = {
    "device": "NVIDIA X",
    "torch": "2.13",
    "triton": "3.7",
    "commit": "abc",
    "command": "python -m bench kernels",
}
TILE = "16x16x16x1w4s2"
EMPTY = "# t\n<!-- bench:kernels -->\n<!-- /bench:kernels -->\nend\n"


def kernel_row(contender: str, us: float, over: float | None = None, m: int = 1) -> dict[str, Any]:
    layer = {"n": 64, "k": 32, "m": m, "contender": contender, "detail": f"t:{TILE}"}
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
    assert cells == ["64 x 32", "1", "8.0 [7.0, 9.0]", "62%", "20.0 [19.0, 21.0]", "2.50x", TILE]
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
    assert len(rows) == 2  # the most that was measured, and the whole model
    assert "4 of 8" in rows[0]
    assert "8, extrapolated from 2 and 4" in rows[1]
    assert "4.00 (3.00x, 1000 tokens/s)" in rows[1]


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
    assert not (tmp_path / "docs").exists()
    readme.main([], file, root)
    readme.main(["--check"], file, root)


def test_the_page_has_all_rows_and_is_checked_too(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(EMPTY)
    readme.main([], file, root)
    page = tmp_path / "docs" / "results.md"
    text = page.read_text()
    assert "## Layers on a GPU\n\nNVIDIA X, torch 2.13" in text
    assert "| 64 x 32 " in text
    page.write_text(text.replace("8.0", "7.9"))
    with pytest.raises(SystemExit, match=r"results\.md differs from the results"):
        readme.main(["--check"], file, root)


def test_every_file_of_results_is_shown() -> None:
    for path in readme.RESULTS.glob("*/*.json"):
        shown = [s.name for s in readme.SECTIONS if fnmatch(path.stem, s.files)]
        assert len(shown) == 1, f"{path.name}: {shown}"


def test_every_section_has_its_place_in_the_readme() -> None:
    text = readme.README.read_text(encoding="utf-8")
    for section in readme.SECTIONS:
        assert text.count(f"<!-- bench:{section.name} -->") == 1, section.name
        assert text.count(f"<!-- /bench:{section.name} -->") == 1, section.name


def test_the_readme_of_this_checkout_is_as_its_results_have_it() -> None:
    readme.main(["--check"])


def test_committed_results_say_what_they_are_of() -> None:
    for path in readme.RESULTS.glob("*/*.json"):
        content = json.loads(path.read_text())
        assert {"device", "torch", "commit", "command"} <= set(content["identity"]), path
