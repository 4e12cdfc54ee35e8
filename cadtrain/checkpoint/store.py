"""Checkpoints of one run: a save is a transaction, a load verifies first.

All ranks write into `step-N.tmp`. Each hashes its files as it writes them, flushes them and reads them back; rank 0 collects
the records, writes the manifest last and renames the folder once; only then does `latest` name it and may older ones go.
Whatever happens before the rename leaves a `.tmp` folder and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from cadtrain.checkpoint.frozen import digest_of, split_frozen, without_repeats
from cadtrain.checkpoint.layout import (
    CHECKPOINTS,
    CONFIG,
    ENGINE,
    LATEST,
    STATE,
    UNFINISHED,
    checkpoint_name,
    frozen_name,
    is_frozen_name,
    list_steps,
    sync_folder,
    write_atomically,
)
from cadtrain.checkpoint.manifest import (
    FileRecord,
    FrozenRecord,
    Manifest,
    record_files,
    records_from_json,
    records_to_json,
)
from cadtrain.checkpoint.retention import Retention, steps_to_remove
from cadtrain.checkpoint.scores import Scores
from cadtrain.checkpoint.shard_writer import WRITE_FAULTS, HostPool, ShardSink, ShardWriter, write_shard
from cadtrain.distributed import Place, all_agree, first_verdict
from cadtrain.errors import CheckpointError
from cadtrain.host_memory import available_memory
from cadtrain.units import format_bytes

log = logging.getLogger(__name__)

HOST_RESERVE_BYTES = 2 << 30
"""Host memory that a copy of the state leaves for everything else."""
_RANK_FILES = "files-{rank:05d}.json"
_DISK_FAULTS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENODEV,
        errno.ENOTCONN, errno.ETIMEDOUT,
    }
)  # fmt: skip
"""What a disk, or a network disk, answers when it cannot take a file."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A save that is whole."""

    path: Path
    step: int
    seconds: float
    """From its begin to its renaming."""
    stall_seconds: float
    """How long training waited for it."""


@dataclass(slots=True)
class _Save:
    """A save under way."""

    step: int
    temporary: Path
    final: Path
    state: Mapping[str, Any]
    config_text: str
    writer: ShardWriter
    started: float
    stalled: float = 0.0
    frozen: dict[str, Any] = field(default_factory=dict)
    """This rank's frozen weights by file name."""


