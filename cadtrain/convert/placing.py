"""Putting what was written in place: whole or not at all, and never at the price of what was there.

A file replaces another in one step of the file system. A folder cannot, so the old one steps aside first: whenever the
process is killed, the old or the new one is there, whole.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cadtrain.errors import EnvironmentFault

_ABANDONED_SECONDS = 600
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def placed_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that becomes `target` when the block ends well, and is removed otherwise.

    Raises `EnvironmentFault` where the disk is full; what `target` was is then untouched.
    """
    temporary = _beside(target, "tmp")
    _remove_leftovers(target)
    try:
        with _room_for(target):
            yield temporary
            _flush(temporary)
            os.replace(temporary, target)
            _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def placed_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well, and is removed otherwise.

    What `target` was stands aside as `.NAME.PID.old` while the new folder is renamed, and is removed last.
    Raises `EnvironmentFault` where the disk is full; what `target` was is then untouched.
    """
    temporary = _beside(target, "tmp")
    _remove_leftovers(target)
    try:
        with _room_for(target):
            temporary.mkdir()
            yield temporary
            for path in temporary.iterdir():
                _flush(path)
            _flush(temporary)
            _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    if not os.path.lexists(target):
        new.rename(target)
        _flush(target.parent)
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    _flush(target.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


def _beside(target: Path, kind: str) -> Path:
    """A hidden name in the same folder, hence on the same file system."""
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left half-written; an old target that stepped aside stays, it may be the only one.

    Process numbers are this machine's; what another one is writing on a shared disk is known by its age.
    """
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        pid = path.name.rsplit(".", 2)[1]
        is_old = time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS
        if is_old and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _room_for(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise EnvironmentFault(
            f"could not be written: {error.strerror}. What was there before is untouched.",
            where=str(target),
            hint="Free space, write elsewhere, or use --dtype bf16.",
        ) from error
