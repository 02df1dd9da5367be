"""Write a compile report as files in a folder, and as artifacts in torch's structured trace."""

import logging
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fqcompile.distributed.ranks import own_folder
from fqcompile.files.trusted import replace_text
from fqcompile.report.compile_report import CompileReport, PassRecord
from fqcompile.torch_compat import trace_log, trace_structured

log = logging.getLogger("fqcompile")

_LONGEST_NAME = 60  # in 4 bytes each, as file systems allow 255
_failed: set[Path] = set()


def _pass_text(record: PassRecord) -> str:
    head = f"{record.name}: count {record.count}, {record.seconds:.6f} s"
    return "\n".join([head, *(f"matched {name}" for name in record.matched), ""])


def _pass_diff(name: str, record: PassRecord) -> str:
    header = [f"--- {name}.before.py", f"+++ {name}.after.py"] if record.diff else []
    return "".join(f"{line}\n" for line in [*header, *record.diff])


def _pass_files(name: str, record: PassRecord) -> Iterator[tuple[str, str]]:
    yield f"{name}.txt", _pass_text(record)
    if record.before is not None:
        yield f"{name}.before.py", record.before
    if record.after is not None:
        yield f"{name}.after.py", record.after
    if record.before is not None and record.after is not None:
        yield f"{name}.diff", _pass_diff(name, record)


def _safe(name: str) -> str:
    """A graph's name as a folder name; long names keep their end, which holds the number."""
    return re.sub(r"[^\w.-]+", "_", name)[-_LONGEST_NAME:].strip(".") or "graph"


def _files(report: CompileReport) -> Iterator[tuple[str, str]]:
    for number, record in enumerate(report.passes, start=1):
        yield from _pass_files(f"{number:02d}_{_safe(record.name)}", record)
    yield "sites.txt", f"{report}\n"
    yield "report.json", f"{report.to_json()}\n"


def dump_report(report: CompileReport, debug_dir: str | os.PathLike[str]) -> Path:
    """Write the report below `debug_dir`, in a folder named after its graph; return the folder.

    With several ranks, each has a folder of its own that contains those of its graphs.
    Each pass has NN_<pass>.before.py, .after.py and .diff (if the report holds the graphs) and
    .txt; the folder also has sites.txt, report.json and report.html. A failed write is logged once
    per `debug_dir` and does not stop the compilation.
    """
    folder = own_folder(Path(debug_dir)) / _safe(report.graph)
    try:
        for name, text in _files(report):
            replace_text(folder / name, text)
        report.to_html(folder / "report.html")
    except OSError as error:
        if Path(debug_dir) not in _failed:
            log.warning(
                "debug_dir=%s: %s is not written, or not all of it (%s); choose a directory that "
                "can be written, with room",
                debug_dir,
                folder,
                error,
            )
        _failed.add(Path(debug_dir))
    return folder


def is_traced() -> bool:
    """Whether TORCH_TRACE, or another log handler, receives the artifacts of `trace_report`."""
    return bool(trace_log.handlers)


def trace_report(report: CompileReport) -> None:
    """Log the files of a dump if TORCH_TRACE is set, so that `tlparse` shows them."""
    if not is_traced():
        return
    for name, text in _files(report):
        encoding = "json" if name.endswith(".json") else "string"
        # tlparse appends the extension of the encoding itself.
        artifact = f"fqcompile_{_safe(report.graph)}_{name.removesuffix('.json')}"
        metadata = partial(dict[str, str], name=artifact, encoding=encoding)
        trace_structured("artifact", metadata_fn=metadata, payload_fn=partial(str, text))
