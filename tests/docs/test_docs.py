"""The README and the guides are run: every Python and shell block, in order, in this process.

Inductor is replaced by the eager backend: the documents are tested here, not the compiler.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch._inductor.compile_fx

import fqcompile
from tests.docs import markdown, stand_ins

ROOT = Path(__file__).parent.parent.parent
GUIDES = sorted(ROOT.glob("docs/guide/*.md"))
EXECUTED = [ROOT / "README.md", *GUIDES]
LINKED = [*EXECUTED, *sorted(ROOT.glob("docs/design/*.md")), *sorted(ROOT.glob("docs/*.md")),
          ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]  # fmt: skip
KNOWN = {name: getattr(stand_ins, name) for name in stand_ins.__all__}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wherever `compile_fx` was imported, it returns the graph as it is."""

    def eager(module: Any, args: Any, **settings: Any) -> Any:
        return module.forward

    compile_fx = torch._inductor.compile_fx.compile_fx
    for module in list(sys.modules.values()):
        if vars(module).get("compile_fx") is compile_fx:
            monkeypatch.setattr(module, "compile_fx", eager)
    yield


@pytest.mark.parametrize("path", EXECUTED, ids=name)
def test_every_block_runs(path: Path, tmp_path: Path, no_inductor: None) -> None:
    markdown.run(path, tmp_path, KNOWN)


@pytest.mark.parametrize(
    "text, error",
    [
        ("```python\nimport fqcompile\nfqcompile.no_such_name\n```\n", AttributeError),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\nx = 1\n```\n<!-- check: assert x == 2 -->\n", AssertionError),
        ("<!-- raises: OptionError -->\n```python\n1 / 0\n```\n", AssertionError),
        ("```sh\nfqcompile explain no/such/model\n```\n", AssertionError),
        ("```sh\nfqcompile explain --no-such-option x\n```\n", SystemExit),
        ("```sh\nmake no-such-target\n```\n", ValueError),
        ("```ruby\n```\n", ValueError),
        ("<!-- skip: needs a GPU -->\n", ValueError),
    ],
)
def test_a_broken_block_fails(text: str, error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(error):
        markdown.run(path, tmp_path, KNOWN)


def test_a_failure_names_the_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# Title\n\n```python\nx = 1\n1 / 0\n```\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError) as raised:
        markdown.run(path, tmp_path, {})
    assert raised.value.__notes__[0].startswith(f"{path}:4:\n")
    assert raised.traceback[-1].lineno == 4  # counted from 0


def test_most_blocks_are_run() -> None:
    """What is skipped needs a GPU, ranks, packages to install, a compiler or minutes."""
    found = {p: list(markdown.steps(p.read_text(encoding="utf-8"))) for p in EXECUTED}
    skipped = {name(p): sum(bool(s.skip) for s in steps) for p, steps in found.items()}
    assert {n: count for n, count in skipped.items() if count} == {
        "README.md": 1,
        "docs/guide/diffusers.md": 4,
        "docs/guide/distributed.md": 1,
        "docs/guide/evaluating.md": 2,
        "docs/guide/exported.md": 3,
        "docs/guide/reports.md": 1,
        "docs/guide/serving.md": 2,
        "docs/guide/tuning.md": 3,
        "docs/guide/tutorial.md": 2,
    }


def test_documents_stay_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    for path in GUIDES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 200, name(path)


def headings(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file) if file else path
        assert other.exists(), f"{name(path)} links to {target}"
        assert not anchor or anchor in headings(other.read_text(encoding="utf-8")), target


def test_the_table_of_options_is_complete() -> None:
    text = (ROOT / "docs" / "guide" / "options.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", text, re.MULTILINE)
    table = {option: default for names, default in rows for option in re.findall(r"`(\w+)`", names)}
    config = fqcompile.FineQuantConfig(debug_dir=None)
    assert table.keys() == {field.name for field in fields(config)}
    for option, default in table.items():
        value = getattr(config, option)
        shown = f'`"{value}"`' if isinstance(value, str) else str(value)
        assert default == (shown if isinstance(value, str | int | float | None) else "none"), option


def test_the_site_has_every_page() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [name(path) for path in LINKED if f": {name(path)}\n" not in menu]
    assert not missing, f"mkdocs.yml has no line for {missing}"


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    # explain is a module too, and its function's name in it.
    names = re.findall(r"^::: fqcompile\.(?:explain\.)?(\w+)$", text, re.MULTILINE)
    assert sorted(names) == fqcompile.__all__


@pytest.mark.parametrize("path", GUIDES, ids=name)
def test_tests_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", path.read_text(encoding="utf-8"))
    for file, test in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{name(path)} names {file}::{test}"


def test_each_answer_says_what_shows_it() -> None:
    text = (ROOT / "docs" / "guide" / "faq.md").read_text(encoding="utf-8")
    for answer in text.split("\n### ")[1:]:
        shown = answer.partition("Shown by: ")[2]
        assert "`tests/" in shown or ".md#" in shown, answer.partition("\n")[0]


def test_each_feature_is_held_by_a_test() -> None:
    """And every named test exists: see test_tests_that_are_named_exist."""
    text = (ROOT / "docs" / "guide" / "features.md").read_text(encoding="utf-8")
    table, _, tests = text.partition("\n## The tests\n")
    marks = re.findall(r"^\| ([^|*]+) \| (yes|partly|no|\?) \|", table, re.MULTILINE)
    assert len(marks) == table.count("\n| ") - table.count("\n| **") - 1
    held = re.findall(r"^\| (.+) \| `tests/[\w/]+\.py::\w+` \|$", tests, re.MULTILINE)
    assert held == [feature for feature, mark in marks if mark in ("yes", "partly")]


@pytest.mark.usefixtures("no_inductor")
def test_every_call_that_replaces_another_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code in the right columns of the tables, each on a model of its own."""
    monkeypatch.chdir(tmp_path)
    stand_ins.checkpoint("checkpoint", hidden_size=512, intermediate_size=1024, heads=8)
    ids = torch.arange(1, 6)[None]
    text = (ROOT / "docs" / "guide" / "migrating.md").read_text(encoding="utf-8")
    calls = re.findall(r"^\| .* \| `(\w+\..*?)`[^|`]* \|$", text, re.MULTILINE)
    assert len(calls) == len(re.findall(r"^\| `", text, re.MULTILINE))
    for call in calls:
        known = {**KNOWN, "fqcompile": fqcompile, "peft": peft, "MyModel": stand_ins.llama}
        known["model"] = model = stand_ins.llama()
        known["config"] = peft.LoraConfig(r=4, target_modules=["q_proj"])
        known["batches"] = [torch.randint(512, (4, 128)) for _ in range(4)]
        if "quantize_" not in call and "compile(" not in call:
            fqcompile.quantize_(model)
        result = eval(call, known)
        if isinstance(result, torch.nn.Module):
            with torch.no_grad():
                assert result(input_ids=ids).logits.isfinite().all(), call
