"""Files that came back from a GPU become results and tables; what is damaged is left out."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from bench import readme
from bench.core.results import RESULTS, ROOT, slug
from bench.planner import run as planner
from fqcompile.kernels.tuning.table import Cases, read_cases


def replay(folders: Sequence[Path], root: Path = RESULTS, page: Path = ROOT / "README.md") -> None:
    """Put each file of results, and the tuned table, below its device; write and print what follows
    from them. What is damaged is left out.

    Raises:
        SystemExit: there is no such folder, or nothing in it that came back whole.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise SystemExit(f"bench gpu --replay: {missing[0]} is no folder")
    kept = [_kept(path, root) for folder in folders for path in sorted(folder.glob("*.json"))]
    if not any(kept):
        names = ", ".join(map(str, folders))
        raise SystemExit(f"bench gpu --replay: no file of results in {names} is whole")
    readme.main([], readme=page, root=root)
    planner.main(["--results", str(root)])


def _kept(path: Path, root: Path) -> bool:
    """Whether it is a file of results or a tuned table, which then lies below its device."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        print(f"{path} is left out: it is no whole JSON ({error})")
        return False
    match content:
        case {"identity": {"device": str(device)}, "settings": dict(), "left_out": list(),
              "rows": [*rows]} if all(isinstance(row, dict) for row in rows):  # fmt: skip
            _copied(path, root, device)
        case {"fingerprint": {"gpu": str(device), **rest}, "schema": int()}:
            cases = read_cases(path, {"gpu": device, **rest})
            if not cases:
                print(f"{path} is left out: it is no tuned table that this version reads")
                return False
            _copied(path, root, device)
            _show_tuned(cases)
        case _:
            print(f"{path} is left out: it holds neither results nor a tuned table")
            return False
    return True


def _copied(path: Path, root: Path, device: str) -> None:
    folder = root / slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)
    print(f"{path} is {folder / path.name} now")


def _show_tuned(cases: Cases) -> None:
    """Print the fastest configuration of each case beside the heuristic's."""
    lines = []
    for (key, bucket), case in cases.items():
        if (best := case.best) is None or best.timing is None:
            lines.append((key, bucket, "none", "", case.failure))
            continue
        first = case.trials[0]  # the heuristic's comes first
        over = first.timing and f"{first.timing.microseconds / best.timing.microseconds:.2f}x"
        lines.append((key, bucket, best.config, best.timing, f"{first.config} {over or 'failed'}"))
    headers = ("tuned", "M", "fastest", "us", "heuristic")
    print(f"\n{tabulate(lines, headers, disable_numparse=True)}")
