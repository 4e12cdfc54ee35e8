"""What a path holds: a prepared dataset, or raw designs in one of three layouts, listed without reading them.

omni-cad    ROOT/json/<shard>/<id>.json (or cad_json), and txt/, pcd/, img/ beside it
flat        any .json files below a folder
file        one .json file
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cadtrain.data.inspect.tally import FaultTally, Number, hash64
from cadtrain.data.inspect.tokens import Counter
from cadtrain.data.manifest import MANIFEST_NAME, SPLITS, Manifest, lacks_manifest
from cadtrain.data.prepare.sources.captions import Fault, read_caption_file
from cadtrain.data.prepare.sources.omnicad import DESIGN_FOLDERS, list_files
from cadtrain.data.writing.writer import LedgerEntry
from cadtrain.errors import DataError

_HINT = (
    "Give a prepared dataset, a folder in Omni-CAD's layout (json/<shard>/<id>.json), "
    "a folder of DeepCAD or Fusion 360 JSON files, or one such file."
)


@dataclass(frozen=True, slots=True)
class RawFolder:
    """Designs that were listed. `ids` are paths below `designs` without the suffix, sorted; `clouds` and `pictures` are the
    folders of these, `captions` the caption files, where there are any."""

    root: Path
    layout: str
    designs: Path
    ids: list[str]
    num_bytes: int
    clouds: Path | None = None
    pictures: Path | None = None
    captions: tuple[Path, ...] = ()

    def design_path(self, part_id: str) -> Path:
        """The file of a design."""
        return self.designs / f"{part_id}.json"


def is_prepared(path: Path) -> bool:
    """Whether `path` has a manifest, readable or not.

    Raises `DataError` for what else is left of a preparation or belongs to a dataset: the folder of one that is not finished (by its
    name), a dataset that lost its manifest, one split.
    """
    if (path / MANIFEST_NAME).is_file():
        return True
    is_split = path.name in SPLITS and (path.parent / MANIFEST_NAME).is_file()
    if path.is_dir() and (is_split or ".tmp-" in path.name or lacks_manifest(path)):
        Manifest.read(path)  # says which of the three it is
    return False


def list_designs(path: Path) -> RawFolder:
    """The designs in or below `path`; raises `DataError` that says what is there instead."""
    if path.is_file():
        if path.suffix.lower() != ".json":
            raise DataError(f"a {path.suffix or 'nameless kind of'} file", where=str(path), hint=_HINT)
        return RawFolder(path, "file", path.parent, [path.stem], path.stat().st_size)
    if not path.is_dir():
        raise DataError("no such file or folder", where=str(path), hint=_HINT)
    designs = next((path / name for name in DESIGN_FOLDERS if (path / name).is_dir()), None)
    is_omni = designs is not None
    designs = designs or path
    ids, num_bytes = [], 0
    for name, size, _ in list_files(designs, ".json"):
        ids.append(name.removesuffix(".json"))
        num_bytes += size
    if not ids:
        entries = sorted(entry.name for entry in designs.iterdir())
        listed = ", ".join(entries[:6]) + (", …" if len(entries) > 6 else "") if entries else "nothing"
        raise DataError(f"no .json file in it or below; found {listed}", where=str(designs), hint=_HINT)
    ids.sort()
    if not is_omni:
        return RawFolder(path, "flat", designs, ids, num_bytes)
    captions = tuple(path / "txt" / name for name in (name for name, _, _ in list_files(path / "txt", ".json")))
    clouds, pictures = (path / name if (path / name).is_dir() else None for name in ("pcd", "img"))
    return RawFolder(path, "omni-cad", designs, ids, num_bytes, clouds, pictures, captions)


@dataclass(slots=True)
class CaptionTally:
    """Captions counted, one file in memory at a time; entry i of the arrays belongs to one caption."""

    hashes: Number = field(default_factory=lambda: array("Q"))
    """Of the ids."""
    characters: Number = field(default_factory=lambda: array("i"))
    tokens: Number = field(default_factory=lambda: array("i"))
    """Empty without a tokenizer."""
    faults: FaultTally = field(default_factory=FaultTally)

    def positions_of(self, id_hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """int64[N]: which caption belongs to each id, or -1."""
        known = np.asarray(self.hashes)
        if not len(known):
            return np.full(len(id_hashes), -1)
        order = np.argsort(known, kind="stable")
        places = np.minimum(np.searchsorted(known, id_hashes, sorter=order), len(known) - 1)
        found: NDArray[np.int64] = np.where(known[order[places]] == id_hashes, order[places], -1)
        return found


def count_captions(folder: RawFolder, tokenizer: Counter | None) -> CaptionTally:
    """All captions of the folder; an id in two files counts twice here and is used once."""
    tally = CaptionTally()
    for captions, faults in _caption_files(folder):
        texts = list(captions.values())
        tally.hashes.extend(hash64(part_id) for part_id in captions)
        tally.characters.extend(len(text) for text in texts)
        if tokenizer is not None:
            tally.tokens.extend(tokenizer.count(texts).tolist())
        for fault in faults:
            tally.faults.add(fault.kind, "", f"{fault.file} {fault.id}".strip(), fault.reason)
    return tally


def captions_of(folder: RawFolder, ids: set[str]) -> dict[str, str]:
    """The captions of a few parts."""
    found: dict[str, str] = {}
    for captions, _ in _caption_files(folder) if ids else ():
        for part_id in ids & captions.keys():
            found.setdefault(part_id, captions[part_id])
    return found


def _caption_files(folder: RawFolder) -> Iterator[tuple[dict[str, str], list[LedgerEntry]]]:
    for path in folder.captions:
        captions: dict[str, str] = {}
        faults: list[LedgerEntry] = []
        name = path.relative_to(folder.root).as_posix()

        def fault(kind: str, reason: str, part_id: str, name: str = name, faults: list[LedgerEntry] = faults) -> None:
            faults.append(LedgerEntry(part_id, name, kind, reason, dropped=False))

        def add(part_id: str, text: str, captions: dict[str, str] = captions, fault: Fault = fault) -> None:
            if captions.setdefault(part_id, text) != text:
                fault("bad_caption", "a second caption for this id; the first is used", part_id)

        read_caption_file(path, add, fault)
        yield captions, faults
