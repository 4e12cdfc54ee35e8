"""What a folder of features says about itself: `manifest.json`, written last, read first.

FOLDER/  manifest.json  train/image-00000.safetensors …  train/point-00000.safetensors …  validation/…  test/…

A row is what an encoder gave for one view or one draw of points, [tokens, width] in `dtype`. Rows of a split lie in the order of
its samples: view by view, draw by draw. So the place of a row follows from its number, and nothing has to be looked up.

This module knows no torch, so that `launch` can refuse a folder before ranks are started.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from cadtrain import __version__
from cadtrain.data.manifest import MANIFEST_NAME, read_object, write_whole
from cadtrain.errors import DataError

FORMAT = "cadtrain encoder features"
FORMAT_VERSION = 1
Kind = Literal["image", "point"]
KINDS: tuple[Kind, ...] = ("image", "point")
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
TRAIN = "train"
"""The split whose points are drawn several times; the others are looked at, always alike, with one draw."""

_ENCODE_HINT = "Make it with `cadtrain data encode CONFIG.yaml --out FOLDER`."
_DAMAGED_HINT = "Copy the folder again whole, or remove it and run `cadtrain data encode` again."


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoder that features of one kind come from."""

    weights: str
    """Its fingerprint."""
    encoder: dict[str, Any]
    """What besides weights makes it up, to tell what differs where the fingerprint does."""
    tokens: int
    """Tokens of a view or cloud."""
    width: int
    """Width of a token."""


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """One file of rows."""

    rows: int
    bytes: int
    digest: str
    """Of its row checksums, by which the rows are checked as they are read."""


@dataclass(frozen=True, slots=True)
class FileTask:
    """A file that belongs to a folder of features, and the rows that it holds."""

    name: str
    split: str
    kind: Kind
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureManifest:
    """The description of a folder of features.

    `dataset` is the digest of the prepared dataset, `num_points` how many points a draw has, `variants` how many draws of each
    training sample there are, `seed` that of the draws. `rows[split][kind]` and `rows_per_file[kind]` say where a row lies.
    """

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    cadtrain_version: str = __version__
    dataset: str
    dataset_path: str
    dtype: Literal["bf16", "fp16", "fp32"]
    encoded: dict[str, Encoded]
    num_points: int
    variants: int
    seed: int
    rows: dict[str, dict[str, int]]
    rows_per_file: dict[str, int]
    files: dict[str, FeatureFile] = field(default_factory=dict)

    def row_bytes(self, kind: str) -> int:
        """Size of one row of `kind`."""
        found = self.encoded[kind]
        return found.tokens * found.width * ITEM_BYTES[self.dtype]

    @property
    def total_bytes(self) -> int:
        """Size of all rows."""
        return sum(count * self.row_bytes(kind) for kinds in self.rows.values() for kind, count in kinds.items())

    @property
    def total_rows(self) -> int:
        """Number of all rows."""
        return sum(count for kinds in self.rows.values() for count in kinds.values())

    def tasks(self) -> Iterator[FileTask]:
        """Every file that the folder has when it is whole, in order."""
        for split, kinds in self.rows.items():
            for kind in KINDS:
                count, step = kinds.get(kind, 0), self.rows_per_file.get(kind, 1)
                for number in range(-(-count // step)):
                    start = number * step
                    yield FileTask(file_name(split, kind, number), split, kind, start, min(count, start + step))

    def draw_epochs(self, split: str) -> list[int]:
        """The epochs whose draw of points is stored for each sample of `split`; -1 is validation's."""
        return list(range(self.variants)) if split == TRAIN else [-1]

    def plan_digest(self) -> str:
        """Changes whenever another row would be written; not with the files that are there already, or the version that wrote them."""
        told = asdict(self)
        for key in ("files", "cadtrain_version", "dataset_path"):
            del told[key]
        return blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        write_whole(folder / MANIFEST_NAME, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> FeatureManifest:
        """The manifest of the features in `folder`; raises `DataError` that says what is there instead and what to run."""
        raw = _read_json(folder)
        where = str(folder / MANIFEST_NAME)
        if raw.get("format") != FORMAT:
            what = "the manifest of a prepared dataset" if "codec" in raw else f"format {raw.get('format')!r}"
            raise DataError(f"{what}, not of encoder features", where=where, hint=_ENCODE_HINT)
        version = raw.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise DataError(
                f"format version {version!r}, this cadtrain ({__version__}) reads up to {FORMAT_VERSION}",
                where=where,
                hint="Update cadtrain, or encode again with this version.",
            )
        missing = sorted({own.name for own in fields(cls)} - raw.keys())
        if missing:
            raise DataError(f"keys missing: {', '.join(missing)}", where=where, hint=_DAMAGED_HINT)
        try:
            known = {own.name: raw[own.name] for own in fields(cls)}
            known["encoded"] = {kind: Encoded(**found) for kind, found in raw["encoded"].items()}
            known["files"] = {name: FeatureFile(**found) for name, found in raw["files"].items()}
            manifest = cls(**known)
            lacking = [task.name for task in manifest.tasks() if task.name not in manifest.files]
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise DataError(f"not what such a manifest holds ({error})", where=where, hint=_DAMAGED_HINT) from error
        if lacking:
            raise DataError(f"no word of {lacking[0]}", where=where, hint=_DAMAGED_HINT)
        return manifest


def file_name(split: str, kind: str, number: int) -> str:
    """Name of a file of rows inside the folder."""
    return f"{split}/{kind}-{number:05d}.safetensors"


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        found = "a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(found, where=str(folder), hint=_ENCODE_HINT)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if ".tmp-" in folder.name:
            raise DataError(
                "features that are not finished (the manifest is written last)",
                where=str(folder),
                hint="Run the `cadtrain data encode` that began them again: it goes on where it stopped.",
            )
        raise DataError(f"no folder of features: it has no {MANIFEST_NAME}", where=str(folder), hint=_ENCODE_HINT)
    return read_object(path, damaged_hint=_DAMAGED_HINT)
