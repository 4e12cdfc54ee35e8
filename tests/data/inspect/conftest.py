"""A small raw folder with something of everything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cadtrain.cad import get_codec, to_deepcad_json
from cadtrain.cad.quantize import dequantize

PLATE = "Sa68,92,122,120L223,128L223,185L128,185L128,128;C176,156,19ENO140."
DISC = "Sa68,128,113,120C176,128,48ENO158."
CUT_PLATE = PLATE.removesuffix(".") + "\nSa171,152,134,10C176,128,48ECO116."


def write_design(path: Path, text: str) -> None:
    """The design that `text` spells, as a file in DeepCAD's schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_deepcad_json(dequantize(get_codec("compact").decode(text)))), encoding="utf-8")


@pytest.fixture
def raw_folder(tmp_path: Path) -> Path:
    """Six designs: four readable (two of them equal), one cut off, one without `sequence`; captions, one cloud, one picture."""
    root = tmp_path / "raw"
    for name, text in (("1_1", PLATE), ("1_2", CUT_PLATE), ("2_1", DISC), ("3_1", DISC)):
        document, variant = name.split("_")
        write_design(root / "json/0000" / f"{int(document):08d}_{int(variant):05d}.json", text)
    (root / "json/0001").mkdir()
    (root / "json/0001/00000004_00001.json").write_text('{"entities": {', encoding="utf-8")
    (root / "json/0001/00000005_00001.json").write_text('{"entities": {}}', encoding="utf-8")
    captions = [
        {"id": "0000/00000001_00001", "text caption": "A plate <script>alert('x')</script> with a hole"},
        {"id": "0000/00000002_00001", "text caption": "A disc"},
        {"id": "0000/99999999_00001", "text caption": "A part that is not here"},
        {"id": "0000/00000003_00001"},
    ]
    (root / "txt").mkdir()
    (root / "txt/0000.json").write_text(json.dumps(captions), encoding="utf-8")
    (root / "pcd/0000").mkdir(parents=True)
    np.savez(root / "pcd/0000/00000002_00001.npz", points=np.zeros((8, 3), dtype=np.float32))
    (root / "img").mkdir()
    Image.new("RGB", (32, 24), "green").save(root / "img/00000002_00001_000.png")
    return root
