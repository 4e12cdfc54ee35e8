"""Writing a prepared dataset: into a folder beside the target, renamed when everything is there.

    DIR.tmp-<fingerprint>/   plan.json  skipped.jsonl  locks/  chunks/  journal/  train/  validation/  test/

`blocks` says how rows get there. A run that was interrupted goes on with the chunks that are missing. Several processes, on one
machine or many, may each write their share of the blocks (`Shard`); whoever finishes the dataset finds all of them in this folder,
in the same places as one process would have put them. The fingerprint covers the inputs and every setting; a run with other settings
has a folder of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cadtrain import __version__
from cadtrain.cad.codec import Codec, get_codec
from cadtrain.cad.quantize import QUANTIZER_VERSION
from cadtrain.data.manifest import FAILURES_NAME, FORMAT_VERSION, MANIFEST_NAME, SPLITS, Manifest, write_whole
from cadtrain.data.sample import POINT_CHANNELS
from cadtrain.data.writing import blocks
from cadtrain.data.writing.columns import arrow_schema
from cadtrain.data.writing.duplicates import Duplicates
from cadtrain.data.writing.finish import remove_all_but_the_dataset, write_dataset
from cadtrain.data.writing.share import WHOLE, Shard
from cadtrain.data.writing.target import LOCKS, fingerprint_of, refuse_other_writers, refuse_taken, work_folder
from cadtrain.errors import DataError, EnvironmentFault, UsageError
from cadtrain.geometry.part import PART_VERSION

CHUNK_ITEMS = 16
"""Inputs in a chunk, and so about what a killed run has to do again."""
MOST_BLOCKS = 256
"""Files of a split; blocks are as large as that takes."""
_FEWEST_CHUNKS = 4
"""In a block, unless it is the last."""
_LAYOUT = 2
PLAN_NAME = "plan.json"
_SKIPPED_NAME = "skipped.jsonl"
_LOCK = ".lock"
_LOCK_WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One thing that went wrong with one input: `kind` is what it is counted under, `dropped` whether the part was left out."""

    id: str
    file: str
    kind: str
    reason: str
    dropped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is going to be written; two equal plans give the same dataset.

    `settings` holds every option and, for files, a hash of the inputs; it goes into the manifest.
    """

    source: str
    seed: int
    codec: Codec
    num_points: int
    num_views: int
    image_size: int
    settings: dict[str, Any]
    duplicates: Duplicates = Duplicates.KEEP

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that could change the dataset."""
        parts = self.to_json() | {
            "format": FORMAT_VERSION, "version": __version__, "quantizer": QUANTIZER_VERSION, "part": PART_VERSION,
            "layout": [_LAYOUT, CHUNK_ITEMS, MOST_BLOCKS],
        }  # fmt: skip
        return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def bytes_per_part(self) -> int:
        """About what a part takes on disk: its points, its views (a tenth of a byte a pixel as PNG), its texts."""
        return self.num_points * POINT_CHANNELS * 4 + int(self.num_views * self.image_size**2 * 0.1) + 1024

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "source": self.source, "seed": self.seed, "codec": [self.codec.name, self.codec.version],
            "num_points": self.num_points, "num_views": self.num_views, "image_size": self.image_size,
            "settings": self.settings, "duplicates": str(self.duplicates),
        }  # fmt: skip

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Plan:
        """What `to_json` gave, with this cadtrain's codec of that name."""
        own = {name: raw[name] for name in ("source", "seed", "num_points", "num_views", "image_size", "settings")}
        return cls(**own, codec=get_codec(raw["codec"][0]), duplicates=Duplicates(raw["duplicates"]))


def finished_dataset(out: Path, plan: Plan) -> Manifest | None:
    """The manifest in `out` if that is a finished dataset of the very same plan, else None."""
    return Manifest.read(out) if fingerprint_of(out) == plan.fingerprint else None


