"""Which checkpoint is meant: a run folder, its `checkpoints/`, one checkpoint of it, or what DeepSpeed saved by itself or
under `transformers.Trainer` (`checkpoint-500/` with `latest` and `global_step500/`).

`latest` is one name inside its folder, and nothing is followed out of the folder that was given: a checkpoint that came from
somewhere must not choose what else on this machine is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cadtrain.checkpoint.layout import (
    CHECKPOINTS,
    CONFIG,
    ENGINE,
    LATEST,
    MANIFEST,
    checkpoint_name,
    list_steps,
    step_of,
)
from cadtrain.checkpoint.manifest import Manifest
from cadtrain.checkpoint.shard_files import is_shard_folder
from cadtrain.errors import CheckpointError, UsageError

_TRAINER = re.compile(r"checkpoint-(\d+)")
_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """One checkpoint on disk. `config` and `manifest` are None for a folder that DeepSpeed alone wrote."""

    shards: Path
    step: int | None
    config: Path | None
    manifest: Manifest | None


def find_checkpoint(source: Path, *, step: int | None = None) -> CheckpointSource:
    """The checkpoint that `source` names, `step` choosing among several (default: the newest).

    Raises `UsageError` where there is none, with what was looked for, and `CheckpointError` for one that was
    never finished.
    """
    if not source.exists():
        raise UsageError("does not exist.", where=str(source), hint="Give a run folder or a checkpoint of it.")
    if not source.is_dir():
        raise UsageError("is a file.", where=str(source), hint="Give the folder of the checkpoint.")
    if (source / MANIFEST).is_file():
        return _finished(_with_step(source, step))
    if step_of(source.name) is not None and (source / ENGINE).is_dir():
        raise CheckpointError(
            "has no manifest.json, so it was never finished.", where=str(source), hint="Take an earlier one."
        )
    for root in (source / CHECKPOINTS, source):
        if list_steps(root):
            return _finished(_chosen(root, step))
    if trainer := _trainer_steps(source):
        return _plain(source / f"checkpoint-{_chosen_step(source, sorted(trainer), step)}", None)
    if is_shard_folder(source):
        # The `engine` folder of a checkpoint of ours still has its manifest one level up.
        if source.name == ENGINE and (source.parent / MANIFEST).is_file():
            return _finished(_with_step(source.parent, step))
        return CheckpointSource(source, None, None, None)
    return _plain(source, step)


def _with_step(folder: Path, step: int | None) -> Path:
    if step is not None and step_of(folder.name) not in (None, step):
        raise UsageError(f"is not step {step}.", where=str(folder), hint="Leave --step away, or give the run folder.")
    return folder


def _chosen(root: Path, step: int | None) -> Path:
    steps = list_steps(root)
    name = _read_latest(root)
    if step is None and name is not None and step_of(name) in steps:
        return _inside(root, name)
    return _inside(root, checkpoint_name(_chosen_step(root, steps, step)))


def _chosen_step(root: Path, steps: list[int], step: int | None) -> int:
    """`step`, which must be there, or the newest."""
    if step is not None and step not in steps:
        raise UsageError(f"has no checkpoint of step {step}; there are {_listed(steps)}.", where=str(root))
    return steps[-1] if step is None else step


def _trainer_steps(source: Path) -> list[int]:
    """Steps of the checkpoints that `transformers.Trainer` left in its output folder with DeepSpeed's shards in them."""
    found = ((path, _TRAINER.fullmatch(path.name)) for path in source.iterdir() if path.is_dir())
    return [int(match[1]) for path, match in found if match and any(map(is_shard_folder, path.iterdir()))]


def _read_latest(root: Path) -> str | None:
    """What the file `latest` says, None without one."""
    path = root / LATEST
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return file.read(_LONGEST_NAME).decode("utf-8", "replace").strip()


def _inside(root: Path, name: str) -> Path:
    """`root / name`; raises `CheckpointError` where that is a link out of `root`."""
    path = root / name
    if path.resolve().parent != root.resolve():
        raise CheckpointError(
            f"is a link to {path.resolve()}, out of its folder, which is not followed.",
            where=str(path),
            hint="If it is yours, give that folder itself.",
        )
    return path


def _finished(folder: Path) -> CheckpointSource:
    manifest = Manifest.read(folder)
    config = folder / CONFIG
    return CheckpointSource(folder / ENGINE, manifest.step, config if config.is_file() else None, manifest)


def _plain(source: Path, step: int | None) -> CheckpointSource:
    """A folder with `latest` and tag folders beside it, as `save_checkpoint(source)` leaves it."""
    tags = sorted(path.name for path in source.iterdir() if is_shard_folder(path))
    if not tags:
        raise UsageError(
            "holds no checkpoint: neither checkpoints/step-* nor DeepSpeed's files.",
            where=str(source),
            hint="Give a run folder, one of its checkpoints, or a folder that DeepSpeed saved into.",
        )
    latest = _read_latest(source)
    if step is not None:
        name = f"global_step{step}"
    elif latest is not None:
        name = latest
    elif len(tags) == 1:
        name = tags[0]
    else:
        raise UsageError(
            f"holds several checkpoints ({', '.join(tags)}) and no `latest`.", where=str(source), hint="Name one."
        )
    if name not in tags:
        raise UsageError(f"has no checkpoint {name!r}; there are {', '.join(tags)}.", where=str(source))
    digits = name.removeprefix("global_step")
    return CheckpointSource(_inside(source, name), int(digits) if digits.isdecimal() else None, None, None)


def _listed(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[-5:]))
    return f"… {shown}" if len(steps) > 5 else shown
