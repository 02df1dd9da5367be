"""Where files are kept between processes, and that one at a time writes there."""

import threading
from pathlib import Path

import pytest

from fqcompile.kernels.cache_directory import cache_directory
from fqcompile.locks import locked


def test_the_cache_directory_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("FQCOMPILE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_directory() == tmp_path / ".cache" / "fqcompile"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/fqcompile")
    monkeypatch.setenv("FQCOMPILE_CACHE_DIR", "/own")
    assert cache_directory() == Path("/own")


def test_a_lock_keeps_others_out_until_its_holder_leaves(tmp_path: Path) -> None:
    """Each opens the file for itself, as another process does."""
    events: list[str] = []

    def enter() -> None:
        with locked(tmp_path / "lock"):
            events.append("other")

    other = threading.Thread(target=enter)
    with locked(tmp_path / "lock"):
        other.start()
        other.join(timeout=0.2)
        events.append("holder")
    other.join(timeout=60)
    assert events == ["holder", "other"]
