"""Views of a part from files.

    img/<name>_000.png … _007.png   img/<shard>/<name>_000.png …   img/<shard>/<name>/*.png   img/<name>/*.png

`.jpg` and `.jpeg` are taken too. The flat names are what the official rendering script writes.
"""

from __future__ import annotations

from pathlib import Path

MOST_VIEWS = 8
_SUFFIXES = (".png", ".jpg", ".jpeg")


def find_pictures(folder: Path, part_id: str) -> list[Path]:
    """The part's pictures under `folder`, in the order of their names; the first of the layouts that has any."""
    name = part_id.rsplit("/", 1)[-1]
    for stem in dict.fromkeys((part_id, name)):
        numbered = [path for view in range(MOST_VIEWS) if (path := _numbered(folder, stem, view)) is not None]
        if numbered:
            return numbered
        own = folder / stem
        if own.is_dir():
            inside = sorted(path for path in own.iterdir() if path.suffix.lower() in _SUFFIXES)
            if inside:
                return inside
    return []


def _numbered(folder: Path, stem: str, view: int) -> Path | None:
    for suffix in _SUFFIXES:
        path = folder / f"{stem}_{view:03d}{suffix}"
        if path.is_file():
            return path
    return None
