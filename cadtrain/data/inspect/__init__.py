"""Looking at data: raw folders and prepared datasets, as values to show or to write as JSON.

`inspect_raw` reads designs as they are published, `inspect_dataset` what `prepare` and `synth` wrote; `make_gallery` chooses some of
either and gives each a picture. Both work in shares over all cores and keep a few numbers a design, so that memory does
not depend on what a design holds.
"""

from __future__ import annotations

from pathlib import Path

from cadtrain.data.inspect.folder import is_prepared
from cadtrain.data.inspect.gallery import Card, make_gallery
from cadtrain.data.inspect.lengths import DEFAULT_BUDGETS, LengthOptions, TokenStats, parse_budgets
from cadtrain.data.inspect.prepared import PreparedReport, PreparedScan, inspect_dataset
from cadtrain.data.inspect.raw import RawReport, RawScan, inspect_raw
from cadtrain.data.inspect.shares import Progress, no_progress
from cadtrain.data.inspect.tokens import resolve_tokenizer
from cadtrain.data.inspect.values import Spread

__all__ = [
    "DEFAULT_BUDGETS", "Card", "LengthOptions", "PreparedReport", "PreparedScan", "Progress", "RawReport", "RawScan",
    "Spread", "TokenStats", "inspect_dataset", "inspect_path", "inspect_raw", "make_gallery", "no_progress",
    "parse_budgets", "resolve_tokenizer",
]  # fmt: skip


def inspect_path(
    path: Path,
    lengths: LengthOptions,
    *,
    limit: int | None = None,
    workers: int = 1,
    progress: Progress = no_progress,
) -> RawScan | PreparedScan:
    """Look through whatever `path` is; raises `DataError` that says what was found where it is neither."""
    look = inspect_dataset if is_prepared(path) else inspect_raw
    return look(path, lengths, limit=limit, workers=workers, progress=progress)
