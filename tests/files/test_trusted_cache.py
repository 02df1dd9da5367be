"""Where files are kept between processes, who may write there, and that one does at a time."""

import os
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fqcompile.files import trusted as place
from fqcompile.files.trusted import (
    cache_directory,
    check_trusted,
    fallback_directory,
    replace_file,
    writing,
)
from fqcompile.locks import locked
from tests.children import NOBODY, in_child, needs_root, open_folder


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


def test_a_user_without_a_home_has_a_directory_of_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FQCOMPILE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for one without a name
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = cache_directory()
    assert path == fallback_directory() == tmp_path / f"fqcompile-{os.geteuid()}"
    before = os.umask(0)
    try:
        with writing(path / "weights"):
            replace_file(path / "weights" / "a", [b"x"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    check_trusted(path / "weights" / "a")  # whatever the umask


def test_where_no_folder_for_temporary_files_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    assert fallback_directory() == Path(f"/tmp/fqcompile-{os.geteuid()}")


Arrange = Callable[[Path], object]


@pytest.mark.parametrize(
    ("arrange", "text"),
    [
        (lambda at: at.chmod(0o777), "others may write to .*/top/cache "),
        (lambda at: at.chmod(0o1777), "others may write to .*/top/cache "),
        (lambda at: at.parent.chmod(0o777), "others may write to .*/top "),
        (lambda at: (at / "file").chmod(0o606), "others may write to .*/cache/file "),
    ],
    ids=["directory", "sticky", "parent", "file"],
)
def test_where_others_may_write_is_named(arrange: Arrange, text: str, tmp_path: Path) -> None:
    cache = tmp_path / "top" / "cache"
    cache.mkdir(parents=True)
    (cache / "file").touch()
    check_trusted(cache / "file")
    arrange(cache)
    with pytest.raises(PermissionError, match=f"{text}.*chmod go-w"):
        check_trusted(cache)
        check_trusted(cache / "file")


def test_links_are_followed_to_where_they_lead(tmp_path: Path) -> None:
    """A link is as good as the directory that it is in, and the one that it leads to."""
    (tmp_path / "good" / "cache").mkdir(parents=True)
    (tmp_path / "open" / "cache").mkdir(parents=True)
    (tmp_path / "link").symlink_to("good/../good/cache")
    (tmp_path / "open" / "link").symlink_to("../good/cache")
    (tmp_path / "twice").symlink_to("open/link")
    (tmp_path / "loop").symlink_to("loop")
    check_trusted(tmp_path / "link")
    check_trusted(tmp_path / "twice")
    (tmp_path / "open").chmod(0o777)
    check_trusted(tmp_path / "link")
    for path in ("open/link", "open/cache", "twice"):
        with pytest.raises(PermissionError, match=r"others may write to .*open "):
            check_trusted(tmp_path / path)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        check_trusted(tmp_path / "loop")
    with pytest.raises(FileNotFoundError):
        check_trusted(tmp_path / "none")


@needs_root
@pytest.mark.parametrize(
    ("members", "name", "is_own"),
    [
        ([], "some", True),
        (["some"], "some", True),
        (["some", "other"], "some", False),
        ([], "users", False),
    ],
)
def test_the_group_of_a_user_alone_is_he_himself(
    members: list[str], name: str, is_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As distributions set users up, with a umask of 002."""
    user = type("User", (), {"pw_gid": NOBODY, "pw_name": "some"})
    group = type("Group", (), {"gr_name": name, "gr_mem": members})
    monkeypatch.setattr(place.pwd, "getpwuid", lambda uid: user)
    monkeypatch.setattr(place.grp, "getgrgid", lambda gid: group)
    place._is_own_group.cache_clear()
    with open_folder() as folder:
        cache = folder / "cache"
        cache.mkdir()
        os.chown(cache, NOBODY, NOBODY)
        cache.chmod(0o775)

        def is_trusted() -> bool:
            try:
                check_trusted(cache)
            except PermissionError as error:
                assert "others may write" in str(error)
                return False
            return True

        assert in_child(is_trusted, NOBODY) is is_own
    place._is_own_group.cache_clear()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with writing(tmp_path):
        replace_file(path, [b"old", memoryview(b" one")])
        (tmp_path / ".part").symlink_to(path)  # whatever lies there is not written through

        def broken() -> object:
            yield b"new"
            raise OSError("no room")

        with pytest.raises(OSError, match="no room"):
            replace_file(path, broken())  # type: ignore[arg-type]
        assert path.read_bytes() == b"old one"
        assert {p.name for p in tmp_path.iterdir()} == {"file", ".lock"}
