"""The folder that a dataset is to become: which one that is, and whether anything in its place may go.

Nothing is ever removed but what is certainly a prepared dataset and nothing more.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cadtrain.data.manifest import COSTS_NAME, FAILURES_NAME, MANIFEST_NAME, SPLITS
from cadtrain.errors import CadtrainError, UsageError

LOCKS = "locks"
"""In a work folder: a lock for each process that writes there."""
_FILES = frozenset({MANIFEST_NAME, FAILURES_NAME, COSTS_NAME})
_SPLIT_FILES = frozenset({"state.json", "dataset_info.json"})


def resolve_target(out: Path) -> Path:
    """`out` as an absolute path without links, so that the work is done on the disk where the dataset is going to lie.

    A link to a folder that is not there stands for that folder. Raises `UsageError` where no folder can be given that name.
    """
    try:
        real = out.resolve()
    except RuntimeError:  # links in a circle, up to Python 3.12
        real = out
    if real.is_symlink():
        raise UsageError("a link that leads to itself", where=str(out), hint="Choose another folder.")
    if not real.name or real.is_mount():
        what = "the root of a disk" if real.exists() else "no name of a folder"
        raise UsageError(
            f"{what}: a dataset is made beside its place and then renamed",
            where=str(real),
            hint="Choose a folder inside of it.",
        )
    return real


def refuse_taken(out: Path, fingerprint: str, *, overwrite: bool) -> None:
    """Raise `UsageError` unless the dataset of that fingerprint may be put at `out`.

    Free are a name that nothing has, an empty folder, and with `overwrite` a folder that holds a prepared dataset and nothing else.
    Where the new dataset is finished and lacks only its name, the error is a plain `CadtrainError` that says so.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    found = foreign_entry(out)
    if found is None and overwrite:
        return
    made = work_folder(out, fingerprint)
    if (made / MANIFEST_NAME).is_file():
        ways = (
            "The same command with `--overwrite` only puts it in place."
            if found is None
            else "Move that away, and the same command only puts it in place."
        )
        raise CadtrainError(
            f"the new dataset is finished, in {made}, but something else is in its place, which {found or 'is another dataset'}",
            where=str(out),
            hint=f"Nothing is lost. {ways}",
        )
    if found is not None:
        message = "is a file, not a folder" if out.is_file() else f"the output folder exists and {found}"
        hint = "Choose another folder: only a prepared dataset, and nothing beside it, is ever replaced."
    elif fingerprint_of(out) == fingerprint:
        message = "the dataset is already there, made with the same options from the same inputs"
        hint = "Use it as it is, or give `--overwrite` to make it again."
    else:
        message = "the output folder exists and is a dataset made with other options or inputs"
        hint = "Choose another folder, or give `--overwrite`."
    raise UsageError(message, where=str(out), hint=hint)


def work_folder(out: Path, fingerprint: str) -> Path:
    """The folder in which the dataset of that fingerprint is made on its way to `out`."""
    return out.with_name(f"{out.name}.tmp-{fingerprint}")


def work_folders(out: Path) -> list[Path]:
    """The folders beside `out` in which it is, or was, being made; one for each choice of options and inputs."""
    beside = out.parent.iterdir() if out.parent.is_dir() else ()
    return sorted(path for path in beside if path.name.startswith(f"{out.name}.tmp-") and path.is_dir())


@dataclass(frozen=True, slots=True)
class Leftover:
    """The work of a run with other options or inputs, beside a dataset; nothing else will ever go on with it."""

    folder: Path
    num_bytes: int


def leftovers(out: Path) -> tuple[Leftover, ...]:
    """What lies beside the finished `out` of runs that did not come to it."""
    return tuple(Leftover(folder, _size(folder)) for folder in work_folders(out))


def refuse_other_writers(out: Path, own: Path) -> None:
    """Raise `UsageError` where a process with other options or inputs is on its way to the same `out`; `own` is this one's folder."""
    for folder in work_folders(out):
        if folder != own and any(_is_held(path) for path in sorted((folder / LOCKS).glob("*.lock"))):
            raise UsageError(
                f"another process is writing a dataset of other options or inputs to the same place now, in {folder}",
                where=str(out),
                hint="Wait for it, stop it, or choose another folder.",
            )


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # someone else's, who lets nobody write there
        return False


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # its run may be at work on another machine
            total += path.lstat().st_size
    return total


def foreign_entry(out: Path) -> str | None:
    """What is at `out` besides a prepared dataset, in words that go on from "the folder"; None for a dataset and nothing else."""
    if not out.is_dir():
        return "is no folder"
    names = sorted(entry.name for entry in out.iterdir())
    for name in names:
        path = out / name
        if name in SPLITS and path.is_dir():
            inner = sorted(entry.name for entry in path.iterdir())
            odd = [f"{name}/{file}" for file in inner if file not in _SPLIT_FILES and not file.endswith(".arrow")]
            if odd:
                return f"holds {odd[0]}, which is no part of a dataset"
        elif name not in _FILES or path.is_dir():
            return f"holds {name}, which is no part of a dataset"
    if MANIFEST_NAME not in names:
        return f"is no prepared dataset: it has no {MANIFEST_NAME}"
    return None if _manifest(out) else f"is no prepared dataset: its {MANIFEST_NAME} is not that of one"


def fingerprint_of(out: Path) -> str | None:
    """The fingerprint of the plan that the prepared dataset in `out` was made with; None where there is no such dataset."""
    found = _manifest(out).get("settings")
    fingerprint = found.get("fingerprint") if isinstance(found, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None


def refuse_inputs(root: Path, out: Path) -> None:
    """Raise `UsageError` where writing `out` would replace the raw folder `root`, hold it, or mix with its files."""
    real, folder = resolve_target(out), root.resolve()
    inputs = {name: (folder / name).resolve() for name in ("json", "cad_json", "txt", "pcd", "img")}
    if real == folder:
        what = "the output folder is the raw folder itself"
    elif folder.is_relative_to(real):
        what = f"the output folder holds the raw folder {folder}"
    else:
        near = [name for name, path in inputs.items() if path.exists() and _overlap(real, path)]
        if not near:
            return
        what = f"the output folder overlaps with the raw folder's {near[0]}/"
    raise UsageError(what, where=str(out), hint="Choose a folder outside of the inputs.")


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _manifest(out: Path) -> dict[str, object]:
    """The manifest as JSON values, of whatever version; empty where there is none that a dataset could have."""
    try:
        raw = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) and {"format_version", "codec", "counts"} <= raw.keys() else {}
