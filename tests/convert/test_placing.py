"""A target is the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cadtrain.convert.placing import placed_file, placed_folder
from cadtrain.errors import EnvironmentFault


def make_old(tmp_path: Path, kind: str) -> Path:
    target = tmp_path / "model"
    if kind == "folder":
        target.mkdir()
        (target / "config.json").write_text("old")
    else:
        target.write_text("old")
    return target


def place(target: Path, kind: str, write: Callable[[Path], object]) -> None:
    """Write a new target: `write` gets the file's path, or that of a file in the folder."""
    with (placed_file if kind == "file" else placed_folder)(target) as new:
        write(new if kind == "file" else new / "config.json")


def content(target: Path) -> str:
    return (target / "config.json" if target.is_dir() else target).read_text()


@pytest.mark.parametrize("old", ["file", "folder"])
def test_a_new_folder_replaces_what_was_there(tmp_path: Path, old: str) -> None:
    target = make_old(tmp_path, old)
    with placed_folder(target) as new:
        (new / "config.json").write_text("new")
        assert content(target) == "old"
    assert content(target) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_folder_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (tmp_path / "model").symlink_to(elsewhere)
    with placed_folder(tmp_path / "model") as new:
        (new / "config.json").write_text("new")
    assert content(tmp_path / "model") == "new"
    assert (elsewhere / "mine").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_leaves_the_old_one_and_nothing_else(tmp_path: Path, kind: str) -> None:
    target = make_old(tmp_path, kind)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        place(target, kind, fail)
    assert content(target) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_is_said_and_leaves_the_old_one(tmp_path: Path, kind: str) -> None:
    """The kernel's own ENOSPC, from the device that is always full."""
    target = make_old(tmp_path, kind)

    def fill(path: Path) -> None:
        path.symlink_to("/dev/full")
        path.write_bytes(b"new" * 100_000)

    with pytest.raises(EnvironmentFault, match=r"No space left on device.*untouched") as caught:
        place(target, kind, fill)
    assert caught.value.exit_code == 3
    assert content(target) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_old_folder_comes_back_where_the_new_one_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = make_old(tmp_path, "folder"), Path.rename

    def refuse(self: Path, other: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError(13, "no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        place(target, "folder", lambda path: path.write_text("new"))
    assert content(target) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from cadtrain.convert import placing
at, target = sys.argv[1], Path(sys.argv[2])
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if at == "between":
    rename = Path.rename
    Path.rename = lambda self, other: die() if self.name.endswith(".tmp") else rename(self, other)
with placing.placed_folder(target) as new:
    (new / "config.json").write_text("new")
    if at == "writing":
        die()
"""


@pytest.mark.parametrize("at", ["writing", "between"])
def test_a_kill_at_the_worst_moment_loses_neither(tmp_path: Path, at: str) -> None:
    target = make_old(tmp_path, "folder")
    done = subprocess.run([sys.executable, "-c", _KILLED, at, str(target)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    whole = [path for path in tmp_path.iterdir() if (path / "config.json").is_file() and content(path) == "old"]
    assert [path.name.split(".")[-1] for path in whole] == (["model"] if at == "writing" else ["old"])


def test_what_killed_conversions_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = make_old(tmp_path, "folder")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f".model.{ended.pid}.tmp", f".model.{os.getppid()}.tmp", f".other.{ended.pid}.tmp"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
    with placed_folder(target) as new:
        (new / "config.json").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".model.{os.getppid()}.tmp", f".other.{ended.pid}.tmp", "model"]
