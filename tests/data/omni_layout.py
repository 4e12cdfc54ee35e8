"""Puts real DeepCAD and Omni-CAD test files into one folder in Omni-CAD's layout.

    python tests/data/omni_layout.py DATA OUT

DATA holds `omni-cad-test-subset` (212 designs, nothing else) and `text2cad-medium` (100 designs with captions and two pictures
each). OUT gets json/, txt/ and img/; a design without caption or picture simply has none there, as in a real folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path


def make_omni_layout(data: Path, out: Path) -> Path:
    """Fill `out` from `data`; returns `out`."""
    for source in ("omni-cad-test-subset/json", "text2cad-medium/cad_json"):
        for design in sorted((data / source).rglob("*.json")):
            _copy(design, out / "json" / design.parent.name / design.name)
    captions: dict[str, list[dict[str, str]]] = {}
    for path in sorted((data / "text2cad-medium/minimal_json").rglob("*_merged_vlm.json")):
        caption = _caption(json.loads(path.read_text(encoding="utf-8")))
        if caption:
            part_id = f"{path.parent.name}/{path.name.removesuffix('_merged_vlm.json')}"
            captions.setdefault(path.parent.name, []).append({"id": part_id, "text caption": caption})
    for shard, entries in captions.items():
        path = out / "txt" / f"{shard}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    for picture in sorted((data / "text2cad-medium/multi_view").rglob("*_view?.png")):
        part, view = picture.stem.split("_view")
        _copy(picture, out / "img" / f"{part}_{int(view):03d}.png")  # the official script writes them flat
    return out


def _caption(described: dict[str, object]) -> str:
    words = [str(described.get(key) or "").strip() for key in ("final_name", "final_shape")]
    return ". ".join(word.rstrip(".") for word in words if word)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make_omni_layout(Path(sys.argv[1]), Path(sys.argv[2]))
