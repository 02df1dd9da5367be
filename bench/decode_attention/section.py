"""The section of `bench decode_attention`."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from bench.core.results import Row
from bench.core.section import Content, left_out, paragraphs, spread, table

HEADERS = ("shape", "context", "type", "threads", "ours, us", "Inductor, us", "reading, us",
           "ours / reading", "Inductor / ours")  # fmt: skip
TARGET = 1.5


def decode_attention(content: Content) -> str:
    """Every case."""
    return _of(content, content["rows"])


def decode_attention_short(content: Content) -> str:
    """On one thread, in 16 bits."""
    few = [r for r in content["rows"] if r["threads"] == 1 and r["dtype"] == "bfloat16"]
    return _of(content, few)


def _of(content: Content, rows: Iterable[Row]) -> str:
    cases = list(_cases(rows))
    ratios = [case["fqcompile"]["us"] / case["read"]["us"] for case in cases if _is_whole(case)]
    within = sum(ratio <= TARGET for ratio in ratios)
    text = (
        f"One query of a layer, its keys and values in memory. In {within} of {len(ratios)} cases "
        f"ours takes at most {TARGET} times what reading K and V once takes."
    )
    return paragraphs(text, table(map(_line, cases), HEADERS), left_out(content))


def _cases(rows: Iterable[Row]) -> Iterator[Mapping[str, Any]]:
    """{way: its row} of each case, with what all have in common."""
    key = ("shape", "context", "dtype", "threads")
    for about, group in groupby(rows, key=lambda row: [row[name] for name in key]):
        yield {row["way"]: row for row in group} | {"about": about}


def _is_whole(case: Mapping[str, Any]) -> bool:
    return all("us" in case.get(way, {}) for way in ("fqcompile", "read"))


def _line(case: Mapping[str, Any]) -> list[str]:
    ours, theirs, read = (case.get(way, {}) for way in ("fqcompile", "inductor", "read"))
    times = [spread(row, "us", 0) for row in (ours, theirs, read)]
    return [*map(str, case["about"]), *times, _ratio(ours, read), _ratio(theirs, ours)]


def _ratio(a: Row, b: Row) -> str:
    return f"{a['us'] / b['us']:.2f}" if "us" in a and "us" in b else ""
