"""The cache of decoded images: its folder, the substitute, and entries that stay whole if a process is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from batchtrim.lab.run import loading
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.task import cache


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv("BATCHTRIM_CACHE")
    assert cache.cache_folder().name == "batchtrim"


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home in which nobody can write, root included: it is a file."""
    monkeypatch.delenv("BATCHTRIM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "home").write_text("x")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in ("HOME", "LOCALAPPDATA", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return tmp_path


def test_a_home_that_cannot_be_written_gives_way_to_temporary_files(no_home: Path) -> None:
    """It was an error, in a container whose home is read-only too."""
    folder, (note,) = cache.folder_for("entry")
    assert folder.parent == no_home / "temporary"
    assert note.startswith(f"decoded images go to {folder}, since {no_home / 'home'}")
    assert "cannot be written (Not a directory); set BATCHTRIM_CACHE" in note
    assert cache.folder_for("entry")[0] == folder  # every process finds the same


def test_a_folder_that_was_named_is_taken(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.folder_for("entry", no_home / "home" / "a") == (no_home / "home" / "a", ())
    monkeypatch.setenv("BATCHTRIM_CACHE", str(no_home / "home" / "b"))
    assert cache.folder_for("entry") == (no_home / "home" / "b", ())


def test_what_a_cache_holds_is_used_though_it_cannot_be_written(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_home / "shared"))
    (no_home / "shared" / "batchtrim" / "entry").mkdir(parents=True)
    monkeypatch.setattr(cache, "_reason_not_to_write", lambda folder: "Read-only file system")
    assert cache.folder_for("entry") == (no_home / "shared" / "batchtrim", ())
    assert cache.folder_for("other")[0].parent == no_home / "temporary"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users as POSIX has them")
@pytest.mark.parametrize("taken", ["link", "open to all"])
def test_temporary_files_that_others_can_write_are_not_trusted(taken: str, no_home: Path) -> None:
    """Somebody else may have made the folder first, to have us train on other images."""
    place = no_home / "temporary" / f"batchtrim-{os.getuid()}"
    if taken == "link":
        (no_home / "theirs").mkdir()
        place.symlink_to(no_home / "theirs")
    else:
        place.mkdir()
        place.chmod(0o777)
    folder, notes = cache.folder_for("entry")
    assert str(folder).startswith(str(no_home / "home"))
    assert notes == ()


def test_a_user_without_a_home(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback: a container's user need not be in its list of users."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(path))
    folder, (note,) = cache.folder_for("entry")
    assert folder.parent == no_home / "temporary"
    assert "there is no home folder" in note


def test_the_substitute_is_noted_before_the_first_run_and_not_recorded(
    no_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for value, name in ((0, "a"), (255, "b")):
        for side in ("train", "test"):
            (no_home / "mine" / side / name).mkdir(parents=True)
            Image.new("L", (8, 8), value).save(no_home / "mine" / side / name / "0.png")
    config = RunConfig(dataset=str(no_home / "mine"), model="mlp", epochs=1)
    assert any("decoded images go to" in note for note in loading.prepare(config, None, None))
    assert not any("decoded images go to" in note for note in loading.load_images(config).notes)


def fill_slowly(folder: Path, begun: Path) -> None:
    with cache.filled(folder) as part:
        (part / "half").write_text("x")
        begun.touch()
        time.sleep(60)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # a child uses no thread
def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """Half an array stayed in the cache for ever."""
    context = multiprocessing.get_context("fork")
    writers = []
    for name in ("killed", "alive"):
        writers.append(context.Process(target=fill_slowly, args=(tmp_path / "cache" / name, tmp_path / name)))
        writers[-1].start()
    try:
        while not all((tmp_path / name).exists() for name in ("killed", "alive")):
            time.sleep(0.05)
        os.kill(writers[0].pid or 0, signal.SIGKILL)
        writers[0].join()
        with cache.filled(tmp_path / "cache" / "mine") as part:
            (part / "whole").write_text("x")
        left = sorted(path.name.partition(".")[0] + path.suffix for path in (tmp_path / "cache").iterdir())
        assert left == ["alive.lock", "alive.part", "mine"]
    finally:
        writers[1].kill()
        writers[1].join()


def test_of_two_at_once_the_faster_ones_entry_stays(tmp_path: Path) -> None:
    with cache.filled(tmp_path / "entry") as slow:
        (slow / "who").write_text("slow")
        with cache.filled(tmp_path / "entry") as fast:
            (fast / "who").write_text("fast")
    assert (tmp_path / "entry" / "who").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
