"""Splits: by document, the same in any run, never straddled by variants."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from cadtrain.data.splits import SplitFile, document_of, split_documents
from cadtrain.errors import DataError


@pytest.mark.parametrize(
    ("part", "document"),
    [
        ("0000/00000071_00005", "0000/00000071"),
        ("0001/00010403", "0001/00010403"),
        ("00000071_00005", "00000071"),
        ("synth-0/00000012", "synth-0/00000012"),
        ("my_part_00001", "my_part_00001"),
    ],
)
def test_documents(part: str, document: str) -> None:
    assert document_of(part) == document


def test_shares_are_about_90_5_5_and_order_does_not_matter() -> None:
    names = [f"{k // 1000:04d}/{k:08d}" for k in range(20000)]
    splits = split_documents(names)
    counts = Counter(splits.values())
    assert 0.045 < counts["test"] / 20000 < 0.055
    assert 0.045 < counts["validation"] / 20000 < 0.055
    assert split_documents(reversed(names)) == splits


def test_more_documents_move_none_of_the_old_ones() -> None:
    names = [f"doc/{k}" for k in range(2000)]
    few, many = split_documents(names[:1000]), split_documents(names)
    assert all(many[name] == split for name, split in few.items())


@pytest.mark.parametrize("count", range(8, 40))
def test_no_split_is_empty(count: int) -> None:
    assert set(split_documents(f"x{k}" for k in range(count)).values()) == {"train", "validation", "test"}


def _write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_deepcad_file(tmp_path: Path) -> None:
    file = SplitFile.read(
        _write(tmp_path / "s.json", {"train": ["0001/00000001"], "val": ["0001/00000002"], "test": []})
    )
    assert file.split_of("0001/00000001") == "train"
    assert file.split_of("0001/00000002") == "validation"
    assert file.split_of("0001/00000003") is None


def test_omni_cad_file_without_validation_gives_it_some_training_documents(tmp_path: Path) -> None:
    train = [f"0001/{k:08d}" for k in range(2000)]
    file = SplitFile.read(_write(tmp_path / "s.json", {"train": train, "test": ["0002/00000001"]}))
    counts = Counter(file.split_of(document) for document in train)
    assert 60 < counts["validation"] < 140
    assert counts["test"] == 0
    assert file.split_of("0002/00000001") == "test"


def test_ids_without_a_shard_and_ids_of_variants(tmp_path: Path) -> None:
    file = SplitFile.read(
        _write(
            tmp_path / "s.json", {"train": ["00000001"], "validation": ["00000002_00003", "00000002_00004"], "test": []}
        )
    )
    assert file.split_of("0000/00000001") == "train"
    assert file.split_of("0000/00000002") == "validation"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "found a JSON list"),
        ({}, "found nothing"),
        ({"train": [], "dev": []}, "found train, dev"),
        ({"train": "a"}, "'train' is no list"),
        ({"train": ["a/00000001_00001"], "test": ["a/00000001_00002"]}, "a/00000001 is in train and in test"),
    ],
)
def test_files_that_are_no_split(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SplitFile.read(_write(tmp_path / "s.json", content))


def test_a_split_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"train": ["a", ')
    with pytest.raises(DataError, match=r"s.json: not readable as JSON.*--split-file"):
        SplitFile.read(path)


def test_a_split_file_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"s.json: not readable as JSON.*--split-file"):
        SplitFile.read(path)


def test_no_split_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        SplitFile.read(tmp_path / "none.json")
    assert str(caught.value) == f"{tmp_path / 'none.json'}: no such file. Check `--split-file`."
