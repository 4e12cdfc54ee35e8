"""Counting the tokens of texts without torch: a `tokenizer.json`, or the demo's tokenizer of single bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cadtrain.cad.codec import get_codec, token_counter
from cadtrain.cad.grid import QuantizedSequence
from cadtrain.errors import CadtrainError, DataError, UsageError

BYTE_NAMES = ("byte", "bytes")
"""Names of the tokenizer of the demo: one token for each byte of the UTF-8 text."""

_FILE = "tokenizer.json"
_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_SAVE_HINT = (
    "Write one with transformers: "
    "`python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{folder}').save_pretrained('{folder}')\"`."
)


class Counter(Protocol):
    """Counts tokens as training does: without special tokens."""

    def count(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """int32[N]: tokens of each text."""


class _Bytes:
    def count(self, texts: Sequence[str]) -> NDArray[np.int32]:
        return np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], dtype=np.int32)


class _File:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        # The library raises a bare Exception for every fault of the file.
        except Exception as error:
            raise DataError(
                f"no readable tokenizer ({error})", where=str(path), hint=_SAVE_HINT.format(folder=path.parent)
            ) from error
        # Some files were saved with a training run's own cut and padding, which would falsify every length.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def count(self, texts: Sequence[str]) -> NDArray[np.int32]:
        clean = [
            text.encode("utf-8", "replace").decode("utf-8") for text in texts
        ]  # a lone surrogate is no text for it
        encoded = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return np.array([len(entry.ids) for entry in encoded], dtype=np.int32)


def resolve_tokenizer(name: str) -> str:
    """What `open_tokenizer` takes: `byte`, or the path of a `tokenizer.json`.

    `name` is `byte`, a folder that holds a `tokenizer.json`, or such a file. Raises `UsageError` that says what is there
    instead.
    """
    path = Path(name).expanduser()
    if name in BYTE_NAMES and not path.exists():
        return BYTE_NAMES[0]
    if path.is_dir():
        if (path / _FILE).is_file():
            return str(path / _FILE)
        slow = [found for found in _SLOW_FILES if (path / found).is_file()]
        entries = sorted(entry.name for entry in path.iterdir())
        listed = ", ".join(slow or entries[:5]) or "nothing"
        raise UsageError(
            f"no {_FILE} in the folder, but {listed}.",
            where=f"--tokenizer {name}",
            hint=_SAVE_HINT.format(folder=name) if slow else "Give a tokenizer's folder, or `byte`.",
        )
    if path.is_file() and path.suffix == ".json":
        return str(path)
    found = "a file, not a tokenizer's folder" if path.exists() else "no such folder"
    raise UsageError(f"{found}.", where=f"--tokenizer {name}", hint=f"Give a folder with {_FILE}, or `byte`.")


@lru_cache(maxsize=2)
def open_tokenizer(resolved: str) -> Counter:
    """The tokenizer of that resolved name, opened once in a process; raises `DataError` for a damaged file."""
    return _Bytes() if resolved in BYTE_NAMES else _File(Path(resolved))


def written(codec: str, sequence: QuantizedSequence) -> str | None:
    """The design's text in that codec, or None where the design is beyond what the codec can write."""
    try:
        return get_codec(codec).encode(sequence)
    except (CadtrainError, ValueError):
        return None


def count_written(tokenizer: str, codec: str, texts: Sequence[str | None]) -> list[int]:
    """Tokens of each text of that codec, -1 for None; `tokenizer` as `resolve_tokenizer` gives it.

    The words of a codec that adds them to the vocabulary count one each, whether or not the tokenizer has them yet.
    """
    present = [text for text in texts if text is not None]
    words = token_counter(codec)
    lengths = iter([words(text) for text in present] if words else open_tokenizer(tokenizer).count(present).tolist())
    return [-1 if text is None else next(lengths) for text in texts]
