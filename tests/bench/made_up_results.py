"""What the tests of the sections of results start from."""

from typing import Any

from bench.core.results import Row


def content(rows: list[Row], **settings: Any) -> dict[str, Any]:
    return {"rows": rows, "settings": settings, "left_out": ["x: no time"], "figures": [],
            "name": "n", "folder": "a-device"}  # fmt: skip


def cells(text: str, start: str) -> list[str]:
    """Of the first line of a table that begins with this."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    line = next(line for line in lines if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]
