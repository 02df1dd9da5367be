"""Replacing a file whole."""

import os
import threading
from pathlib import Path

import pytest

from fqcompile.files.trusted import replace_text


def test_text_lands_in_folders_made_for_it(tmp_path: Path) -> None:
    path = replace_text(tmp_path / "a" / "b" / "c.txt", "é→\n")
    assert path.read_bytes() == "é→\n".encode()
    assert os.listdir(path.parent) == ["c.txt"]


def test_failure_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = replace_text(tmp_path / "c.txt", "old")

    def refuse(source: object, target: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk on fire"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["c.txt"]


def test_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    texts = {letter * 200_000 for letter in "abc"}
    path = replace_text(tmp_path / "c.txt", "a" * 200_000)
    seen: set[str] = set()
    writing = threading.Event()
    writing.set()

    def read() -> None:
        while writing.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for text in [*texts] * 20:
        replace_text(path, text)
    writing.clear()
    reader.join()
    assert seen and seen <= texts
