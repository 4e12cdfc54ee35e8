"""What `docs/data.md` shows of `cadtrain.cad` runs, and the texts that it shows are those that come out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cadtrain.cad import get_codec, to_deepcad_json
from cadtrain.cad.formats.cadquery_code import to_cadquery
from tests.cad.designs import PLATE_WITH_HOLE

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "cadtrain.cad" in block]


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part.json").write_text(json.dumps(to_deepcad_json(PLATE_WITH_HOLE)))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/data.md", "exec"), {"design": PLATE_WITH_HOLE})


def test_the_texts_shown_are_true() -> None:
    plate = get_codec("compact").decode("Sa68,92,122,120L223,128L223,185L128,185L128,128;C176,157,19ENO140.")
    assert len(BLOCKS) >= 4
    assert f"```\n{get_codec('deepcad17').encode(plate)}\n```" in TEXT
    assert f"```\n{to_cadquery(PLATE_WITH_HOLE)}```" in TEXT
