"""Equal sequences: which rows stay, whatever the policy, and what is said of the others."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cadtrain.cli.data.prepare import DuplicatesChoice
from cadtrain.data.manifest import FAILURES_NAME, SPLITS, Manifest
from cadtrain.data.shards import PartDataset
from cadtrain.data.writing.duplicates import OFFERED, Duplicates, find_redundant, into_one_split
from cadtrain.data.writing.writer import DatasetWriter, LedgerEntry
from tests.data.conftest import plain_plan, plain_row

TRAIN, VALIDATION, TEST = range(3)

Rows = list[tuple[int, int, int, bool]]
"""(sequence, document, split, is_whole) of each row; a document's rows are all in one split."""


def _find(rows: Rows, policy: Duplicates) -> list[int]:
    keys = np.array([key for key, *_ in rows], dtype=np.uint64)
    own = np.array([key * 1000 + document for key, document, *_ in rows], dtype=np.uint64)
    splits = np.array([split for *_, split, _ in rows], dtype=np.uint8)
    return find_redundant(keys, own, splits, np.array([w for *_, w in rows], dtype=bool), policy).tolist()


ROWS: Rows = [
    (1, 0, TEST, True), (1, 1, TRAIN, True), (1, 2, TRAIN, True), (2, 3, VALIDATION, True), (2, 4, TEST, True),
    (2, 5, TEST, True), (3, 6, VALIDATION, True), (3, 7, VALIDATION, True), (4, 8, TRAIN, True), (4, 9, TRAIN, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "twins"),
    [
        (Duplicates.KEEP, [-1] * 10),
        (Duplicates.OUT_OF_TEST, [1, -1, -1, 4, -1, 4, -1, 6, -1, -1]),
        (Duplicates.DROP, [1, -1, 1, 4, -1, 4, -1, 6, -1, 8]),
        (Duplicates.OUT_OF_TRAIN, [-1, 0, 0, -1, -1, -1, -1, -1, -1, -1]),
    ],
)
def test_each_policy(policy: Duplicates, twins: list[int]) -> None:
    assert _find(ROWS, policy) == twins


def test_a_state_gives_way_to_a_design_of_its_document_and_to_nothing_else() -> None:
    rows: Rows = [
        (1, 0, TRAIN, False),
        (1, 0, TRAIN, True),
        (1, 0, TRAIN, False),
        (1, 1, TRAIN, False),
        (1, 1, TRAIN, False),
    ]
    assert _find(rows, Duplicates.KEEP) == [1, -1, 1, -1, 3]


def test_what_a_state_is_said_to_repeat_is_in_the_dataset() -> None:
    # The design that the state repeats is left out of test itself, for the sake of the training part.
    rows: Rows = [(1, 0, TEST, False), (1, 0, TEST, True), (1, 1, TRAIN, True)]
    assert _find(rows, Duplicates.OUT_OF_TEST) == [2, 2, -1]


def test_no_rows() -> None:
    assert _find([], Duplicates.DROP) == []


@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.booleans()), max_size=40),
    policy=st.sampled_from(list(Duplicates)),
)
def test_what_every_policy_promises(rows: list[tuple[int, int, bool]], policy: Duplicates) -> None:
    table: Rows = [(key, document, document % 3, is_whole) for key, document, is_whole in rows]
    twins = _find(table, policy)
    kept = [row for row, twin in zip(table, twins, strict=True) if twin < 0]
    for row, twin in zip(table, twins, strict=True):
        if twin >= 0:
            assert twins[twin] < 0, "the twin is kept"
            assert table[twin][0] == row[0]
    per_split = [[key for key, _, split, _ in kept if split == number] for number in range(3)]
    train, validation, test = map(set, per_split)
    if policy in (Duplicates.OUT_OF_TEST, Duplicates.DROP):
        assert not train & test
        assert not train & validation
        assert not validation & test
        assert len(per_split[TEST]) == len(test)
        assert len(per_split[VALIDATION]) == len(validation)
    if policy is Duplicates.DROP:
        assert len(per_split[TRAIN]) == len(train)
    if policy is Duplicates.OUT_OF_TRAIN:
        assert not train & (test | validation)
    whole = [(row, twin) for row, twin in zip(table, twins, strict=True) if row[3]]
    untouched = {
        Duplicates.KEEP: SPLITS,
        Duplicates.ONE_SPLIT: SPLITS,
        Duplicates.OUT_OF_TEST: ("train",),
        Duplicates.OUT_OF_TRAIN: SPLITS[1:],
        Duplicates.DROP: (),
    }
    assert all(twin < 0 for row, twin in whole if SPLITS[row[2]] in untouched[policy])
    assert {row[0] for row in kept} == {row[0] for row in table}, "no design is lost altogether"


