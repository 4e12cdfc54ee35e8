"""Captions on disk: what is put in comes out, whatever the order and the script."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cadtrain.data.prepare.sources.captions import MOST_FAULTS_PER_FILE, CaptionStore
from cadtrain.data.prepare.sources.omnicad import OmniCadFolder
from cadtrain.errors import DataError


def test_captions_come_back() -> None:
    store = CaptionStore()
    assert store.get("a") is None
    texts = {f"{k % 7:04d}/{k:08d}": f"Caption {k}: 直径 Ø{k} mm\nsecond line" for k in range(500)}
    for part_id, text in texts.items():
        store.add(part_id, text)
    assert {part_id: store.get(part_id) for part_id in texts} == texts
    assert store.get("0000/99999999") is None
    store.add("late", "Added after the first look.")
    assert store.get("late") == "Added after the first look."
    assert len(store) == 501


def test_the_first_of_two_captions_counts_and_another_text_is_a_conflict() -> None:
    store = CaptionStore()
    for part_id, text in [("a", "one"), ("b", "two"), ("a", "one"), ("b", "other"), ("c", "three"), ("b", "third")]:
        store.add(part_id, text)
    assert [store.get(part_id) for part_id in "abc"] == ["one", "two", "three"]
    assert store.conflicts() == [(3, "b"), (5, "b")]


def test_half_a_character_does_no_harm() -> None:
    store = CaptionStore()
    store.add("a", json.loads('"broken \\ud800 escape"'))
    assert store.get("a") == "broken ? escape"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with four designs in two shards."""
    for name in ("0000/a", "0000/b", "0001/c", "0001/d"):
        path = tmp_path / "json" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "txt").mkdir()
    return tmp_path


def _captions(root: Path, name: str, entries: object) -> None:
    (root / "txt" / name).write_text(json.dumps(entries))


def test_a_caption_may_be_in_any_file(root: Path) -> None:
    _captions(root, "0000.json", [{"id": "0001/c", "text caption": " of c "}])
    _captions(root, "all.json", [{"id": "0000/a", "text caption": "of a"}, {"id": "0001/c", "text caption": "again c"}])
    folder = OmniCadFolder.discover(root)
    assert folder.ids == ["0000/a", "0000/b", "0001/c", "0001/d"]
    assert [folder.captions.get(part_id) for part_id in folder.ids] == ["of a", None, "of c", None]
    (fault,) = folder.faults
    assert (fault.id, fault.file, fault.kind) == ("0001/c", "txt/all.json", "bad_caption")


def test_a_file_that_is_wrong_throughout_does_not_fill_the_ledger(root: Path) -> None:
    _captions(root, "0000.json", [{"id": f"0000/{k}"} for k in range(5000)])
    faults = OmniCadFolder.discover(root).faults
    assert len(faults) == MOST_FAULTS_PER_FILE + 1
    assert faults[0].reason == "entry 0: has no key `text caption`; it has id"
    assert faults[-1].reason == "and 4900 more entries without id or text"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, "not readable as JSON (maximum recursion depth exceeded"),
        ('{"0000/a": "of a"}', "a JSON dict where a list of captions belongs"),
        ("", "not readable as JSON (Expecting value"),
    ],
)
def test_a_file_without_captions_says_what_follows(root: Path, content: str, reason: str) -> None:
    (root / "txt" / "0000.json").write_text(content)
    (fault,) = OmniCadFolder.discover(root).faults
    assert fault.kind == "bad_caption_file"
    assert fault.reason.startswith(reason)
    assert fault.reason.endswith("; its parts get captions made from their sequences")
    assert not fault.dropped


def test_an_entry_says_which_keys_it_has_instead(root: Path) -> None:
    _captions(root, "0000.json", [{"id": "0000/a", "text_caption": "of a"}, {"id": "0000/b", "text caption": 7}])
    assert [fault.reason for fault in OmniCadFolder.discover(root).faults] == [
        "entry 0: has no key `text caption`; it has id, text_caption",
        "entry 1: no text under `text caption`: '7'",
    ]


