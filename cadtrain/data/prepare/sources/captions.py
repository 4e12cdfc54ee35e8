"""Captions of a whole folder, held on disk: Omni-CAD's are 165 MB of text, and a run needs each of them once.

txt/<shard>.json     [{"id": "0000/00000071_00005", "text caption": "…"}, …]
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np

MOST_FAULTS_PER_FILE = 100
"""A file that is wrong throughout is described by its first faults and their number."""

_CONSEQUENCE = "its parts get captions made from their sequences"
_MOST_KEYS = 6

Fault = Callable[[str, str, str], None]
"""Takes a kind, a reason, and the part's id or ''."""


class CaptionStore:
    """Captions by id: the texts in an unnamed temporary file, 24 bytes each in memory. Filled by `add`, then read by `get`."""

    def __init__(self) -> None:
        self._texts: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the store
        self._keys, self._starts, self._sizes = array("Q"), array("Q"), array("Q")
        self._end = 0
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, part_id: str, text: str) -> None:
        """Put in a caption; of several for one id the first counts."""
        # The id goes with the text: it is told apart from another with the same hash, and named where it has two captions.
        data = f"{part_id}\n{text}".encode("utf-8", "replace")  # JSON can spell half characters
        self._texts.write(data)
        self._keys.append(_key(part_id))
        self._starts.append(self._end)
        self._sizes.append(len(data))
        self._end += len(data)
        self._index = None

    def get(self, part_id: str) -> str | None:
        """The caption for an id, or None."""
        keys, order = self._sorted()
        key = np.uint64(_key(part_id))
        at = int(np.searchsorted(keys, key))
        if at == len(keys) or keys[at] != key:
            return None
        found, text = self._read(int(order[at]))
        return text if found == part_id else None

    def conflicts(self) -> list[tuple[int, str]]:
        """Number (in the order of adding) and id of each caption that is not used: it comes second for its id, with another text."""
        keys, order = self._sorted()
        heads = np.searchsorted(keys, keys)  # where each id's captions begin
        later = np.flatnonzero(heads != np.arange(len(keys)))
        pairs = ((int(order[at]), int(order[heads[at]])) for at in later)
        return sorted(
            (number, self._read(number)[0]) for number, first in pairs if self._read(number) != self._read(first)
        )

    def strays(self, ids: Iterable[str]) -> list[int]:
        """Number of each caption whose id is none of `ids`."""
        known = np.fromiter(map(_key, ids), dtype=np.uint64)
        keys = np.frombuffer(self._keys, dtype=np.uint64) if self._keys else np.zeros(0, dtype=np.uint64)
        strays: list[int] = np.flatnonzero(~np.isin(keys, known)).tolist()
        return strays

    def id_of(self, number: int) -> str:
        """The id of caption `number`, in the order of adding."""
        return self._read(number)[0]

    def __len__(self) -> int:
        return len(self._keys)

    def _read(self, number: int) -> tuple[str, str]:
        self._texts.seek(self._starts[number])
        part_id, _, text = self._texts.read(self._sizes[number]).decode("utf-8").partition("\n")
        return part_id, text

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        if self._index is None:
            keys = np.frombuffer(self._keys, dtype=np.uint64) if self._keys else np.zeros(0, dtype=np.uint64)
            order = np.argsort(keys, kind="stable")
            self._index = keys[order], order
        return self._index


def _key(part_id: str) -> int:
    return int.from_bytes(blake2b(part_id.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def read_caption_file(path: Path, add: Callable[[str, str], None], fault: Fault) -> None:
    """Give a file's captions to `add`, by id; what is wrong with it or one of its entries goes to `fault`."""
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        fault("bad_caption_file", f"not readable as JSON ({error}); {_CONSEQUENCE}", "")
        return
    if not isinstance(entries, list):
        found = f"a JSON {type(entries).__name__} where a list of captions belongs"
        fault("bad_caption_file", f"{found}; {_CONSEQUENCE}", "")
        return
    bad = 0
    for number, entry in enumerate(entries):
        part_id = entry.get("id") if isinstance(entry, dict) else None
        text = entry.get("text caption") if isinstance(entry, dict) else None
        if isinstance(part_id, str) and isinstance(text, str) and text.strip():
            add(part_id, text.strip())
            continue
        bad += 1
        if bad > MOST_FAULTS_PER_FILE:
            continue
        if not isinstance(part_id, str):
            fault("bad_caption", f"entry {number}: no `id`: {str(entry)[:80]}", "")
        elif "text caption" not in entry:
            fault("bad_caption", f"entry {number}: has no key `text caption`; it has {_keys(entry)}", part_id)
        else:
            fault("bad_caption", f"entry {number}: no text under `text caption`: {str(text)[:80]!r}", part_id)
    if bad > MOST_FAULTS_PER_FILE:
        fault("bad_caption", f"and {bad - MOST_FAULTS_PER_FILE} more entries without id or text", "")


def _keys(entry: dict[str, Any]) -> str:
    more = ", …" if len(entry) > _MOST_KEYS else ""
    return ", ".join(key[:40] for key in list(entry)[:_MOST_KEYS]) + more
