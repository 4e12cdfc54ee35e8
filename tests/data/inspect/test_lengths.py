"""Tokenizers, and what a budget keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from cadtrain.data.inspect.lengths import LengthOptions, parse_budgets, token_stats
from cadtrain.data.inspect.tokens import open_tokenizer, resolve_tokenizer
from cadtrain.errors import DataError, UsageError
from cadtrain.model.tokenizer import byte_tokenizer


@pytest.fixture
def words_folder(tmp_path: Path) -> Path:
    """A tokenizer of words, saved as training scripts leave it: cut to 2 tokens, padded, with a start token."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[BOS]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=16)
    folder = tmp_path / "words"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_the_byte_tokenizer_counts_as_the_demo_does() -> None:
    texts = ["Sa68,92.", "", "Ø 12 µm – 円", "<eos>"]
    demo = [len(ids) for ids in byte_tokenizer()(texts, add_special_tokens=False)["input_ids"]]
    assert open_tokenizer(resolve_tokenizer("byte")).count(texts).tolist() == demo


def test_a_folder_counts_without_its_own_cut_padding_and_special_tokens(words_folder: Path) -> None:
    tokenizer = open_tokenizer(resolve_tokenizer(str(words_folder)))
    assert tokenizer.count(["a b c d", "", "a \ud800"]).tolist() == [4, 0, 2]


def test_what_is_no_tokenizer_is_refused_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        resolve_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="but nothing"):
        resolve_tokenizer(str(tmp_path))
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UsageError, match=r"but vocab\.json.*save_pretrained"):
        resolve_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="no readable tokenizer"):
        open_tokenizer(resolve_tokenizer(str(tmp_path)))


def test_budgets_are_sorted_numbers() -> None:
    assert parse_budgets("1024, 512,512") == (512, 1024)
    for wrong in ("", "512,", "0", "-1", "1.5", "many"):
        with pytest.raises(UsageError, match="is no number of tokens"):
            parse_budgets(wrong)


def test_a_budget_keeps_what_is_as_long_as_it() -> None:
    options = LengthOptions("byte", "byte", budgets=(10, 20))
    found = token_stats(
        options, "compact", {"train": [10, 11, -1], "test": [20]}, {"train": [0, 9, 5], "test": np.array([1])}
    )
    first, second = found.budgets
    assert (first.kept, first.dropped, first.kept_by_split) == (1, 3, {"train": 1, "test": 0})
    assert (second.kept, second.dropped, second.kept_with_caption) == (3, 1, 2)
    assert found.unwritable == 1
    assert found.sample is not None
    assert found.sample.max == 21
    assert found.caption is not None
    assert found.caption.count == 3