class DatasetWriter:
    """Writes one dataset, or one shard of it; use as a context manager, `chunk` by `chunk`, and `finish` at the end.

    `num_chunks` is that of the whole dataset, whatever the shard.
    """

    def __init__(
        self, out: Path, plan: Plan, num_chunks: int = 1, *, shard: Shard = WHOLE, overwrite: bool = False
    ) -> None:
        self._out = out
        self._plan = plan
        self._shard = shard
        self._overwrite = overwrite
        self._num_chunks = num_chunks
        self.folder = work_folder(out, plan.fingerprint)
        self._schema = arrow_schema(plan.num_points)
        self._held = ExitStack()
        self._chunks: set[int] = set()
        self._blocks: set[int] = set()
        refuse_taken(out, plan.fingerprint, overwrite=overwrite)

    def __enter__(self) -> DatasetWriter:
        for name in (*SPLITS, "journal", "chunks", LOCKS):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / _LOCK, timeout=_LOCK_WAIT_SECONDS):
                self._take_lock()
            # Held meanwhile: of two that start at once, at least one sees the other.
            refuse_other_writers(self._out, self.folder)
        except UsageError:
            self._held.close()
            raise
        except NotImplementedError as error:
            raise EnvironmentFault(
                f"the disk cannot lock files ({error}).", where=str(self.folder), hint="Write to another disk."
            ) from error
        self._blocks = {int(path.stem) for path in (self.folder / "journal").glob("*.json")}
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def begin(self, num_inputs: int = 0, skipped: Iterable[LedgerEntry] = ()) -> None:
        """Write down what is going to be made, and the inputs that were left out before any work."""
        plan = self._plan.to_json() | {
            "fingerprint": self._plan.fingerprint, "num_chunks": self._num_chunks, "num_inputs": num_inputs,
        }  # fmt: skip
        if not (self.folder / _SKIPPED_NAME).is_file():
            write_whole(self.folder / _SKIPPED_NAME, (json.dumps(asdict(entry)) + "\n" for entry in skipped))
        if not (self.folder / PLAN_NAME).is_file():
            write_whole(self.folder / PLAN_NAME, json.dumps(plan, indent=2) + "\n")

    @property
    def is_finished(self) -> bool:
        """Whether everything is there and only the folder's new name is missing; then `finish` is all that is left to do."""
        return (self.folder / MANIFEST_NAME).is_file()

    @property
    def missing_chunks(self) -> list[int]:
        """The chunks of this shard that are still to be written, in order."""
        own = (number for block in self._own_blocks() if block not in self._blocks for number in self._chunks_of(block))
        return [number for number in own if number not in self._chunks]

    @property
    def missing_blocks(self) -> list[int]:
        """The blocks of the whole dataset that are not finished, by this shard or another; looks at the disk."""
        there = {int(path.stem) for path in (self.folder / "journal").glob("*.json")}
        return [number for number in range(self.num_blocks) if number not in there]

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole dataset."""
        return -(-self._num_chunks // self._chunks_per_block)

    def own_chunks(self) -> list[int]:
        """All chunks of this shard, written or not."""
        return [number for block in self._own_blocks() for number in self._chunks_of(block)]

    def resume(self) -> Counter[str]:
        """Take over what earlier runs of this shard finished: counts of dropped inputs by kind, and of `written` rows."""
        own = set(self._own_blocks())
        counts: Counter[str] = Counter()
        for path in sorted((self.folder / "journal").glob("*.json")):
            if int(path.stem) in own:
                counts += _counts(blocks.Record.read(path))
        for path in sorted((self.folder / "chunks").glob("*.json")):
            number = int(path.stem)
            block = number // self._chunks_per_block
            if block not in own:
                continue
            if block in self._blocks or not blocks.is_chunk_whole(path.parent, number):
                blocks.remove_chunk(path.parent, number)  # its block is there, or its rows never reached the disk
                continue
            counts += _counts(blocks.read_chunk_record(path.parent, number))
            self._chunks.add(number)
        for block in {number // self._chunks_per_block for number in self._chunks}:
            self._assemble_if_whole(block)
        return counts

    @contextmanager
    def chunk(self, number: int) -> Iterator[blocks.ChunkWriter]:
        """Write the rows and ledger entries of chunk `number`; it counts as finished when the `with` ends without an error."""
        chunk = blocks.ChunkWriter()
        yield chunk
        chunk.commit(self.folder / "chunks", number, self._schema)
        self._chunks.add(number)
        self._assemble_if_whole(number // self._chunks_per_block)

    def finish(self) -> Manifest:
        """Make the blocks one dataset and give it its name; raises `DataError` when no part at all was written."""
        if not self.is_finished:
            try:
                write_dataset(self.folder, self._plan, self._schema, self.num_blocks, self._skipped())
            except DataError as error:
                # Going on from here would only come to the same again.
                self._held.close()
                ledger, kept = self.folder / FAILURES_NAME, self._out.with_name(f"{self._out.name}.{FAILURES_NAME}")
                if ledger.is_file() and ledger.stat().st_size:
                    os.replace(ledger, kept)
                    error.hint = f"No dataset was written; {kept} has every file and its reason."
                shutil.rmtree(self.folder)
                raise
        manifest = Manifest.read(self.folder)
        self._publish()
        return manifest

    # -------------------------------------------------------------------------------------------------------- internals

    @property
    def _chunks_per_block(self) -> int:
        return chunks_per_block(self._num_chunks)

    def _own_blocks(self) -> range:
        return range(self._shard.index, self.num_blocks, self._shard.count)

    def _chunks_of(self, block: int) -> range:
        size = self._chunks_per_block
        return range(block * size, min((block + 1) * size, self._num_chunks))

    def _assemble_if_whole(self, block: int) -> None:
        numbers = self._chunks_of(block)
        if self._chunks.issuperset(numbers):
            blocks.assemble(self.folder, block, numbers, self._schema)
            self._blocks.add(block)
            self._chunks.difference_update(numbers)

    def _skipped(self) -> Iterator[dict[str, Any]]:
        path = self.folder / _SKIPPED_NAME
        if path.is_file():
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)

    def _take_lock(self) -> None:
        folder = self.folder / LOCKS
        own = folder / f"{self._shard.index}-of-{self._shard.count}.lock"
        # Shards of one count share the folder; any other two writers would take each other's blocks.
        others = [path for path in folder.glob("*.lock") if not path.stem.endswith(f"-of-{self._shard.count}")]
        for path in [own, *others]:
            lock = FileLock(path, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                self._held.close()
                whole = path.stem == "0-of-1"
                what = "this dataset" if whole else f"shard {path.stem.replace('-of-', '/')} of this dataset"
                raise UsageError(
                    f"another process is writing {what} now", where=str(self.folder), hint="Wait for it, or stop it."
                ) from None
            if path == own:
                self._held.callback(lock.release)
            else:
                lock.release()

    def _publish(self) -> None:
        # Asked again: the work may have taken days.
        refuse_taken(self._out, self._plan.fingerprint, overwrite=self._overwrite)
        # Nothing but the dataset goes under its name: what the work needed is removed first, the locks last.
        remove_all_but_the_dataset(self.folder, but=frozenset({LOCKS, _LOCK}))
        self._held.close()
        shutil.rmtree(self.folder / LOCKS, ignore_errors=True)
        (self.folder / _LOCK).unlink(missing_ok=True)
        old = self._out.with_name(f"{self._out.name}.old-{self._plan.fingerprint}")
        if self._out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self._out, old)
        os.replace(self.folder, self._out)
        shutil.rmtree(old, ignore_errors=True)


def chunks_per_block(num_chunks: int) -> int:
    """Chunks in each block but the last, of a dataset of that many."""
    return max(_FEWEST_CHUNKS, -(-num_chunks // MOST_BLOCKS))


def _counts(record: blocks.Record) -> Counter[str]:
    counts = Counter(entry["kind"] for entry in record.entries if entry["dropped"])
    counts["written"] = len(record.rows)
    return counts
