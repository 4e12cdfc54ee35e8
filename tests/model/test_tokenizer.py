"""The byte tokenizer, and what is asked of any other."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cadtrain.config.sections import LanguageModelConfig
from cadtrain.errors import ConfigError
from cadtrain.model import build_tokenizer
from cadtrain.model.tokenizer import byte_tokenizer

TEXTS = ("S 128 64\nE +12", "Ø 3,5 mm — 直径", "", "  two  spaces ", "<eos> and <pad>", "\x00\x7f\r\n\t", "isn 't it ?")


@pytest.fixture(scope="module", params=["made", "reopened"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    if request.param == "made":
        return byte_tokenizer()
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer(text).input_ids == ids


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 258
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 257)
    ids = [*b"S 1", tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "S 1"


def test_bytes_is_the_default_without_pretrained_weights() -> None:
    assert len(build_tokenizer(LanguageModelConfig(config={"model_type": "llama"}))) == 258
    assert len(build_tokenizer(LanguageModelConfig(pretrained="anything", tokenizer="bytes"))) == 258


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    config = LanguageModelConfig(config={"model_type": "llama"}, tokenizer=str(tmp_path))
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        build_tokenizer(config)


def test_a_tokenizer_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    config = LanguageModelConfig(config={"model_type": "llama"}, tokenizer=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"model\.language\.tokenizer: no tokenizer could be opened from .*none"):
        build_tokenizer(config)
