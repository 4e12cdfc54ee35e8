"""Raw folders, of small made files and of the real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cadtrain.data.inspect import LengthOptions, inspect_path, inspect_raw
from cadtrain.data.inspect.folder import captions_of
from cadtrain.data.inspect.raw import RawScan, without_names
from cadtrain.data.inspect.shares import in_shares
from cadtrain.data.inspect.tally import FaultTally, printable
from cadtrain.errors import DataError
from cadtrain.geometry.sandbox import Failure
from tests.data.inspect.conftest import CUT_PLATE, DISC, PLATE, write_design

BYTES = LengthOptions("byte", "byte", budgets=(40, 1000))


def test_a_folder_with_something_of_everything(raw_folder: Path) -> None:
    scan = inspect_path(raw_folder, BYTES)
    assert isinstance(scan, RawScan)
    report = scan.report
    assert (report.layout, report.files, report.readable, report.refused) == ("omni-cad", 6, 4, 2)
    assert report.designs.operations == {"new": 4, "cut": 1}
    assert report.designs.curves == {"circle": 5, "line": 8}
    assert report.designs.planes == {"+z": 5}
    assert report.designs.extents == {"one_side": 5}
    assert report.modalities == {"none": 4, "text": 1, "text+point+image": 1}
    assert (report.sources.captions, report.sources.captions_without_design) == (3, 1)
    assert (report.sources.clouds, report.sources.pictures) == (1, 1)
    assert [fault.kind for fault in report.sources.caption_faults] == ["bad_caption"]
    assert (report.documents.count, report.documents.with_variants) == (3, 1)
    assert report.duplicates.repeats == report.duplicates.across_documents == 1
    assert report.duplicates.examples[0].names == ("0000/00000002_00001", "0000/00000003_00001")


def test_lengths_are_those_of_the_texts(raw_folder: Path) -> None:
    report = inspect_raw(raw_folder, BYTES).report
    assert report.tokens is not None
    assert report.tokens.sequence is not None
    assert (report.tokens.sequence.min, report.tokens.sequence.max) == (len(DISC), len(CUT_PLATE))
    small, large = report.tokens.budgets
    assert (small.kept, small.dropped) == (2, 2)  # the two discs, of 34 characters
    assert small.kept_with_caption == 2 - (len(DISC) + len("A disc") > 40)
    assert large.kept_with_caption == 4
    assert report.tokens.caption is not None
    assert report.tokens.caption.count == 3


def test_faults_are_grouped_by_place(raw_folder: Path) -> None:
    faults = inspect_raw(raw_folder, BYTES).report.refusals
    assert [(fault.kind, fault.place, fault.count) for fault in faults] == [("schema", "$", 2)]
    reasons = dict(faults[0].examples)
    assert "cut off at line 1" in reasons["0001/00000004_00001"]
    assert "'sequence' is missing" in reasons["0001/00000005_00001"]


def test_a_place_is_written_without_names() -> None:
    place = "$.entities.FZq_0.profiles['a.b]'].loops[3].profile_curves[12].start_point"
    assert without_names(place) == "$.entities.*.profiles.*.loops[*].profile_curves[*].start_point"


def test_a_flat_folder_and_a_file(tmp_path: Path) -> None:
    write_design(tmp_path / "designs/deep/one.json", PLATE)
    os.symlink(tmp_path / "nowhere", tmp_path / "designs/broken.json")
    flat = inspect_raw(tmp_path / "designs", LengthOptions()).report
    assert (flat.layout, flat.readable, flat.refused, flat.tokens) == ("flat", 1, 1, None)
    assert flat.refusals[0].examples[0][0] == "broken"
    single = inspect_raw(tmp_path / "designs/deep/one.json", LengthOptions()).report
    assert (single.layout, single.files, single.readable) == ("file", 1, 1)
    assert single.designs.characters is not None
    assert single.designs.characters.max == len(PLATE)


def test_what_holds_no_designs_is_refused_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        inspect_path(tmp_path / "nowhere", LengthOptions())
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"found notes\.txt"):
        inspect_path(tmp_path, LengthOptions())
    with pytest.raises(DataError, match=r"a \.txt file"):
        inspect_path(tmp_path / "notes.txt", LengthOptions())
    (tmp_path / "data.tmp-0123").mkdir()
    with pytest.raises(DataError, match="not finished"):
        inspect_path(tmp_path / "data.tmp-0123", LengthOptions())


def test_a_limit_is_spread_over_the_folder(raw_folder: Path) -> None:
    scan = inspect_raw(raw_folder, LengthOptions(), limit=2)
    assert scan.ids == ["0000/00000001_00001", "0000/00000003_00001"]
    assert (scan.report.files, scan.report.inspected) == (6, 2)


def test_captions_are_found_for_a_few_parts(raw_folder: Path) -> None:
    folder = inspect_raw(raw_folder, LengthOptions()).folder
    assert captions_of(folder, {"0000/00000002_00001", "0000/00000001_00002"}) == {"0000/00000002_00001": "A disc"}


def test_examples_hold_no_control_characters() -> None:
    assert printable("a\x1b[31mb\udcff\n") == "a\ufffd[31mb?\n"


def test_kinds_of_faults_are_bounded() -> None:
    tally = FaultTally()
    for number in range(1000):
        tally.add("schema", f"$.{number}", "file", "reason")
    faults = tally.faults()
    assert sum(fault.count for fault in faults) == tally.total == 1000
    assert len(faults) == 201
    assert (faults[0].place, faults[0].count) == ("elsewhere", 800)


def _sum_unless_7(share: list[int]) -> int:
    if 7 in share:
        os._exit(9)
    return sum(share)


def _lost(number: int, failure: Failure) -> int:
    assert failure.kind == "crashed"
    return -number


def test_an_input_that_kills_its_worker_costs_only_itself() -> None:
    done: list[int] = []
    results = in_shares(_sum_unless_7, range(10), share_size=4, workers=1 + 1, lost=_lost, done=done.append)
    assert list(results) == [0 + 1 + 2 + 3, 4, 5, 6, -7, 8 + 9]
    assert done == [4, 4, 2]


def test_many_workers_count_as_one_does(raw_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = inspect_raw(raw_folder, BYTES)
    monkeypatch.setattr("cadtrain.data.inspect.raw.FEWEST_FOR_WORKERS", 1)
    monkeypatch.setattr("cadtrain.data.inspect.raw.SHARE_SIZE", 2)
    together = inspect_raw(raw_folder, BYTES, workers=2)
    assert together.tally == alone.tally
    assert together.report.refusals == alone.report.refusals
    assert together.report.tokens == alone.report.tokens


def test_the_real_folder(shared_data: Path) -> None:
    report = inspect_raw(shared_data / "cad-mllm-model-outputs", BYTES).report
    assert (report.files, report.refused) == (48, 4)
    places = {fault.place for fault in report.refusals}
    assert places == {"$", "$.entities.*", "$.entities.*.profiles.*.loops[*].profile_curves"}
    assert json.dumps(report.refusals[0].examples)
