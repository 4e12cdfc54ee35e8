"""Checkpoints of one run: a save is a transaction, a load verifies first.

All ranks write into `step-N.tmp`. Each flushes and hashes its own files; rank 0 collects the records, writes the
manifest last and renames the folder once; only then does `latest` name it and may older ones go.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cadtrain.checkpoint.layout import (
    CHECKPOINTS,
    CONFIG,
    ENGINE,
    LATEST,
    STATE,
    UNFINISHED,
    checkpoint_name,
    list_steps,
    write_atomically,
)
from cadtrain.checkpoint.manifest import FileRecord, Manifest, record_files, records_to_json
from cadtrain.checkpoint.retention import steps_to_remove
from cadtrain.distributed import Place, all_agree, first_verdict
from cadtrain.errors import CheckpointError
from cadtrain.units import format_bytes

log = logging.getLogger(__name__)

_RANK_FILES = "files-{rank:05d}.json"


class CheckpointStore:
    """The `checkpoints/` folder of one run. Methods are collective where they say so."""

    def __init__(self, run_dir: Path, *, place: Place, keep_last: int, facts: Mapping[str, Any]) -> None:
        """`facts` are the manifest's `zero_stage`, `precision` and `versions`."""
        self.root = run_dir / CHECKPOINTS
        self._place = place
        self._keep_last = keep_last
        self._facts = dict(facts)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        config_text: str,
        write_engine: Callable[[Path], None],
        expected_bytes: int = 0,
    ) -> Path:
        """Save all ranks' state as checkpoint `step`. Collective.

        `write_engine(folder)` writes this rank's shards; nothing is begun where the disk has no room for `expected_bytes`. Raises `CheckpointError` on every rank if any rank failed;
        what was there before is then untouched.
        """
        final = self.root / checkpoint_name(step)
        temporary = final.with_name(final.name + UNFINISHED)
        self._agree(lambda: self._begin(temporary, expected_bytes), "making its folder")
        self._agree(lambda: write_engine(temporary / ENGINE), "writing its shards")
        self._agree(lambda: self._record_own_files(temporary), "flushing its shards")
        self._agree(lambda: self._finish(step, temporary, final, state, config_text), "finishing the checkpoint")
        return final

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies, or None if there is none; damaged ones are named in the log. Collective.

        Raises `CheckpointError` if there are checkpoints and none verifies.
        """
        found: list[str] = []
        # Rank 0's list counts: on a network disk another rank may see a folder later. Each rank hashes its share of the files.
        steps = list_steps(self.root) if self._place.is_main else []
        while name := all_agree(checkpoint_name(steps.pop()) if steps else None, device=_device())[0]:
            folder = self.root / name
            faults = all_agree("; ".join(verify(folder, place=self._place)[:3]) or None, device=_device())
            fault = next((fault for fault in faults if fault is not None), None)
            if fault is None:
                return folder
            found.append(f"{name}: {fault}")
            if self._place.is_main:
                log.warning("checkpoint passed over: %s", found[-1])
        if found:
            raise CheckpointError(
                f"none of the checkpoints in {self.root} verifies: {' | '.join(found)}",
                hint="Start a new run, or restore a checkpoint from a copy.",
            )
        return None

    def clean_unfinished(self) -> None:
        """Remove what an interrupted save left. Rank 0's work; call before training starts."""
        if self._place.is_main and self.root.is_dir():
            for entry in self.root.iterdir():
                if entry.name.endswith(UNFINISHED):
                    log.warning("removing an unfinished checkpoint: %s", entry)
                    if entry.is_dir():
                        shutil.rmtree(entry, ignore_errors=True)
                    else:
                        entry.unlink(missing_ok=True)

    def _agree(self, work: Callable[[], None], doing: str) -> None:
        """Do this rank's part and learn whether all ranks did theirs. Collective."""
        verdict = None
        try:
            work()
        except (OSError, RuntimeError, ValueError, TypeError, AssertionError, MemoryError, CheckpointError) as error:
            log.exception("checkpoint failed while %s", doing)
            verdict = f"{type(error).__name__}: {error}"
        fault = first_verdict(all_agree(verdict, device=_device()))
        if fault is not None:
            raise CheckpointError(
                f"the checkpoint was not saved, {fault} (while {doing})",
                where=str(self.root),
                hint="Earlier checkpoints are untouched. Free space or mend the disk, then resume.",
            )

    def _begin(self, temporary: Path, expected_bytes: int) -> None:
        if not self._place.is_main:
            return
        shutil.rmtree(temporary, ignore_errors=True)
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if expected_bytes > free:
            raise CheckpointError(f"it needs about {format_bytes(expected_bytes)}, {format_bytes(free)} are free")
        (temporary / ENGINE).mkdir(parents=True)

    def _record_own_files(self, folder: Path) -> None:
        # Every rank hashes what it wrote itself: names carry the rank that wrote them.
        names = [str(path.relative_to(folder)) for path in (folder / ENGINE).iterdir() if self._is_mine(path.name)]
        (folder / _RANK_FILES.format(rank=self._place.rank)).write_text(records_to_json(record_files(folder, names)))

    def _is_mine(self, name: str) -> bool:
        owner = _writer_of(name)
        return owner == self._place.rank if owner is not None else self._place.is_main

    def _finish(self, step: int, temporary: Path, final: Path, state: Mapping[str, Any], config_text: str) -> None:
        if not self._place.is_main:
            return
        # DeepSpeed leaves converter scripts beside its shards; `cadtrain convert` takes their place, and a checkpoint holds no code.
        for script in temporary.glob("*.py"):
            script.unlink()
        write_atomically(temporary / STATE, json.dumps(dict(state), indent=1) + "\n")
        write_atomically(temporary / CONFIG, config_text)
        files: dict[str, FileRecord] = record_files(temporary, [STATE, CONFIG])
        for rank in range(self._place.world_size):
            path = temporary / _RANK_FILES.format(rank=rank)
            files |= {name: FileRecord(**row) for name, row in json.loads(path.read_text()).items()}
            path.unlink()
        Manifest(step=step, world_size=self._place.world_size, files=files, **self._facts).write(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync_folder(self.root)
        write_atomically(self.root / LATEST, final.name + "\n")
        # Newer ones are damaged, else the run would have gone on from them; they must not push out what was saved now.
        steps = [other for other in list_steps(self.root) if other <= step]
        for old in steps_to_remove(steps, keep_last=self._keep_last):
            shutil.rmtree(self.root / checkpoint_name(old), ignore_errors=True)


def verify(folder: Path, *, place: Place = Place()) -> list[str]:
    """Faults of the checkpoint in `folder`, a disk that cannot read it included; empty if every file is what was saved.

    With `place` of several ranks: those of this rank's share of the files.
    """
    try:
        return Manifest.read(folder).faults(folder, share=(place.rank, place.world_size))
    except (CheckpointError, OSError) as error:
        return [str(error)]


def _writer_of(name: str) -> int | None:
    """The rank in a DeepSpeed shard's name (`…zero_pp_rank_3_mp_rank_00_…`), None where only rank 0 writes it."""
    _, mark, tail = name.partition("zero_pp_rank_")
    digits = tail.partition("_")[0]
    return int(digits) if mark and digits.isdigit() else None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