def test_names_come_in_the_order_of_their_paths_however_deep(tmp_path: Path) -> None:
    names = ["b/x", "b-a/x", "a", "b/y/z", "b.c", "10/1", "9/1"]
    for name in names:
        path = tmp_path / "json" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    paths = sorted(f"{name}.json" for name in names)
    assert OmniCadFolder.discover(tmp_path).ids == [path.removesuffix(".json") for path in paths]


def test_the_digest_follows_the_captions(root: Path) -> None:
    before = OmniCadFolder.discover(root).inputs_digest
    assert OmniCadFolder.discover(root).inputs_digest == before
    _captions(root, "0000.json", [])
    assert OmniCadFolder.discover(root).inputs_digest != before


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        OmniCadFolder.discover(tmp_path / "none")


def test_captions_of_no_design_are_counted_by_file(root: Path) -> None:
    _captions(root, "0000.json", [{"id": "0000/a", "text caption": "of a"}, {"id": "0000/z", "text caption": "of z"}])
    _captions(root, "0001.json", [{"id": name, "text caption": "without shard"} for name in ("d", "c")])
    folder = OmniCadFolder.discover(root)
    assert [(fault.id, fault.file, fault.kind, fault.dropped) for fault in folder.faults] == [
        ("", "txt/0000.json", "caption_without_design", False),
        ("", "txt/0001.json", "caption_without_design", False),
    ]
    first, second = (fault.reason for fault in folder.faults)
    assert first == "1 caption is of no design and not used: the first has the id 0000/z, a design's id is 0000/a"
    assert second == "2 captions are of no design and not used: the first has the id d, a design's id is 0001/d"


def test_captions_that_are_all_of_no_design_are_an_error(root: Path) -> None:
    _captions(root, "0000.json", [{"id": name, "text caption": f"of {name}"} for name in ("b", "d")])
    with pytest.raises(
        DataError, match=r"txt: none of the captions \(2\) .*the id b, a design's id is 0000/b.*move `txt` away"
    ):
        OmniCadFolder.discover(root)


def _name_without_text(folder: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/e\xff.json"))
    try:
        path.write_text("{}")
    except OSError as error:  # macOS takes UTF-8 alone
        pytest.skip(f"no such file name here ({error})")
    return path


def test_a_design_whose_name_is_no_text_is_left_out(root: Path) -> None:
    _name_without_text(root / "json" / "0001")
    _name_without_text(root / "txt")
    folder = OmniCadFolder.discover(root)
    assert folder.ids == ["0000/a", "0000/b", "0001/c", "0001/d"]
    unnamed, captions = folder.faults
    assert (unnamed.id, unnamed.file) == (r"0001/e\xff", r"json/0001/e\xff.json")
    assert (unnamed.kind, unnamed.dropped) == ("unreadable", True)
    assert (captions.file, captions.kind) == (r"txt/e\xff.json", "bad_caption_file")
    json.dumps([unnamed.file, captions.file], ensure_ascii=False).encode("utf-8")


def test_only_designs_whose_names_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    _name_without_text(tmp_path / "json")
    with pytest.raises(DataError, match=r"none of the 1 .json files has a name that is UTF-8.*Rename"):
        OmniCadFolder.discover(tmp_path)


@pytest.mark.parametrize("name", ["design.json", "0000/design.json"])
def test_a_flat_folder_is_told_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"Put the designs into a folder `json/` \(a link will do\)"):
        OmniCadFolder.discover(tmp_path)


def test_the_folder_of_designs_and_a_dataset_are_told_apart(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(DataError, match="give the folder that `json` is in"):
        OmniCadFolder.discover(root / "json")
    dataset = tmp_path_factory.mktemp("dataset")
    (dataset / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="a dataset already"):
        OmniCadFolder.discover(dataset)
