"""Writes what `results/*/*.json` say: the telling rows into the README, all into docs/results.md.

    python -m bench readme [--check]

    <!-- bench:kernels -->
    ... is replaced ...
    <!-- /bench:kernels -->

Results that are not there leave everything as it is. With --check nothing is written, and it fails
where a text and the results differ.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.core.results import RESULTS, stored
from bench.core.section import paragraphs, place
from bench.sections import SECTIONS

README = Path(__file__).parent.parent / "README.md"
PAGE = Path("docs", "results.md")  # beside the README
_PAGE_HEAD = """# Results

Written by `python -m bench readme` from `bench/results/`; the protocol is in
[`bench/README.md`](../bench/README.md)."""


def with_results(text: str, root: Path) -> str:
    """The README `text` with every section for which there are results.

    Raises:
        ValueError: it has no markers for one of them.
    """
    for section in SECTIONS:
        render = section.short or section.full
        found = [paragraphs(render(c), f"{place(c)}.") for c in stored(section.name, root)]
        if found:
            text = _replaced(text, section.name, paragraphs(*found))
    return text


def _replaced(text: str, name: str, body: str) -> str:
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if start not in text or end not in text.partition(start)[2]:
        raise ValueError(f"there are results of {name}, and no place for them: {start} {end}")
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    return f"{before}{start}\n\n{body}\n\n{end}{after}"


def results_page(root: Path) -> str:
    """docs/results.md: everything that is stored; nothing where nothing is."""
    parts = []
    for section in SECTIONS:
        found = [paragraphs(f"{place(c)}.", section.full(c)) for c in stored(section.files, root)]
        if found:
            parts.append(paragraphs(f"## {section.title}", *found))
    return paragraphs(_PAGE_HEAD, *parts) + "\n" if parts else ""


def main(argv: Sequence[str] | None = None, readme: Path = README, root: Path = RESULTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail where they differ")
    arguments = parser.parse_args(argv)
    page = readme.parent / PAGE
    try:
        wanted = with_results(readme.read_text(encoding="utf-8"), root)
    except ValueError as error:
        raise SystemExit(f"{readme.name}: {error}") from error
    for path, text in ((readme, wanted), (page, results_page(root))):
        _bring_up_to_date(path, text, arguments.check)


def _bring_up_to_date(path: Path, text: str, check: bool) -> None:
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before == text:
        print(f"{path.name} is as the results have it")
    elif check:
        raise SystemExit(f"{path.name} differs from the results: python -m bench readme")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path.name} has new results")


if __name__ == "__main__":
    main()
