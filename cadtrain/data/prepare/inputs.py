"""What a preparation of an Omni-CAD folder works through: options, the task of one design, and the list of all tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import overload

from cadtrain.cad.codec import get_codec
from cadtrain.data.prepare.sources.omnicad import OmniCadFolder
from cadtrain.data.prepare.sources.pictures import MOST_VIEWS
from cadtrain.data.splits import SplitFile, document_of, split_function
from cadtrain.data.writing.duplicates import OFFERED, Duplicates
from cadtrain.data.writing.writer import LedgerEntry
from cadtrain.errors import DataError, UsageError
from cadtrain.geometry.sample import SAMPLINGS, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What is stored of each part. `num_points` and `num_views` 0 store no points and no views."""

    num_points: int = 4096
    num_views: int = 8
    image_size: int = 224
    sampling: Sampling = "area"
    codec: str = "compact"
    seed: int = 0
    limit: int | None = None
    split_file: Path | None = None
    prefixes: bool = False
    """Whether the states on the way to a design (`states.states_before`) are parts of their own."""
    duplicates: str = Duplicates.OUT_OF_TEST
    """What becomes of parts with equal sequences: one of `OFFERED`."""

    def __post_init__(self) -> None:
        for name, low, high in (("num_points", 0, 1 << 20), ("num_views", 0, MOST_VIEWS), ("image_size", 14, 4096)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} {getattr(self, name)} is out of range.", hint=f"Use {low} to {high}.")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"a limit of {self.limit} parts.", where="--limit", hint="Use 1 or more.")
        if self.sampling not in SAMPLINGS:
            raise UsageError(f"there is no sampling {self.sampling!r}.", hint=f"Use {' or '.join(SAMPLINGS)}.")
        if self.duplicates not in OFFERED:
            raise UsageError(
                f"{self.duplicates!r} says nothing about duplicates.",
                where="--duplicates",
                hint=f"Use {', '.join(OFFERED)}.",
            )
        get_codec(self.codec)


@dataclass(frozen=True, slots=True)
class PartTask:
    """One design of the folder."""

    id: str
    document: str
    file: str
    """The design's path below the folder that is prepared."""
    design: Path
    caption: str | None
    clouds: Path | None
    pictures: Path | None
    options: PrepareOptions
    states_seconds: float = math.inf
    """No further state on the way is begun after that long."""

    @property
    def root(self) -> Path:
        """The folder that is prepared."""
        return self.design.parents[self.file.count("/")]


def split_function_of(ids: Sequence[str], split_file: Path | None) -> Callable[[str], str | None]:
    """Document -> split, None for one that the split file does not list; without a file, by hash."""
    if split_file is not None:
        return SplitFile.read(split_file).split_of
    return split_function(map(document_of, ids))


def no_document_listed(folder: OmniCadFolder, ids: Sequence[str], split_file: Path) -> DataError:
    """The error for a split file of another folder."""
    return DataError(
        f"lists none of the {len(ids)} parts of {folder.root}, the first being {ids[0]} of document {document_of(ids[0])}",
        where=str(split_file),
        hint="Check that it is the split file of this folder.",
    )


def skipped_inputs(
    folder: OmniCadFolder, ids: Sequence[str], split_of: Callable[[str], str | None]
) -> Iterator[LedgerEntry]:
    """What is wrong with the captions of these parts, designs that cannot be named, parts that the split file does not list."""
    faulty = {entry.id for entry in folder.faults if entry.id}
    chosen = faulty.intersection(ids)
    yield from (entry for entry in folder.faults if not entry.id or entry.dropped or entry.id in chosen)
    for part_id in ids:
        if split_of(document_of(part_id)) is None:
            yield LedgerEntry(
                part_id, _name(folder, part_id), "not_in_split_file", "its document is in no list", dropped=True
            )


def spread(ids: Sequence[str], limit: int | None) -> list[str]:
    """All ids, or `limit` of them spread evenly over the list, so that a trial sees every shard."""
    if limit is None or limit >= len(ids):
        return list(ids)
    return [ids[position * len(ids) // limit] for position in range(limit)]


class PartTasks(Sequence[PartTask]):
    """The tasks of these parts, each made when it is asked for: half a million of them would take half a gigabyte."""

    def __init__(self, folder: OmniCadFolder, ids: Sequence[str], options: PrepareOptions, time_limit: float) -> None:
        self._folder, self._ids, self._options = folder, ids, options
        # The whole design comes first; with half of the time left for the states, it is never lost for their sake.
        self._states_seconds = time_limit / 2

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> PartTask: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[PartTask]: ...

    def __getitem__(self, index: int | slice) -> PartTask | Sequence[PartTask]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        folder, part_id = self._folder, self._ids[index]
        return PartTask(
            id=part_id,
            document=document_of(part_id),
            file=_name(folder, part_id),
            design=folder.design_path(part_id),
            caption=folder.captions.get(part_id),
            clouds=folder.clouds,
            pictures=folder.pictures,
            options=self._options,
            states_seconds=self._states_seconds,
        )


def _name(folder: OmniCadFolder, part_id: str) -> str:
    return folder.design_path(part_id).relative_to(folder.root).as_posix()


def file_digest(path: Path | None) -> str | None:
    """A hash of a file's bytes; None for no file."""
    return blake2b(path.read_bytes(), digest_size=16).hexdigest() if path else None
