"""What a prepared dataset says about itself: `manifest.json`, written last, read first.

DIR/  manifest.json  failures.jsonl  costs.parquet  train/  validation/  test/        each split a Hugging Face `datasets` folder
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

from cadtrain import __version__
from cadtrain.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
FAILURES_NAME = "failures.jsonl"
STATE_NAME = "state.json"
"""In the folder of each split, by Hugging Face `datasets`."""
COSTS_NAME = "costs.parquet"
MOVED = "moved"
"""The ledger's kind for a part that lies in another split than its document's, beside an equal design."""
SPLITS = ("train", "validation", "test")

_LATER_KEYS = {"notes", "captions"}
_PREPARE_HINT = "Make one with `cadtrain data prepare --root OMNICAD --out DIR` or `cadtrain data synth --out DIR`."
_DAMAGED_HINT = "The manifest is damaged: copy the dataset again whole, or remove the folder and prepare it again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The description of a prepared dataset.

    `num_points` and `num_views` are stored per part (0 where none are), `image_size` is in pixels, `digests` has a hash of each
    split's rows in order, `digest` one of the whole, `settings` what the parts were made with, `failures` those left out by kind, `notes`
    the faults that cost no part by kind, `captions` the parts by who wrote the caption (`Row.caption_source`). Datasets of earlier
    versions have neither `notes` nor `captions`; then these are empty.
    """

    format_version: int = FORMAT_VERSION
    cadtrain_version: str = __version__
    source: str
    seed: int
    codec: str
    codec_version: int
    counts: dict[str, int]
    num_points: int
    num_views: int
    image_size: int
    digest: str
    digests: dict[str, str]
    failures: dict[str, int]
    settings: dict[str, Any]
    notes: dict[str, int] = field(default_factory=dict)
    captions: dict[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        write_whole(folder / MANIFEST_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the dataset in `folder`; raises `DataError` that says what is there instead and what to run."""
        raw = _read_json(folder)
        version = raw.get("format_version")
        if not isinstance(version, int):
            raise DataError(
                f"format version {version!r} where a whole number belongs",
                where=str(folder / MANIFEST_NAME),
                hint=_DAMAGED_HINT,
            )
        if version > FORMAT_VERSION:
            raise DataError(
                f"format version {version!r}, this cadtrain ({__version__}) reads up to {FORMAT_VERSION}",
                where=str(folder / MANIFEST_NAME),
                hint="Update cadtrain, or prepare the dataset again with this version.",
            )
        known = {own.name for own in fields(cls)}
        missing = sorted(known - _LATER_KEYS - raw.keys())
        if missing:
            raise DataError(
                f"keys missing: {', '.join(missing)}", where=str(folder / MANIFEST_NAME), hint=_DAMAGED_HINT
            )
        return cls(**{key: value for key, value in raw.items() if key in known})


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    partial = path.with_name(
        f"{path.name}.{uuid4().hex}.partial"
    )  # its own, for processes of several machines may meet here
    with partial.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def lacks_manifest(folder: Path) -> bool:
    """Whether `folder` holds splits of a prepared dataset, but not what says that it is whole."""
    return not (folder / MANIFEST_NAME).is_file() and any((folder / split / STATE_NAME).is_file() for split in SPLITS)


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        found = "a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(found, where=str(folder), hint=_PREPARE_HINT)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        entries = sorted(entry.name for entry in folder.iterdir())
        if ".tmp-" in folder.name:
            raise DataError(
                "a dataset that is not finished (its manifest is written last)",
                where=str(folder),
                hint="Run the command that began it again with the same options: it goes on where it stopped.",
            )
        if lacks_manifest(folder):
            raise DataError(
                f"a prepared dataset without its {MANIFEST_NAME}: incomplete or damaged",
                where=str(folder),
                hint="Copy it again whole, or remove the folder and prepare it again.",
            )
        if "json" in entries and "txt" in entries:
            raise DataError(
                "a raw Omni-CAD folder, not a prepared dataset",
                where=str(folder),
                hint=f"Prepare it first: `cadtrain data prepare --root {folder} --out DIR`.",
            )
        if (folder.parent / MANIFEST_NAME).is_file() and folder.name in SPLITS:
            raise DataError(
                "one split of a dataset", where=str(folder), hint=f"Give the dataset itself: {folder.parent}"
            )
        listed = ", ".join(entries[:5]) + (", …" if len(entries) > 5 else "") if entries else "nothing"
        raise DataError(f"no prepared dataset: no {MANIFEST_NAME}, but {listed}", where=str(folder), hint=_PREPARE_HINT)
    return read_object(path, damaged_hint=_DAMAGED_HINT)


def read_object(path: Path, *, damaged_hint: str) -> dict[str, Any]:
    """The JSON object in the file `path`; raises `DataError` with `damaged_hint` for a file that holds none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not readable as JSON ({error})", where=str(path), hint=damaged_hint) from error
    if not isinstance(raw, dict):
        raise DataError(f"a JSON {type(raw).__name__} where an object belongs", where=str(path), hint=damaged_hint)
    return raw
