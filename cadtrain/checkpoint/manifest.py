"""What a finished checkpoint consists of: every file with its size and hash, written last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from cadtrain.checkpoint.layout import MANIFEST, write_atomically
from cadtrain.errors import CheckpointError

FORMAT = 1
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and XXH3-128 hash of one file: it finds damage, at the speed of memory; it is no signature."""

    size: int
    xxh3: str


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
            files = {name: FileRecord(int(row["size"]), str(row["xxh3"])) for name, row in raw.pop("files").items()}
            return cls(**raw, files=files)
        except FileNotFoundError:
            raise CheckpointError("has no manifest.json, so it was never finished", where=str(folder)) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"is not a manifest: {error}", where=str(path)) from error

    def faults(self, folder: Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
        """What in `folder` differs from the manifest; empty if it verifies. A name that leaves the folder is a fault.

        `share` (i, n) looks at the i-th of n parts of the files, for n processes that look together.
        """
        found = [] if self.files else ["the manifest names no file"]
        number, count = share
        for name, record in sorted(self.files.items(), key=lambda item: (-item[1].size, item[0]))[number::count]:
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                found.append(f"{name}: points outside the checkpoint")
            elif not path.is_file():
                found.append(f"{name}: missing")
            elif path.stat().st_size != record.size:
                found.append(f"{name}: {path.stat().st_size} bytes instead of {record.size}")
            elif hash_file(path) != record.xxh3:
                found.append(f"{name}: content differs from what was saved")
        return found


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
