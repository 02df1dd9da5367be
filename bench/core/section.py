"""What a section of results is, and what all have in common: their place, tables, figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from bench.core.results import Results

Content = Mapping[str, Any]  # of one file of results
# Named where the identity has them, in this order.
_VERSIONS = ("torch", "triton", "driver")
_ROOT = "../"  # from docs/results.md


def show(results: Results, full: Callable[[Content], str]) -> None:
    """Prints what docs/results.md will say of these."""
    content = {"name": "", "folder": "", "figures": [], **results.content}
    print(f"{place(content)}\n\n{full(content)}")


def place(content: Content) -> str:
    """Device, versions, commit, date and the command that measures it again."""
    about = content["identity"]
    versions = [f"{key} {about[key]}" for key in _VERSIONS if key in about]
    date = [about["date"].partition(" ")[0]] if "date" in about else []
    where = ", ".join([about["device"], *versions, *date, f"commit {about['commit']}"])
    return f"{where}: `{about['command']}`"


def table(lines: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """As Markdown has it."""
    return tabulate(list(lines), headers, tablefmt="github", disable_numparse=True)


def paragraphs(*texts: str) -> str:
    """Those that say something."""
    return "\n\n".join(text for text in texts if text)


def left_out(content: Content) -> str:
    """What there was no time for, or no library."""
    names = content.get("left_out", ())
    return f"Left out: {', '.join(names)}." if names else ""


def failures(content: Content, name: str) -> str:
    """What has no figure, and why; `name` is the column that says what it is."""
    told = [f"{row[name]}: {row['failure']}" for row in content["rows"] if "failure" in row]
    return f"No figure: {'; '.join(dict.fromkeys(told))}." if told else ""


def spread(row: Mapping[str, Any], key: str, digits: int = 1) -> str:
    """ "8.0 [7.0, 9.0]": the median, the 20th and the 80th percentile."""
    if key not in row:
        return ""
    return f"{row[key]:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def figures(content: Content) -> dict[str, str]:
    """{"pareto": a link} to each figure that lies beside the results."""
    stem, folder = content["name"], content["folder"]
    found = {}
    for file in content["figures"]:
        name = file.removeprefix(f"{stem}-").rpartition(".")[0]
        found[name] = f"![{stem}: {name}]({_ROOT}bench/results/{folder}/{file})"
    return found