class CheckpointStore:
    """The `checkpoints/` folder of one run. Methods are collective where they say so."""

    def __init__(
        self,
        run_dir: Path,
        *,
        place: Place,
        retention: Retention,
        facts: Mapping[str, Any],
        frozen_names: Collection[str] = frozenset(),
    ) -> None:
        """`facts` are the manifest's `zero_stage`, `precision`, `versions`, … The weights in `frozen_names` are written once a run."""
        self.root = run_dir / CHECKPOINTS
        self.scores = Scores(self.root)
        self._place = place
        self._retention = retention
        self._facts = dict(facts)
        self._frozen_names = frozenset(frozen_names)
        self._frozen: FrozenRecord | None = None
        self._pool = HostPool()
        self._pending: _Save | None = None
        self._has_host_room: bool | None = None

    @property
    def has_pending(self) -> bool:
        """Whether a save behind the training waits for `complete`; alike on all ranks."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes its part of it."""
        return self._pending is not None and self._pending.writer.is_writing

    @property
    def has_frozen(self) -> bool:
        """Whether the frozen weights lie on the disk already, so that a save need not write them."""
        return self._frozen is not None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        config_text: str,
        write_engine: Callable[[Path, ShardSink], None],
        expected_bytes: int = 0,
    ) -> SaveReport:
        """Save all ranks' state as checkpoint `step` and return when it is whole. Collective.

        `write_engine(folder, sink)` gives this rank's shards to the sink, with paths below the folder; nothing is begun where the disk has no
        room for `expected_bytes`. Raises `CheckpointError` on every rank if any rank failed; what was there before is then untouched.
        """
        save = self._begun(step, state, config_text, write_engine, expected_bytes, pool=None)
        self._agree(save, save.writer.read_back, "reading its shards back")
        return self._commit(save)

    def has_host_room(self, expected_bytes: int) -> bool:
        """Whether every host has memory for a copy of its ranks' parts of `expected_bytes`; asked once. Collective."""
        if self._has_host_room is None:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", self._place.world_size))
            needed = expected_bytes * ranks_here // self._place.world_size + HOST_RESERVE_BYTES
            free = available_memory()
            lacks = f"{format_bytes(needed)} needed, {format_bytes(free)} free" if free < needed else None
            fault = first_verdict(all_agree(lacks, device=_device()))
            self._has_host_room = fault is None
            if fault is not None:
                log.warning("checkpoints are written at once: host memory has no room for a copy of the state, %s", fault)
        return self._has_host_room

    def save_behind(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        config_text: str,
        write_engine: Callable[[Path, ShardSink], None],
        expected_bytes: int = 0,
    ) -> None:
        """Copy all ranks' state to host memory and write it while training goes on; `complete` ends it. Collective.

        One save at a time: call `complete` before the next one. Raises as `save` does for what goes wrong before the writing.
        """
        assert self._pending is None, "the last save behind was not completed"
        save = self._begun(step, state, config_text, write_engine, expected_bytes, pool=self._pool)
        save.writer.start()
        save.stalled = time.perf_counter() - save.started
        self._pending = save

    def complete(self) -> SaveReport:
        """Wait for the save behind the training and make it a checkpoint. Collective; raises `CheckpointError` as `save` does."""
        save, self._pending = self._pending, None
        assert save is not None, "there is no save to complete"
        started = time.perf_counter()
        self._agree(save, save.writer.join, "writing its shards behind the training")
        report = self._commit(save)
        return SaveReport(
            report.path, report.step, report.seconds, save.stalled + time.perf_counter() - started
        )

    def abandon(self) -> None:
        """Wait until this rank's part of a save behind is on the disk, and leave it unfinished. For a rank that fails; not collective."""
        if self._pending is not None:
            with contextlib.suppress(CheckpointError):
                self._pending.writer.join()
            self._pending = None

    def newest(self, *, before: int | None = None) -> Path | None:
        """The newest checkpoint that verifies, of a step below `before`, or None if there is none; damaged ones are named in the log.

        Collective. Raises `CheckpointError` if there are checkpoints and none verifies.
        """
        found: list[str] = []
        # Rank 0's list counts: on a network disk another rank may see a folder later. Each rank hashes its share of the files.
        steps = list_steps(self.root) if self._place.is_main else []
        steps = [step for step in steps if before is None or step < before]
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

    def _begun(
        self,
        step: int,
        state: Mapping[str, Any],
        config_text: str,
        write_engine: Callable[[Path, ShardSink], None],
        expected_bytes: int,
        pool: HostPool | None,
    ) -> _Save:
        """A save whose shards are written, or copied to be written; frozen weights are on the disk. Collective."""
        final = self.root / checkpoint_name(step)
        temporary = final.with_name(final.name + UNFINISHED)
        save = _Save(
            step, temporary, final, dict(state), config_text, ShardWriter(temporary, pool), time.perf_counter()
        )

        def sink(path: Path, content: Any) -> None:
            kept, frozen = split_frozen(without_repeats(content), self._frozen_names)
            if frozen:
                save.frozen[path.name] = frozen
            save.writer.take(path, kept)

        self._agree(save, lambda: self._make_folder(temporary, expected_bytes), "making its folder")
        self._agree(save, lambda: write_engine(temporary / ENGINE, sink), "writing its shards")
        self._save_frozen(save)
        return save

    def _save_frozen(self, save: _Save) -> None:
        """Write the frozen weights if no save of this run has yet. They never change, so what is there is compared by its hash. Collective."""
        if self._frozen is not None or not self._frozen_names:
            return
        records: dict[str, FileRecord] = {}
        self._agree(save, lambda: records.update(_hashed(save.frozen)), "hashing its frozen weights")
        told = all_agree(records_to_json(records), device=_device())
        everywhere: dict[str, FileRecord] = {}
        for text in told:
            everywhere |= records_from_json(text or "{}")
        if not everywhere:
            return
        folder = self.root / frozen_name(digest_of(everywhere))
        temporary = folder.with_name(folder.name + UNFINISHED)
        is_there = all_agree("yes" if folder.is_dir() else None, device=_device())[0] is not None
        if not is_there:
            self._agree(save, lambda: self._make_frozen_folder(temporary), "making the folder of its frozen weights")
            self._agree(save, lambda: _write_frozen(temporary, save.frozen, records), "writing its frozen weights")
            self._agree(save, lambda: self._place_frozen(temporary, folder), "placing its frozen weights")
        self._frozen = FrozenRecord(folder.name, everywhere)

    def _make_frozen_folder(self, temporary: Path) -> None:
        if self._place.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def _place_frozen(self, temporary: Path, folder: Path) -> None:
        if self._place.is_main:
            sync_folder(temporary)
            os.replace(temporary, folder)
            sync_folder(self.root)

    def _commit(self, save: _Save) -> SaveReport:
        """Make a checkpoint of what all ranks have written. Collective."""
        own = save.temporary / _RANK_FILES.format(rank=self._place.rank)
        self._agree(save, lambda: write_atomically(own, records_to_json(save.writer.records)), "listing its shards")
        self._agree(save, lambda: self._finish(save), "finishing the checkpoint")
        seconds = time.perf_counter() - save.started
        return SaveReport(save.final, save.step, seconds, seconds)

    def _agree(self, save: _Save, work: Callable[[], None], doing: str) -> None:
        """Do this rank's part and learn whether all ranks did theirs; if not, what was begun is removed. Collective."""
        verdict = None
        try:
            work()
        except WRITE_FAULTS as error:
            # Whoever hears the verdict says it in a line. Where that explains the fault, the traceback is for the rank's file alone.
            level = logging.INFO if _explains_itself(error) else logging.ERROR
            log.log(level, "checkpoint failed while %s", doing, exc_info=error)
            verdict = f"{type(error).__name__}: {error}"
        fault = first_verdict(all_agree(verdict, device=_device()))
        if fault is not None:
            if self._place.is_main:
                # All ranks are through with it, and a full disk needs the room.
                shutil.rmtree(save.temporary, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint was not saved, {fault} (while {doing})",
                where=str(self.root),
                hint="Earlier checkpoints are untouched. Free space or mend the disk, then resume.",
            )

    def _make_folder(self, temporary: Path, expected_bytes: int) -> None:
        if not self._place.is_main:
            return
        shutil.rmtree(temporary, ignore_errors=True)
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if expected_bytes > free:
            raise CheckpointError(f"it needs about {format_bytes(expected_bytes)}, {format_bytes(free)} are free")
        (temporary / ENGINE).mkdir(parents=True)

    def _finish(self, save: _Save) -> None:
        if not self._place.is_main:
            return
        temporary = save.temporary
        # DeepSpeed leaves converter scripts beside its shards; `cadtrain convert` takes their place, and a checkpoint holds no code.
        for script in temporary.glob("*.py"):
            script.unlink()
        write_atomically(temporary / STATE, json.dumps(dict(save.state), indent=1) + "\n")
        write_atomically(temporary / CONFIG, save.config_text)
        files: dict[str, FileRecord] = record_files(temporary, [STATE, CONFIG])
        for rank in range(self._place.world_size):
            path = temporary / _RANK_FILES.format(rank=rank)
            files |= records_from_json(path.read_text())
            path.unlink()
        digest = xxhash.xxh3_128(save.config_text.encode()).hexdigest()
        Manifest(
            step=save.step, world_size=self._place.world_size, files=files, frozen=self._frozen, config_digest=digest,
            **self._facts,
        ).write(temporary)  # fmt: skip
        sync_folder(temporary / ENGINE)
        sync_folder(temporary)
        if save.final.exists():  # a damaged one: the run went on from an earlier step
            _remove(save.final)
        os.replace(temporary, save.final)
        sync_folder(self.root)
        write_atomically(self.root / LATEST, save.final.name + "\n")
        sync_folder(self.root)
        self._retire(save.step)

    def _retire(self, step: int) -> None:
        """Remove what the rules for `retention` give up, now that checkpoint `step` is whole."""
        # Newer ones are damaged, else the run would have gone on from them; they must not push out what was saved now.
        steps = [other for other in list_steps(self.root) if other <= step]
        for old in steps_to_remove(steps, self._retention, self.scores.read()):
            _remove(self.root / checkpoint_name(old))
        try:
            manifests = [Manifest.read(self.root / checkpoint_name(kept)) for kept in list_steps(self.root)]
        except CheckpointError:
            return  # a damaged checkpoint may still need its frozen weights
        needed = {manifest.frozen.folder for manifest in manifests if manifest.frozen is not None}
        for entry in self.root.iterdir():
            if is_frozen_name(entry.name) and entry.name not in needed:
                _remove(entry)


def verify(folder: Path, *, place: Place = Place()) -> list[str]:
    """Faults of the checkpoint in `folder`, a disk that cannot read it included; empty if every file is what was saved.

    With `place` of several ranks: those of this rank's share of the files.
    """
    try:
        return Manifest.read(folder).faults(folder, share=(place.rank, place.world_size))
    except (CheckpointError, OSError) as error:
        return [str(error)]


def _explains_itself(error: BaseException) -> bool:
    """Whether the message says all: a refusal of ours, or a disk that is full, gone, broken or not ours to write."""
    return isinstance(error, CheckpointError) or (isinstance(error, OSError) and error.errno in _DISK_FAULTS)


def _hashed(frozen: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {name: write_shard(None, content) for name, content in frozen.items()}


def _write_frozen(folder: Path, frozen: Mapping[str, Any], records: Mapping[str, FileRecord]) -> None:
    writer = ShardWriter(folder, None)
    for name, content in frozen.items():
        writer.take(folder / name, content)
    if writer.records != dict(records):
        raise CheckpointError("the frozen weights changed while they were written")
    writer.read_back()


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in the middle leaves no checkpoint with parts missing."""
    doomed = folder.with_name(f"{folder.name}.old{UNFINISHED}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
