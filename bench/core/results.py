"""The file of results that a benchmark fills while it measures, and the time it may take."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fqcompile.report.files import replace_text

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"


@dataclass
class Results:
    """Rows, what they were measured with, and what was left out.

    With a path the file is replaced by each `add`: whoever is stopped leaves what was measured.
    """

    identity: Mapping[str, str]
    settings: dict[str, Any]
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, *rows: Row) -> None:
        self.rows += rows
        self.write()

    def leave_out(self, *names: str) -> None:
        self.left_out += names
        self.write()

    def tell(self, *place: str) -> None:
        """Prints what it was measured on, what failed (named by these keys), what is missing."""
        print(", ".join(f"{key} {value}" for key, value in self.identity.items()))
        for row in self.rows:
            if "failure" in row:
                print(f"{', '.join(str(row[key]) for key in place)}: {row['failure']}")
        if self.left_out:
            print(f"left out {len(self.left_out)}: {', '.join(self.left_out)}")

    def write(self) -> None:
        if self.path is None:
            return
        content = {
            "identity": dict(self.identity),
            "settings": dict(self.settings),
            "left_out": self.left_out,
            "rows": self.rows,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(content, indent=1) + "\n")


def stored(name: str, root: Path = RESULTS) -> Iterator[dict[str, Any]]:
    """The results called `name` of each device, by device; a "*" in the name stands for anything.

    What the file holds, its own "name" and "folder", and the "figures" that lie beside it.
    """
    for path in sorted(root.glob(f"*/{name}.json")):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        drawn = sorted(file.name for file in path.parent.glob(f"{path.stem}-*.[ps][nv]g"))
        yield {**content, "name": path.stem, "folder": path.parent.name, "figures": drawn}


class Budget:
    """Seconds that a run may take. A step begins only where the longest one so far would fit."""

    def __init__(self, seconds: float) -> None:
        self._start = self._step = time.monotonic()
        self._seconds = seconds
        self._longest = 0.0

    @property
    def left(self) -> float:
        return self._seconds - (time.monotonic() - self._start)

    def allows_a_step(self) -> bool:
        """Call it before each step."""
        self._longest = max(self._longest, time.monotonic() - self._step)
        self._step = time.monotonic()
        return self.left > self._longest
