"""The steps of a Markdown file: its code blocks, and hidden comments about them.

<!-- setup: CODE -->    Python that runs first, such as models that stand in for the reader's
<!-- check: CODE -->    Python that holds what the text says of the block before
<!-- skip: REASON -->   the next block is not run
<!-- raises: ERROR -->  the next block raises an error of this class
"""

import os
import re
import runpy
import shlex
from collections.abc import Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fqcompile import cli

PYTHON, SHELL = ("python",), ("sh", "bash", "console")
NOT_RUN = ("", "text", "json", "diff", "cpp")  # drawings, output, file contents
_STEP = re.compile(
    r"^<!-- (?P<word>setup|check|skip|raises): (?P<note>.*?) -->$"
    r"|^```(?P<language>\w*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Step:
    """One piece of code. `line` is that of its first line; `skip` and `raises` are notes on it."""

    line: int
    language: str
    text: str
    skip: str = ""
    raises: str = ""


def steps(markdown: str) -> Iterator[Step]:
    """In the order of the file.

    Raises:
        ValueError: a block is of an unknown language, or a note has no block.
    """
    notes: dict[str, str] = {}
    for found in _STEP.finditer(markdown):
        word, language = found["word"], found["language"]
        line = markdown.count("\n", 0, found.start("note" if word else "body")) + 1
        if word in ("skip", "raises"):
            notes[word] = found["note"]
        elif word:
            yield Step(line, "python", found["note"])
        elif language in (*PYTHON, *SHELL):
            yield Step(line, language, found["body"], **notes)
            notes = {}
        elif language not in NOT_RUN:
            raise ValueError(f"line {line}: nothing runs blocks of {language!r}")
    if notes:
        raise ValueError(f"a note without a block: {notes}")


def run(path: Path, folder: Path, known: Mapping[str, Any]) -> None:
    """Every step of the file in one namespace and one working directory; the first failure shows
    the file and line."""
    namespace: dict[str, Any] = {"__name__": "__docs__", **known}
    with chdir(folder):
        for step in steps(path.read_text(encoding="utf-8")):
            if step.skip:
                continue
            try:
                _run(step, path, namespace)
            except BaseException as error:
                error.add_note(f"{path}:{step.line}:\n{step.text}")
                raise


def _run(step: Step, path: Path, namespace: dict[str, Any]) -> None:
    if step.language in SHELL:
        for command in _commands(step.text):
            _run_command(command)
        return
    # Empty lines, so that a traceback has the line of the file.
    code = compile("\n" * (step.line - 1) + step.text, str(path), "exec")
    if not step.raises:
        exec(code, namespace)
        return
    with pytest.raises(Exception) as raised:
        exec(code, namespace)
    assert raised.type.__name__ == step.raises


def _commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def _run_command(words: list[str]) -> None:
    """`NAME=VALUE ... fqcompile ...` or `... python FILE`, in this process."""
    given = [word for word in words if re.match(r"[A-Z_]+=", word)]
    command, *arguments = words[len(given) :]
    with pytest.MonkeyPatch.context() as patch:
        for assignment in given:
            patch.setitem(os.environ, *assignment.split("=", 1))
        if command == "fqcompile":
            assert cli.main(arguments) == 0
        elif command == "python" and len(arguments) == 1:
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            raise ValueError(f"nothing runs {' '.join(words)!r}: mark the block with skip")
