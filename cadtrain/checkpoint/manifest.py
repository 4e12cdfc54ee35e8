"""What a finished checkpoint consists of: every file with its size and hash, written last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from cadtrain.checkpoint.layout import MANIFEST, is_frozen_name, write_atomically
from cadtrain.errors import CheckpointError

FORMAT = 1
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and XXH3-128 hash of one file: it finds damage, at the speed of memory; it is no signature."""

    size: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class FrozenRecord:
    """Where the weights that do not learn lie: a folder beside the checkpoint, which it shares with others."""

    folder: str
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of one checkpoint."""

    step: int
    world_size: int
    zero_stage: int
    precision: str
    versions: dict[str, str]
    files: dict[str, FileRecord] = field(default_factory=dict)
    format: int = FORMAT
    offload: bool = False
    """Whether optimizer states lived in host memory."""
    census: dict[str, dict[str, int]] = field(default_factory=dict)
    """Weights of each component: how many learn and how many are frozen."""
    config_digest: str = ""
    """XXH3-128 of the run's `config.yaml` as it stands in the checkpoint."""
    frozen: FrozenRecord | None = None
    """None where every weight lies in the checkpoint itself."""

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `folder/manifest.json`; raises `CheckpointError` that says what is missing."""
        path = folder / MANIFEST
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if int(raw.get("format", FORMAT)) > FORMAT:
                raise CheckpointError(
                    f"format {raw['format']} is newer than this cadtrain's {FORMAT}",
                    where=str(path),
                    hint="Update cadtrain.",
                )
            files, frozen = _records(raw.pop("files")), raw.pop("frozen", None)
            if frozen is not None:
                frozen = FrozenRecord(str(frozen["folder"]), _records(frozen["files"]))
            return cls(**raw, files=files, frozen=frozen)
        except FileNotFoundError:
            raise CheckpointError("has no manifest.json, so it was never finished", where=str(folder)) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"is not a manifest: {error}", where=str(path)) from error

    def sizes(self) -> list[int]:
        """Bytes of all its files, those of frozen weights included, the largest first: as many as `faults` can share out."""
        files = [*self.files.values(), *(self.frozen.files.values() if self.frozen is not None else ())]
        return sorted((record.size for record in files), reverse=True)

    def faults(self, folder: Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
        """What in `folder` differs from the manifest; empty if it verifies. A name that leaves the folder is a fault.

        `share` (i, n) looks at the i-th of n parts of the files, for n processes that look together.
        """
        found = [] if self.files else ["the manifest names no file"]
        rows = [(name, folder, folder / name, record) for name, record in self.files.items()]
        if self.frozen is not None:
            if not is_frozen_name(self.frozen.folder):
                return [*found, f"{self.frozen.folder!r} is no folder of frozen weights"]
            beside = folder.parent / self.frozen.folder
            if not beside.is_dir():
                return [*found, f"its frozen weights are missing: copy the folder {self.frozen.folder} beside it"]
            files = self.frozen.files.items()
            rows += [(f"../{beside.name}/{name}", beside, beside / name, record) for name, record in files]
        number, count = share
        # As `sizes` sorts them.
        rows.sort(key=lambda row: (-row[3].size, row[0]))
        for name, root, path, record in rows[number::count]:
            if fault := file_fault(path, record, root=root):
                found.append(f"{name}: {fault}")
        return found


def file_fault(path: Path, record: FileRecord, *, root: Path) -> str | None:
    """How the file differs from its record, None if it is what was saved; a path that leaves `root` is a fault."""
    if not path.resolve().is_relative_to(root.resolve()):
        return "points outside the checkpoint"
    if not path.is_file():
        return "missing"
    if path.stat().st_size != record.size:
        return f"{path.stat().st_size} bytes instead of {record.size}"
    if hash_file(path) != record.xxh3:
        return "content differs from what was saved"
    return None


def _records(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, FileRecord]:
    return {name: FileRecord(int(row["size"]), str(row["xxh3"])) for name, row in rows.items()}


def hash_file(path: Path) -> str:
    """XXH3-128 of a file's content."""
    found = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def record_files(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    """Flush the named files to disk and record them."""
    records = {}
    for name in sorted(names):
        path = folder / name
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        records[name] = FileRecord(path.stat().st_size, hash_file(path))
    return records


def records_to_json(records: Mapping[str, FileRecord]) -> str:
    """One rank's records as it hands them to rank 0."""
    return json.dumps({name: asdict(record) for name, record in records.items()})


def records_from_json(text: str) -> dict[str, FileRecord]:
    """What `records_to_json` wrote."""
    return _records(json.loads(text))
