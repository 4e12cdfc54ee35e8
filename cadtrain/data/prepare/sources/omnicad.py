"""A folder in Omni-CAD's layout.

    ROOT/  json/<shard>/<id>.json     designs, in DeepCAD's schema (DeepCAD's own name, cad_json, is taken too)
           txt/<shard>.json           captions: [{"id": "0000/00000071_00005", "text caption": "…"}, …]; optional
           pcd/                       point clouds; optional, see `clouds`
           img/                       views; optional, see `pictures`

An id is the design's path under `json` without its suffix.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cadtrain.data.manifest import MANIFEST_NAME
from cadtrain.data.prepare.sources.captions import CaptionStore, read_caption_file
from cadtrain.data.writing.writer import LedgerEntry
from cadtrain.errors import DataError

DESIGN_FOLDERS = ("json", "cad_json")
_LAYOUT_HINT = (
    "Expected ROOT/json/<shard>/<id>.json, and beside it txt/<shard>.json, pcd/ and img/ as far as they exist; "
    "the dataset jingwei-xu-00/Omni-CAD on Hugging Face has json and txt."
)


@dataclass(frozen=True, slots=True)
class OmniCadFolder:
    """What lies in a folder: ids in order, captions by id, and what was wrong with caption files and names of designs."""

    root: Path
    designs: Path
    ids: list[str]
    captions: CaptionStore
    clouds: Path | None
    pictures: Path | None
    faults: list[LedgerEntry] = field(default_factory=list)
    inputs_digest: str = ""
    """Changes when a design or caption file comes, goes, or changes its size or time."""

    @classmethod
    def discover(cls, root: Path) -> OmniCadFolder:
        """List the folder.

        Raises `DataError` that says what was found where no designs are, and for captions of which none is of a design.
        """
        if not root.is_dir():
            found = "a file, not a folder" if root.exists() else "no such folder"
            raise DataError(found, where=str(root), hint=_LAYOUT_HINT)
        designs = next((root / name for name in DESIGN_FOLDERS if (root / name).is_dir()), None)
        if designs is None:
            names = (
                ", ".join(printable(name) for name in sorted(entry.name for entry in root.iterdir())[:6]) or "nothing"
            )
            raise DataError(f"no folder `json`; found {names}", where=str(root), hint=_layout_hint(root))
        hasher = blake2b(digest_size=16)
        faults: list[LedgerEntry] = []
        ids = _list_ids(designs, hasher, faults)
        captions = _read_captions(root, ids, hasher, faults)
        for name in ("pcd", "img"):
            hasher.update(f"{name} {(root / name).is_dir()}\n".encode())
        return cls(
            root=root,
            designs=designs,
            ids=ids,
            captions=captions,
            clouds=root / "pcd" if (root / "pcd").is_dir() else None,
            pictures=root / "img" if (root / "img").is_dir() else None,
            faults=faults,
            inputs_digest=hasher.hexdigest(),
        )

    def design_path(self, part_id: str) -> Path:
        """The file of a design."""
        return self.designs / f"{part_id}.json"


def printable(name: str) -> str:
    """A file's name as text that can be stored and shown: bytes that are no UTF-8 become `\\xff`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def list_files(folder: Path, suffix: str, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Path below `folder` with slashes, size and time (ns) of every file with `suffix`, by path; nothing where there is no folder.

    Holds the names of one folder at a time.
    """
    if not folder.is_dir():
        return
    found: list[tuple[str, int, int]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found.append((f"{entry.name}/", 0, 0))
            elif entry.name.endswith(suffix):
                stat = entry.stat(follow_symlinks=_leads_somewhere(entry))
                found.append((entry.name, stat.st_size, stat.st_mtime_ns))
    for name, size, time_ns in sorted(found):
        if name.endswith("/"):
            yield from list_files(folder / name, suffix, f"{prefix}{name}")
        else:
            yield f"{prefix}{name}", size, time_ns


def _leads_somewhere(entry: os.DirEntry[str]) -> bool:
    # A link to nothing is listed, and reading it says what is wrong.
    return not entry.is_symlink() or os.path.exists(entry.path)


def _layout_hint(root: Path) -> str:
    """What to do about a folder without `json`."""
    if root.name in DESIGN_FOLDERS:
        return f"These are the designs alone: give the folder that `{root.name}` is in."
    if (root / MANIFEST_NAME).is_file():
        return "This is a dataset already: train with it, or look at it with `cadtrain data inspect`."
    if any(True for pattern in ("*.json", "*/*.json") for _ in root.glob(pattern)):
        return f"Put the designs into a folder `json/` (a link will do). {_LAYOUT_HINT}"
    return _LAYOUT_HINT


def _list_ids(designs: Path, hasher: Any, faults: list[LedgerEntry]) -> list[str]:
    """The ids of all designs, in order; one whose name is no text goes into `faults` instead. Raises `DataError` for none."""
    ids: list[str] = []
    for path, size, time_ns in list_files(designs, ".json"):
        hasher.update(f"{path} {size} {time_ns}\n".encode("utf-8", "surrogateescape"))
        part_id, shown = path.removesuffix(".json"), printable(path)
        if shown == path:
            ids.append(part_id)
        else:
            # An id is text in Arrow and in JSON; one made up for this file would be that of no caption, cloud or picture.
            reason = "the file's name is no UTF-8 text; give it another name"
            faults.append(
                LedgerEntry(printable(part_id), f"{designs.name}/{shown}", "unreadable", reason, dropped=True)
            )
    if not ids and faults:
        raise DataError(
            f"none of the {len(faults)} .json files has a name that is UTF-8 text, the first being {faults[0].file}",
            where=str(designs),
            hint="Rename them.",
        )
    if not ids:
        raise DataError("no .json file in any folder below", where=str(designs), hint=_LAYOUT_HINT)
    return ids


def _read_captions(root: Path, ids: Sequence[str], hasher: Any, faults: list[LedgerEntry]) -> CaptionStore:
    """All captions under `txt`; what is wrong with a file or an entry goes into `faults`, and those parts get none.

    Raises `DataError` where there are captions and none of them is of a design in `ids`.
    """
    captions = CaptionStore()
    begins: list[tuple[int, str]] = []
    for path, size, time_ns in list_files(root / "txt", ".json"):
        hasher.update(f"txt/{path} {size} {time_ns}\n".encode("utf-8", "surrogateescape"))
        name = printable(f"txt/{path}")
        begins.append((len(captions), name))
        read_caption_file(root / "txt" / path, captions.add, partial(_fault, faults, name))

    def file_of(number: int) -> str:
        return begins[bisect_right(begins, number, key=lambda begin: begin[0]) - 1][1]

    for number, part_id in captions.conflicts():
        _fault(faults, file_of(number), "bad_caption", "a second caption for this id; the first is used", part_id)
    strays = captions.strays(ids)
    if len(captions) and len(strays) == len(captions):
        found = captions.id_of(0)
        raise DataError(
            f"none of the captions ({len(captions)}) is of a design: the first has the id {found}, a design's id is {_like(ids, [found])[0]}",
            where=str(root / "txt"),
            hint="An id is the design's path below the folder of designs, without `.json`. Mend the ids, or move `txt` away to have "
            "captions made from the sequences.",
        )
    by_file: dict[str, list[int]] = {}
    for number in strays:
        by_file.setdefault(file_of(number), []).append(number)
    firsts = [captions.id_of(numbers[0]) for numbers in by_file.values()]
    for (name, numbers), first, design in zip(by_file.items(), firsts, _like(ids, firsts), strict=True):
        count = "1 caption is" if len(numbers) == 1 else f"{len(numbers)} captions are"
        reason = f"{count} of no design and not used: the first has the id {first}, a design's id is {design}"
        _fault(faults, name, "caption_without_design", reason, "")
    return captions


def _like(ids: Sequence[str], strays: Sequence[str]) -> list[str]:
    """For each stray id a design's that shows how it is spelled: one of the same name if there is any."""
    names = {stray: stray.rsplit("/", 1)[-1] for stray in strays}
    wanted, found = set(names.values()), dict[str, str]()
    for part_id in ids:
        name = part_id.rsplit("/", 1)[-1]
        if name in wanted:
            found.setdefault(name, part_id)
    return [found.get(names[stray], ids[0]) for stray in strays]


def _fault(faults: list[LedgerEntry], name: str, kind: str, reason: str, part_id: str) -> None:
    faults.append(LedgerEntry(part_id, name, kind, reason, dropped=False))
