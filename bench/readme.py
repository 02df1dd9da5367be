"""Writes what `results/*/*.json` say: six rows into the README, what an option costs into
docs/guide/choosing.md, all into docs/results.md.

    python -m bench readme [--check]

    <!-- bench:kernels -->
    ... is replaced ...
    <!-- /bench:kernels -->

The README has one such place, `summary`; the guide one for each of its tables; docs/results.md one
for the telling rows of each section, and `all` for every row. Results that are not there leave
everything as it is. With --check nothing is written, and it fails where a text and the results
differ.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.choices import choices
from bench.core.results import RESULTS, stored
from bench.core.section import paragraphs, place
from bench.sections import SECTIONS
from bench.summary import summary

README = Path(__file__).parent.parent / "README.md"
PAGE = Path("docs", "results.md")  # beside the README
GUIDE = Path("docs", "guide", "choosing.md")


def telling_rows(root: Path) -> dict[str, str]:
    """{section: what its place in docs/results.md says}, where there are results."""
    found = {}
    for section in SECTIONS:
        render = section.short or section.full
        texts = [paragraphs(render(c), f"{place(c)}.") for c in stored(section.name, root)]
        if texts:
            found[section.name] = paragraphs(*texts)
    return found


def all_rows(root: Path) -> str:
    """Everything that is stored."""
    parts = []
    for section in SECTIONS:
        found = [paragraphs(f"{place(c)}.", section.full(c)) for c in stored(section.files, root)]
        if found:
            parts.append(paragraphs(f"### {section.title}", *found))
    return paragraphs(*parts)


def filled(text: str, bodies: Mapping[str, str]) -> str:
    """The Markdown `text` with each body in its place.

    Raises:
        ValueError: it has no markers for one of them.
    """
    for name, body in bodies.items():
        if body:
            text = _replaced(text, name, body)
    return text


def _replaced(text: str, name: str, body: str) -> str:
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if start not in text or end not in text.partition(start)[2]:
        raise ValueError(f"there are results of {name}, and no place for them: {start} {end}")
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    return f"{before}{start}\n\n{body}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None, readme: Path = README, root: Path = RESULTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail where they differ")
    arguments = parser.parse_args(argv)
    bodies_of = {
        readme: {"summary": summary(root)},
        readme.parent / GUIDE: choices(root),
        readme.parent / PAGE: telling_rows(root) | {"all": all_rows(root)},
    }
    wanted = {}
    for path, bodies in bodies_of.items():
        before = path.read_text(encoding="utf-8")
        try:
            wanted[path] = (before, filled(before, bodies))
        except ValueError as error:
            raise SystemExit(f"{path.name}: {error}") from error
    for path, (before, text) in wanted.items():
        _bring_up_to_date(path, before, text, arguments.check)


def _bring_up_to_date(path: Path, before: str, text: str, check: bool) -> None:
    if before == text:
        print(f"{path.name} is as the results have it")
    elif check:
        raise SystemExit(f"{path.name} differs from the results: python -m bench readme")
    else:
        path.write_text(text, encoding="utf-8")
        print(f"{path.name} has new results")


if __name__ == "__main__":
    main()