def test_the_command_line_offers_what_there_is() -> None:
    assert [choice.value for choice in DuplicatesChoice] == [policy.value for policy in OFFERED]


def _gather(keys: list[int], splits: list[int]) -> tuple[list[int], list[int]]:
    placed, leaders = into_one_split(np.array(keys, dtype=np.uint64), np.array(splits, dtype=np.uint8))
    return placed.tolist(), leaders.tolist()


def test_equal_designs_go_to_train_and_then_to_test() -> None:
    keys = [1, 1, 1, 2, 2, 3, 4, 5]
    splits = [TEST, TRAIN, VALIDATION, VALIDATION, TEST, TEST, VALIDATION, TRAIN]
    placed, leaders = _gather(keys, splits)
    assert placed == [TRAIN, TRAIN, TRAIN, TEST, TEST, TEST, VALIDATION, TRAIN]
    assert leaders == [1, 1, 1, 4, 4, 5, 6, 7]


def test_a_split_that_would_be_left_empty_takes_its_design_from_train() -> None:
    assert _gather([1, 1, 1, 2], [TRAIN, TEST, TRAIN, TRAIN]) == ([TEST, TEST, TEST, TRAIN], [1, 1, 1, 3])
    # Unless train would be empty then.
    assert _gather([1, 1], [TRAIN, TEST])[0] == [TRAIN, TRAIN]


@given(rows=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=40))
def test_no_design_lies_in_two_splits_and_none_is_lost(rows: list[tuple[int, int]]) -> None:
    keys, splits = [key for key, _ in rows], [split for _, split in rows]
    placed, leaders = _gather(keys, splits)
    assert len({(key, split) for key, split in zip(keys, placed, strict=True)}) == len(set(keys))
    for row, leader in enumerate(leaders):
        assert keys[leader] == keys[row]
        assert placed[row] == splits[leader]
    if len(set(keys)) >= 20:
        assert set(placed) == set(splits)


# ------------------------------------------------------------------------------------------------------------------ on disk

NUMBER = 400


def _write(out: Path, policy: Duplicates, *, num_chunks: int = 8) -> Manifest:
    """A dataset in which part k has the design k % 90; parts 0-299 are in train, then 50 in validation and 50 in test."""
    with DatasetWriter(out, replace(plain_plan(), duplicates=policy), num_chunks) as writer:
        writer.begin()
        size = NUMBER // num_chunks
        for number in range(num_chunks):
            with writer.chunk(number) as chunk:
                for k in range(number * size, (number + 1) * size):
                    split = "train" if k < 300 else "validation" if k < 350 else "test"
                    # Designs 80 to 89 are in validation and test alone.
                    design = k % 80 if k < 300 else k % 90
                    chunk.add(replace(plain_row(k), sequence=f"S{design}."), split, file=f"{k}.json")
                chunk.note(asdict(LedgerEntry("x", "x.json", "schema", "why", dropped=True)))
        return writer.finish()


def _rows(out: Path, split: str) -> list[tuple[str, str]]:
    dataset = PartDataset.open(out, split)
    samples = [dataset[k] for k in range(len(dataset))]
    for sample in samples:
        np.testing.assert_array_equal(sample.checked_points(), plain_row(int(sample.id[-8:])).points)
    return [(sample.id, sample.sequence) for sample in samples]


def _ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / FAILURES_NAME).read_text().splitlines()]


