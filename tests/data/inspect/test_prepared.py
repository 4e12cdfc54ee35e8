"""Prepared datasets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cadtrain.data.inspect import LengthOptions, PreparedScan, inspect_dataset, inspect_path
from cadtrain.data.shards import PartDataset
from cadtrain.data.writing.blocks import Cost
from cadtrain.data.writing.costs import CostsFile
from cadtrain.data.writing.writer import LedgerEntry
from cadtrain.errors import DataError
from tests.data.conftest import plain_plan, plain_row, write_rows
from tests.data.inspect.conftest import CUT_PLATE, DISC, PLATE


def _dataset(out: Path, texts: list[str], **changes: object) -> Path:
    rows = [
        replace(plain_row(i), sequence=text, num_steps=1 + text.count("\n"), **changes) for i, text in enumerate(texts)
    ]
    entries = (
        LedgerEntry("a/b", "json/a/b.json", "boolean", "the kernel gave up", dropped=True),
        LedgerEntry("a/c", "img/c.png", "bad_image", "no picture", dropped=False),
    )
    return write_rows(out, rows, plain_plan(), entries)


def test_a_dataset_is_counted(synthetic: Path) -> None:
    scan = inspect_path(synthetic, LengthOptions("byte", "byte", budgets=(64,)))
    assert isinstance(scan, PreparedScan)
    report = scan.report
    assert report.samples == report.inspected == report.documents.count == 16
    assert {name for split in report.splits.values() for name in split.modalities} == {"text+point+image"}
    sequences = [text for split in scan.splits.values() for text in split.dataset.column("sequence")]
    assert report.tokens is not None
    assert report.tokens.budgets[0].kept == sum(len(text) <= 64 for text in sequences)
    assert sum(report.tokens.budgets[0].kept_by_split.values()) == report.tokens.budgets[0].kept
    assert report.designs.characters is not None
    assert report.designs.characters.max == max(map(len, sequences))
    assert sum(report.designs.operations.values()) == sum(text.count("\n") + 1 for text in sequences)


def test_leaks_repeats_and_the_ledger(tmp_path: Path) -> None:
    out = _dataset(tmp_path / "data", [PLATE] * 12 + [DISC, CUT_PLATE])
    report = inspect_dataset(out, LengthOptions()).report
    outside = {split: PartDataset.open(out, split).column("sequence").count(PLATE) for split in ("validation", "test")}
    assert report.leaks == outside
    assert sum(outside.values()) >= 1
    assert all(leak.split in outside and leak.id != leak.train_id for leak in report.leak_examples)
    assert (report.duplicates.repeats, report.duplicates.groups, report.duplicates.largest) == (11, 1, 12)
    assert (report.failures, report.repairs) == ({"boolean": 1}, {"bad_image": 1})
    assert [(fault.kind, fault.dropped, fault.examples) for fault in report.ledger] == [
        ("boolean", True, (("json/a/b.json", "the kernel gave up"),)),
        ("bad_image", False, (("img/c.png", "no picture"),)),
    ]


def test_a_sequence_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    report = inspect_dataset(_dataset(tmp_path / "data", [PLATE, "S9."]), LengthOptions("byte", "byte")).report
    assert [(fault.kind, fault.count) for fault in report.undecodable] == [("grammar", 1)]
    assert report.designs.steps is not None
    assert report.designs.steps.count == 1


def test_costs_are_shown_where_they_are_known(tmp_path: Path) -> None:
    out = _dataset(tmp_path / "data", [PLATE, DISC])
    assert inspect_dataset(out, LengthOptions()).report.seconds is None
    with CostsFile(out / "costs.parquet") as costs:
        costs.write([Cost("a", None, 0.25, None), Cost("b", "time_limit", 60.0, 512.0)])
    report = inspect_dataset(out, LengthOptions()).report
    assert report.seconds is not None
    assert (report.seconds.count, report.seconds.max) == (2, 60.0)
    assert report.peak_memory_mib is not None
    assert (report.peak_memory_mib.count, report.peak_memory_mib.median) == (1, 512.0)


def test_a_limit_bounds_the_sequences_that_are_read(synthetic: Path) -> None:
    report = inspect_dataset(synthetic, LengthOptions(), limit=6).report
    assert report.samples == 16
    assert report.designs.steps is not None
    assert report.designs.steps.count == report.inspected < 9


@pytest.mark.parametrize("line", ["{}", "[" * 100_000], ids=["empty", "nested"])
def test_a_damaged_ledger_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    out = _dataset(tmp_path / "data", [PLATE])
    with (out / "failures.jsonl").open("a") as ledger:
        ledger.write(f"{line}\n")
    with pytest.raises(DataError, match=r"failures\.jsonl:3: no entry of a ledger"):
        inspect_dataset(out, LengthOptions())


def test_a_manifest_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    out = _dataset(tmp_path / "data", [PLATE])
    (out / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"manifest\.json: not readable as JSON"):
        inspect_dataset(out, LengthOptions())
