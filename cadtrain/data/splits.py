"""Which split a part belongs to, by its document: variants of one design are never on both sides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path

from cadtrain.data.manifest import SPLITS
from cadtrain.errors import DataError

VALIDATION_SHARE = 0.05
TEST_SHARE = 0.05
FEWEST_FOR_ALL_SPLITS = 8
"""With this many documents or more, no split is left empty; one may get empty when duplicates are left out."""

_ENOUGH_DOCUMENTS = 4096
"""With so many, that hashes leave a split empty happens in one of 10^91 datasets."""
_STATE = re.compile(r"@\d+$")
_VARIANT = re.compile(r"(\d{8})_\d{5}$")
_ALIASES = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}


def document_of(part_id: str) -> str:
    """The document of an Omni-CAD or DeepCAD id: `0000/00000071_00005` and its state `…_00005@2` -> `0000/00000071`."""
    return _VARIANT.sub(r"\1", _STATE.sub("", part_id))


def split_documents(documents: Iterable[str]) -> dict[str, str]:
    """Document -> split: about 5 % test and 5 % validation, by a hash of the name and so the same in any run and any order.

    Where a split would be empty although there are documents enough, it gets the training document with the lowest hash.
    """
    ranked = sorted({document: _share(document) for document in documents}.items(), key=lambda pair: (pair[1], pair[0]))
    splits = {document: _by_share(share) for document, share in ranked}
    if len(ranked) >= FEWEST_FOR_ALL_SPLITS:
        for wanted in ("test", "validation"):
            if wanted not in splits.values():
                splits[next(document for document, _ in ranked if splits[document] == "train")] = wanted
    return splits


def split_function(documents: Iterable[str]) -> Callable[[str], str]:
    """`split_documents` as a function of the document, which takes no memory for many of them."""
    some: set[str] = set()
    for document in documents:
        some.add(document)
        if len(some) == _ENOUGH_DOCUMENTS:
            return _by_hash
    return split_documents(some).__getitem__


def _by_hash(document: str) -> str:
    return _by_share(_share(document))


def _share(document: str) -> float:
    return int.from_bytes(blake2b(document.encode("utf-8"), digest_size=8).digest(), "big") / 2**64


def _by_share(share: float) -> str:
    if share < TEST_SHARE:
        return "test"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


class SplitFile:
    """A published split: DeepCAD's `train_val_test_split.json` or Omni-CAD's `raw_train_test_split.json`.

    Ids in it may be those of documents (`0022/00220825`) or of parts, with or without the shard in front. A file without a
    validation list, as Omni-CAD's is, gives 5 % of its training documents to validation, by hash; its test list stays as it is.
    """

    def __init__(self, assigned: dict[str, str], has_validation: bool) -> None:
        self._assigned = assigned
        self._has_validation = has_validation

    @classmethod
    def read(cls, path: Path) -> SplitFile:
        """Read the file; raises `DataError` that says what is wrong with it."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            reason = (
                "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
            )
            raise DataError(reason, where=str(path), hint="Check `--split-file`.") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"not readable as JSON ({error})", where=str(path), hint="Check `--split-file`.") from error
        if not isinstance(raw, dict) or not raw or any(name not in _ALIASES for name in raw):
            found = ", ".join(map(str, raw)) if isinstance(raw, dict) else f"a JSON {type(raw).__name__}"
            raise DataError(
                f"found {found or 'nothing'}",
                where=str(path),
                hint="Expected lists of ids under train, validation (or val), test.",
            )
        assigned: dict[str, str] = {}
        for name, ids in raw.items():
            if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
                raise DataError(f"{name!r} is no list of ids", where=str(path))
            for item in ids:
                document = document_of(item)
                if assigned.setdefault(document, _ALIASES[name]) != _ALIASES[name]:
                    raise DataError(
                        f"{document} is in {assigned[document]} and in {_ALIASES[name]}",
                        where=str(path),
                        hint="Variants of one document must be in one split.",
                    )
        return cls(assigned, "validation" in assigned.values())

    def split_of(self, document: str) -> str | None:
        """The document's split, or None where the file does not list it."""
        split = self._assigned.get(document) or self._assigned.get(document.rsplit("/", 1)[-1])
        if split == "train" and not self._has_validation and _share(document) < VALIDATION_SHARE:
            return "validation"
        return split


assert set(_ALIASES.values()) == set(SPLITS)
