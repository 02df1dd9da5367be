"""`bench readme`: the tables that results give; a text without results stays as it is."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from bench import readme
from bench.choices import choices
from bench.core.results import Results
from bench.summary import summary

IDENTITY = {
    "device": "NVIDIA X",
    "torch": "2.13",
    "triton": "3.7",
    "commit": "abc",
    "command": "python -m bench kernels",
}
TILE = "16x16x16x1w4s2"
EMPTY = "# t\n<!-- bench:kernels -->\n<!-- /bench:kernels -->\nend\n"
ALL = "<!-- bench:all -->\n<!-- /bench:all -->\n"


def kernel_row(contender: str, us: float, over: float | None = None, m: int = 1) -> dict[str, Any]:
    layer = {"n": 64, "k": 32, "m": m, "contender": contender, "detail": f"t:{TILE}"}
    times = {"us": us, "low": us - 1, "high": us + 1, "of_ideal": 5 / us, "over_cublas": over}
    return layer | {"ideal_us": 5.0} | times


def page_text(root: Path, text: str = EMPTY) -> str:
    return readme.filled(text, readme.telling_rows(root))


@pytest.fixture
def checkout(tmp_path: Path) -> tuple[Path, Path]:
    """A README and a page of results, with places for the GPU's kernels and all rows."""
    file, page = tmp_path / "README.md", tmp_path / "docs" / "results.md"
    guide = tmp_path / readme.GUIDE
    guide.parent.mkdir(parents=True)
    guide.write_text("no tables")
    file.write_text("as it is")
    page.write_text(EMPTY + ALL)
    return file, page


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
    text = page_text(root)
    row = next(line for line in text.splitlines() if line.startswith("| 64 x 32"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["64 x 32", "1", "8.0 [7.0, 9.0]", "62%", "20.0 [19.0, 21.0]", "2.50x", TILE]
    assert "NVIDIA X, torch 2.13, triton 3.7, commit abc: `python -m bench kernels`" in text
    assert text.startswith("# t\n<!-- bench:kernels -->\n")
    assert text.endswith("<!-- /bench:kernels -->\nend\n")


def test_a_second_time_changes_nothing(root: Path) -> None:
    text = page_text(root)
    assert page_text(root, text) == text


def test_models_are_those_with_all_layers(root: Path) -> None:
    row = {"model": "opt", "phase": "decode", "batch": 4, "tokens": 64, "way": "int4"}
    row |= {"of_layers": 8, "ms": 2.0, "over_inductor": 3.0, "low": 1.9, "high": 2.1}
    results = Results(IDENTITY, {"dtype": "bf16"}, root / "nvidia-x" / "models.json")
    results.add(row | {"layers": 4}, row | {"layers": 8, "extrapolated_from": [2, 4], "ms": 4.0})
    text = page_text(root, EMPTY + "<!-- bench:models -->\n<!-- /bench:models -->\n")
    rows = [line for line in text.splitlines() if line.startswith("| opt")]
    assert len(rows) == 2  # the most that was measured, and the whole model
    assert "4 of 8" in rows[0]
    assert "8, extrapolated from 2 and 4" in rows[1]
    assert "4.00 (3.00x, 1000 tokens/s)" in rows[1]


def test_without_results_the_texts_stay_as_they_are(
    checkout: tuple[Path, Path], tmp_path: Path
) -> None:
    file, page = checkout
    readme.main([], file, tmp_path)
    assert (file.read_text(), page.read_text()) == ("as it is", EMPTY + ALL)


def test_results_without_a_place_for_them_are_told(root: Path, checkout: tuple[Path, Path]) -> None:
    file, page = checkout
    page.write_text("no markers")
    with pytest.raises(
        SystemExit, match=r"results\.md: .*no place for them: <!-- bench:kernels -->"
    ):
        readme.main([], file, root)
    assert page.read_text() == "no markers"


def test_check_writes_nothing(root: Path, checkout: tuple[Path, Path]) -> None:
    file, page = checkout
    with pytest.raises(SystemExit, match=r"results\.md differs from the results"):
        readme.main(["--check"], file, root)
    assert page.read_text() == EMPTY + ALL
    readme.main([], file, root)
    readme.main(["--check"], file, root)


def test_the_page_has_all_rows_and_is_checked_too(root: Path, checkout: tuple[Path, Path]) -> None:
    file, page = checkout
    readme.main([], file, root)
    text = page.read_text()
    assert "### Layers on a GPU\n\nNVIDIA X, torch 2.13" in text
    assert text.count("| 64 x 32 ") == 2
    page.write_text(text.replace("8.0", "7.9"))
    with pytest.raises(SystemExit, match=r"results\.md differs from the results"):
        readme.main(["--check"], file, root)


def test_the_readme_has_one_table_of_six_rows_for_a_device() -> None:
    table = summary()
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 6 * len(list(readme.RESULTS.iterdir()))


def test_every_file_of_results_is_shown() -> None:
    for path in readme.RESULTS.glob("*/*.json"):
        shown = [s.name for s in readme.SECTIONS if fnmatch(path.stem, s.files)]
        assert len(shown) == 1, f"{path.name}: {shown}"


def test_every_section_has_its_place_on_the_page() -> None:
    text = (readme.README.parent / readme.PAGE).read_text(encoding="utf-8")
    for name in (*(section.name for section in readme.SECTIONS), "all"):
        assert text.count(f"<!-- bench:{name} -->") == 1, name
        assert text.count(f"<!-- /bench:{name} -->") == 1, name
    assert readme.README.read_text(encoding="utf-8").count("<!-- bench:summary -->") == 1
    guide = (readme.README.parent / readme.GUIDE).read_text(encoding="utf-8")
    for name in choices():
        assert guide.count(f"<!-- bench:{name} -->") == 1, name


def test_the_readme_of_this_checkout_is_as_its_results_have_it() -> None:
    readme.main(["--check"])


def test_committed_results_say_what_they_are_of() -> None:
    for path in readme.RESULTS.glob("*/*.json"):
        content = json.loads(path.read_text())
        assert {"device", "torch", "commit", "command"} <= set(content["identity"]), path


def test_the_guide_has_an_option_beside_what_was_measured_of_it(tmp_path: Path) -> None:
    draws = [
        {"model": model, "way": "int4 normal g32, synthetic", "bits_per_weight": 4.5, **found}
        for model, found in {"gemma": {"divergence": 0.12}, "MiniLM": {"divergence": 0.016}}.items()
    ]
    step = {"model": "m", "layers": 2, "phase": "decode", "tokens": 64}
    steps = [step | {"way": "inductor", "ms": 9.0}, step | {"way": "int8", "ms": 3.0}]
    for name, rows in {"accuracy-draws": draws, "models-cpu-gemma": steps}.items():
        Results(IDENTITY, {}, tmp_path / "x" / f"{name}.json").add(*rows)
    tables = choices(tmp_path)
    assert cells_of(tables["choices-quality"]) == [["`granularity=32`", "4.50", "0.1200", "0.0160"]]
    assert cells_of(tables["choices-decoding"]) == [
        ["Inductor, 16 bits", "9.0 ms"],
        ["`bits=8`", "3.0 ms (3.00x)"],
    ]
    assert tables["choices-memory"] == ""


def cells_of(text: str) -> list[list[str]]:
    """The rows of its table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