def test_rows_that_are_left_out_are_gone_and_named(tmp_path: Path) -> None:
    out = tmp_path / "data"
    manifest = _write(out, Duplicates.OUT_OF_TEST)
    rows = {split: _rows(out, split) for split in SPLITS}
    assert len(rows["train"]) == 300
    designs = {split: [sequence for _, sequence in rows[split]] for split in SPLITS}
    # Parts 350 to 359 (designs 80 to 89) are in test only; validation's 300 to 349 have designs 30 to 79.
    assert designs["validation"] == []
    assert sorted(designs["test"]) == [f"S{k}." for k in range(80, 90)]
    assert manifest.counts == {"train": 300, "validation": 0, "test": 10}
    assert manifest.failures == {"duplicate": 90, "schema": 8}
    entries = [entry for entry in _ledger(out) if entry["kind"] == "duplicate"]
    assert len(entries) == 90
    entry = next(entry for entry in entries if entry["id"] == "doc/00000300")
    assert entry == {
        "id": "doc/00000300", "file": "300.json", "kind": "duplicate", "dropped": True,
        "reason": "the same quantized sequence as doc/00000030 in train; left out of validation",
    }  # fmt: skip
    assert not list(out.rglob("*.partial"))
    assert {path.name for path in out.iterdir()} == {"manifest.json", FAILURES_NAME, "costs.parquet", *SPLITS}


def test_rows_that_are_left_out_of_train(tmp_path: Path) -> None:
    manifest = _write(tmp_path / "data", Duplicates.OUT_OF_TRAIN)
    assert manifest.counts["validation"] == manifest.counts["test"] == 50
    rows = {split: {sequence for _, sequence in _rows(tmp_path / "data", split)} for split in SPLITS}
    assert not rows["train"] & (rows["validation"] | rows["test"])


def test_rows_that_move_are_with_their_equals_and_named(tmp_path: Path) -> None:
    out = tmp_path / "data"
    manifest = _write(out, Duplicates.ONE_SPLIT)
    rows = {split: _rows(out, split) for split in SPLITS}
    designs = {split: {sequence for _, sequence in rows[split]} for split in SPLITS}
    assert manifest.counts == {split: len(rows[split]) for split in SPLITS}
    assert sum(manifest.counts.values()) == NUMBER
    assert not designs["train"] & (designs["validation"] | designs["test"])
    assert not designs["validation"] & designs["test"]
    # Validation holds nothing but designs 30 to 79, which train has too: it keeps one of them, whole.
    assert len(designs["validation"]) == 1
    assert designs["test"] == {f"S{k}." for k in range(80, 90)}
    assert sorted(name for split in SPLITS for name, _ in rows[split]) == [f"doc/{k:08d}" for k in range(NUMBER)]
    entries = {entry["id"]: entry for entry in _ledger(out) if entry["kind"] == "moved"}
    assert len(entries) == manifest.notes["moved"]
    assert entries["doc/00000399"] == {
        "id": "doc/00000399", "file": "399.json", "kind": "moved", "dropped": False,
        "reason": "the same quantized sequence as doc/00000039 in train; moved there from test",
    }  # fmt: skip


def test_how_the_rows_were_cut_into_chunks_does_not_matter_to_the_digest(tmp_path: Path) -> None:
    whole = _write(tmp_path / "a", Duplicates.DROP, num_chunks=1)
    parts = _write(tmp_path / "b", Duplicates.DROP, num_chunks=8)
    assert whole.digests == parts.digests
    assert whole.counts == parts.counts == {"train": 80, "validation": 0, "test": 10}


@pytest.mark.parametrize("policy", [Duplicates.OUT_OF_TEST, Duplicates.ONE_SPLIT])
@pytest.mark.parametrize("after", ["write_dataset", "remove_all_but_the_dataset"])
def test_a_finish_that_was_cut_off_is_done_again(
    tmp_path: Path, after: str, policy: Duplicates, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "whole", policy)
    real = getattr(__import__("cadtrain.data.writing.finish", fromlist=[after]), after)

    def stop(*arguments: Any, **more: Any) -> None:
        real(*arguments, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"cadtrain.data.writing.writer.{after}", stop)
        with pytest.raises(KeyboardInterrupt):
            _write(tmp_path / "cut", policy)
    with DatasetWriter(tmp_path / "cut", replace(plain_plan(), duplicates=policy), 8) as writer:
        assert writer.is_finished
        writer.finish()
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "whole", tmp_path / "cut")
    )
    assert first == second
