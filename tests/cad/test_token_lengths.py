"""The measurement of token lengths, run with a tokenizer that has one entry a character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cadtrain.cad import codec_names, to_deepcad_json
from tests.cad.designs import PLATE_WITH_HOLE, circle, design, step
from tests.cad.token_lengths import main


@pytest.mark.slow
def test_every_form_gets_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slow only because transformers is imported."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    entries = {chr(code): code for code in range(128)}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(entries, unk_token="\x00"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(tmp_path / "tokenizer")
    designs = tmp_path / "designs"
    designs.mkdir()
    (designs / "a.json").write_text(json.dumps(to_deepcad_json(PLATE_WITH_HOLE)))
    (designs / "b.json").write_text(json.dumps(to_deepcad_json(design(step(circle(0, 0, 1), 1)))))
    (designs / "c.json").write_text("{}")
    assert main(str(tmp_path / "tokenizer"), str(designs)) == 0
    out, err = capsys.readouterr()
    rows = {line[:12].strip(): line.split() for line in out.splitlines()}
    assert set(codec_names()) | {"raw json"} <= set(rows)
    assert rows["compact"][-3] == "66"  # the longest of the two, the plate's
    assert "2 designs" in out
    assert "c.json" in err
