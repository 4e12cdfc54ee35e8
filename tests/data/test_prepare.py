"""From an Omni-CAD folder to a dataset: layouts, what is taken, what is made, what is left out and why."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cadtrain.cad.codec import get_codec
from cadtrain.cad.formats.deepcad import to_deepcad_json
from cadtrain.data.manifest import FAILURES_NAME, SPLITS, Manifest
from cadtrain.data.prepare.parts import PartTask, PrepareOptions, build_part, prepare
from cadtrain.data.prepare.sources.clouds import find_cloud, read_cloud
from cadtrain.data.prepare.sources.pictures import find_pictures
from cadtrain.data.sample import Sample
from cadtrain.data.shards import PartDataset
from cadtrain.data.synth.parts import draw_part
from cadtrain.data.writing.costs import read_costs, summarize_costs
from cadtrain.data.writing.pipeline import Built, Dropped, PrepareProgress, Workers
from cadtrain.errors import DataError, EnvironmentFault, UsageError
from cadtrain.ui.data import summary_text
from tests.data.omni_layout import make_omni_layout

pytestmark = pytest.mark.kernel

OPTIONS = PrepareOptions(num_points=128, num_views=2, image_size=48)
WORKERS = Workers(1, 60.0)


def _write_design(root: Path, part_id: str, index: int = 0) -> Path:
    path = root / "json" / f"{part_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_deepcad_json(draw_part(11, index).sequence)))
    return path


def _task(root: Path, part_id: str, caption: str | None = "A part.", **changes: Any) -> PartTask:
    return PartTask(
        id=part_id,
        document=part_id,
        file=f"json/{part_id}.json",
        design=root / "json" / f"{part_id}.json",
        caption=caption,
        clouds=root / "pcd",
        pictures=root / "img",
        options=replace(OPTIONS, **changes),
    )


def _built(task: PartTask) -> Built:
    built = build_part(task)
    assert isinstance(built, Built), built
    return built


def _png(size: tuple[int, int], color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def _samples(path: Path) -> Iterator[Sample]:
    for split in SPLITS:
        dataset = PartDataset.open(path, split)
        yield from (dataset[index] for index in range(len(dataset)))


def _ledger(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / FAILURES_NAME).read_text().splitlines()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one design, 0000/00000007_00001."""
    _write_design(tmp_path, "0000/00000007_00001")
    return tmp_path


PART = "0000/00000007_00001"


# --------------------------------------------------------------------------------------------------------------- one part


def test_what_is_missing_is_made(root: Path) -> None:
    row = _built(_task(root, PART, caption=None)).row
    assert row.caption
    assert row.caption_source == "described"
    assert row.points is not None
    assert row.points.shape == (128, 6)
    assert row.points.dtype == np.float32
    assert [Image.open(io.BytesIO(data)).size for data in row.images] == [(48, 48)] * 2
    assert row.is_valid
    assert row.is_watertight
    get_codec("compact").decode(row.sequence)


def test_a_part_that_lacks_nothing_needs_no_kernel(root: Path) -> None:
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(500, 6))
    (root / "pcd").mkdir()
    np.save(root / "pcd" / "00000007_00001.npy", cloud)
    (root / "img").mkdir()
    (root / "img" / "00000007_00001_000.png").write_bytes(_png((48, 48), "red"))
    row = _built(_task(root, PART)).row
    assert row.volume is None
    assert len(row.images) == 1


@pytest.mark.parametrize(
    "name", ["0000/00000007_00001.npy", "00000007_00001.npy", "0000/00000007_00001.npz", "00000007_00001.npz"]
)
@pytest.mark.parametrize("channels", [3, 6])
def test_cloud_layouts(root: Path, name: str, channels: int) -> None:
    own = _built(_task(root, PART)).row.points
    assert own is not None
    cloud = own.astype(np.float64)
    cloud[:, :3] = cloud[:, :3] * 17 + [1, 2, 3]  # another scale and place
    path = root / "pcd" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npz"):
        np.savez(path, points=cloud[:, :channels])
    else:
        np.save(path, cloud[:, :channels])
    assert find_cloud(root / "pcd", PART) == path
    built = _built(_task(root, PART))
    assert built.notes == ()
    points = built.row.points
    assert points is not None
    # The same points in another order, in the unit frame of their own box; normals given or looked up on the surface.
    order, own_order = (np.lexsort(array[:, :3].round(3).T) for array in (points, own))
    low, high = own[:, :3].min(axis=0), own[:, :3].max(axis=0)
    expected = (own[:, :3] - (low + high) / 2) * (2 / (high - low).max())
    np.testing.assert_allclose(np.sort(points[:, :3], axis=0), np.sort(expected, axis=0), atol=1e-5)
    agreement = (points[order, 3:] * own[own_order, 3:]).sum(axis=1)
    assert np.mean(agreement > 0.99) > (0.99 if channels == 6 else 0.8)


@pytest.mark.parametrize("key", ["points", "xyz", "arr_0"])
def test_archive_keys(tmp_path: Path, key: str) -> None:
    cloud = np.ones((4, 3))
    np.savez(tmp_path / "a.npz", **{key: cloud})
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.npz"), cloud)


@pytest.mark.parametrize(
    ("cloud", "reason"),
    [
        (np.full((100, 3), np.nan), "100 of 100 points are NaN"),
        (np.zeros((100, 4)), r"a point cloud of shape \[100, 4\]"),
        (np.zeros((0, 3)), r"a point cloud of shape \[0, 3\]"),
        (np.ones((100, 3)), "all 100 points are in one place"),
        (np.array(["a", "b"]), "not of numbers"),
    ],
)
def test_bad_clouds_are_noted_and_made_from_the_design(root: Path, cloud: np.ndarray, reason: str) -> None:
    (root / "pcd").mkdir()
    np.save(root / "pcd" / "00000007_00001.npy", cloud)
    built = _built(_task(root, PART))
    (note,) = built.notes
    assert note.kind == "bad_points"
    assert note.file == "pcd/00000007_00001.npy"
    assert note.reason.endswith("; made from the design instead")
    assert re.search(reason, note.reason)
    assert built.row.points is not None
    assert np.isfinite(built.row.points).all()


@pytest.mark.parametrize("content", [b"", b"not numpy", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_files_that_are_no_cloud(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no readable NumPy array"):
        read_cloud(path)


def test_a_pickled_array_is_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="no readable NumPy array"):
        read_cloud(tmp_path / "a.npy")


def test_a_cloud_of_another_part_is_noticed(root: Path) -> None:
    (root / "pcd").mkdir()
    sphere = np.random.default_rng(0).normal(size=(2000, 3))
    np.save(root / "pcd" / "00000007_00001.npy", sphere / np.linalg.norm(sphere, axis=1, keepdims=True))
    (note,) = _built(_task(root, PART)).notes
    assert (note.kind, note.file) == ("cloud_of_another_part", "pcd/00000007_00001.npy")


@pytest.mark.parametrize(
    "names",
    [
        ["00000007_00001_000.png", "00000007_00001_001.png"],
        ["0000/00000007_00001_000.png", "0000/00000007_00001_001.png"],
        ["0000/00000007_00001/a.png", "0000/00000007_00001/b.png"],
        ["00000007_00001/x_000.png", "00000007_00001/x_001.png"],
        ["00000007_00001_000.jpg", "00000007_00001_003.jpg"],
    ],
)
def test_picture_layouts(root: Path, names: list[str]) -> None:
    for name, color in zip(names, ("red", "blue"), strict=True):
        path = root / "img" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png((100, 80), color))
    assert find_pictures(root / "img", PART) == [root / "img" / name for name in names]
    images = _built(_task(root, PART)).row.images
    pixels = [Image.open(io.BytesIO(data)).getpixel((20, 20)) for data in images]
    assert pixels == [(255, 0, 0), (0, 0, 255)]


def test_a_picture_that_is_none_is_noted_and_the_views_are_made(root: Path) -> None:
    (root / "img").mkdir()
    (root / "img" / "00000007_00001_000.png").write_bytes(b"no picture at all")
    built = _built(_task(root, PART))
    (note,) = built.notes
    assert note.kind == "bad_image"
    assert note.file == "img/00000007_00001_000.png"
    assert "no readable picture" in note.reason
    assert note.reason.endswith("; made from the design instead")
    assert len(built.row.images) == 2


def test_a_picture_that_is_none_is_left_out_where_others_are_there(root: Path) -> None:
    (root / "img").mkdir()
    (root / "img" / "00000007_00001_000.png").write_bytes(b"no picture at all")
    (root / "img" / "00000007_00001_001.png").write_bytes(_png((48, 48), "red"))
    built = _built(_task(root, PART, num_points=0))
    (note,) = built.notes
    assert (note.kind, note.file) == ("bad_image", "img/00000007_00001_000.png")
    assert note.reason.endswith("; left out; 1 other picture is used")
    assert len(built.row.images) == 1


def test_a_cut_off_design_is_dropped_with_its_place(root: Path) -> None:
    path = root / "json" / f"{PART}.json"
    path.write_text(path.read_text()[:300])
    dropped = build_part(_task(root, PART))
    assert isinstance(dropped, Dropped)
    assert dropped.kind == "schema"
    assert "cut off at line 1 column" in dropped.reason


def test_modalities_can_be_left_out(root: Path) -> None:
    row = _built(_task(root, PART, num_points=0, num_views=0)).row
    assert row.points is None
    assert row.images == ()
    assert row.volume is None  # no kernel was needed


# -------------------------------------------------------------------------------------------------------------- whole folders


def _folder(root: Path, count: int) -> list[str]:
    ids = [f"{k % 3:04d}/{k:08d}_{variant:05d}" for k in range(count) for variant in (1, 2)]
    for number, part_id in enumerate(ids):
        _write_design(root, part_id, number)
    return ids


def test_a_folder(tmp_path: Path) -> None:
    root, out = tmp_path / "omni", tmp_path / "out"
    ids = _folder(root, 8)
    (root / "json/0000/00000000_00001.json").write_text('{"entities": {')
    (root / "txt").mkdir()
    (root / "txt/0000.json").write_text(
        json.dumps(
            [{"id": part_id, "text caption": f"Caption of {part_id}"} for part_id in ids]
            + [{"id": 5}, {"id": ids[3], "text caption": " "}]
        )
    )
    (root / "txt/0001.json").write_text('[{"id": "0001/')
    seen: list[PrepareProgress] = []
    summary = prepare(root, out, OPTIONS, WORKERS, progress=seen.append)
    samples = list(_samples(out))
    assert sorted(sample.id for sample in samples) == sorted(set(ids) - {"0000/00000000_00001"})
    assert all(sample.caption == f"Caption of {sample.id}" for sample in samples)
    split_of = {sample.document: split for split in SPLITS for sample in _of(out, split)}
    for split in SPLITS:
        assert all(split_of[sample.document] == split for sample in _of(out, split))
    assert summary.manifest.failures == {"schema": 1}
    ledger = _ledger(out)
    assert {(entry["kind"], entry["dropped"]) for entry in ledger} == {
        ("schema", True), ("bad_caption", False), ("bad_caption_file", False),
    }  # fmt: skip
    (schema,) = [entry for entry in ledger if entry["kind"] == "schema"]
    assert schema["file"] == "json/0000/00000000_00001.json"
    assert seen[-1].done == seen[-1].total == 16
    assert seen[-1].failures == {"schema": 1}

    again = prepare(root, out, OPTIONS, WORKERS)
    assert again.is_reused
    assert again.manifest == summary.manifest
    with pytest.raises(UsageError, match=r"made with other options.*--overwrite"):
        prepare(root, out, replace(OPTIONS, num_points=64), WORKERS)
    time.sleep(0.01)
    _write_design(root, "0000/00000000_00001")
    with pytest.raises(UsageError, match="other options or inputs"):
        prepare(root, out, OPTIONS, WORKERS)


def test_a_name_that_is_no_text_and_captions_of_no_design_end_nothing(tmp_path: Path) -> None:
    root, out = tmp_path / "omni", tmp_path / "out"
    ids = _folder(root, 2)
    name = os.fsdecode(b"odd\xff")
    try:
        shutil.copyfile(root / "json" / f"{ids[0]}.json", root / "json" / f"{name}.json")
    except OSError as error:  # macOS takes UTF-8 alone
        pytest.skip(f"no such file name here ({error})")
    (root / "txt").mkdir()
    captions = [{"id": ids[0], "text caption": "A part."}, {"id": "elsewhere", "text caption": "Another."}]
    (root / "txt/0.json").write_text(json.dumps(captions))
    summary = prepare(root, out, NO_KERNEL, WORKERS)
    assert summary.written == 4
    assert summary.manifest.failures == {"unreadable": 1}
    assert [(entry["id"], entry["file"], entry["kind"]) for entry in _ledger(out)] == [
        (r"odd\xff", r"json/odd\xff.json", "unreadable"), ("", "txt/0.json", "caption_without_design"),
    ]  # fmt: skip


def _of(out: Path, split: str) -> list[Sample]:
    dataset = PartDataset.open(out, split)
    return [dataset[index] for index in range(len(dataset))]


def test_a_limit_is_spread_over_the_folder_and_a_split_file_is_kept_to(tmp_path: Path) -> None:
    root, out = tmp_path / "omni", tmp_path / "out"
    _folder(root, 6)
    split_file = tmp_path / "split.json"
    split_file.write_text(
        json.dumps({"train": ["0000/00000000", "0001/00000001"], "val": ["0002/00000002"], "test": ["0000/00000003"]})
    )
    options = replace(OPTIONS, num_points=0, num_views=0, split_file=split_file, limit=6)
    summary = prepare(root, out, options, WORKERS)
    assert {sample.id[:4] for sample in _samples(out)} == {"0000", "0001", "0002"}
    assert {sample.document for sample in _of(out, "validation")} == {"0002/00000002"}
    assert summary.manifest.failures["not_in_split_file"] == 6 - len(list(_samples(out)))


NO_KERNEL = replace(OPTIONS, num_points=0, num_views=0, duplicates="keep")


def _split(path: Path, **lists: list[str]) -> Path:
    path.write_text(json.dumps(lists))
    return path


def _documents(out: Path) -> dict[str, list[str]]:
    return {split: sorted(set(PartDataset.open(out, split).column("document"))) for split in SPLITS}


def test_omni_cads_own_split(tmp_path: Path) -> None:
    """`raw_train_test_split.json`: base ids, no validation, and parts that are variants of them."""
    root, out = tmp_path / "omni", tmp_path / "out"
    bases = [f"0022/{220825 + k:08d}" for k in range(60)]
    for number, base in enumerate(bases):
        for variant in (1, 2):
            _write_design(root, f"{base}_{variant:05d}", 2 * number + variant)
    file = _split(root / "raw_train_test_split.json", train=bases[6:], test=bases[:6])
    summary = prepare(root, out, replace(NO_KERNEL, split_file=file), WORKERS)
    found = _documents(out)
    assert found["test"] == bases[:6]
    assert found["validation"]
    assert sorted(found["train"] + found["validation"]) == bases[6:]
    assert summary.written == 120
    assert summary.manifest.counts["test"] == 12


def test_deepcads_own_split(tmp_path: Path) -> None:
    """`train_val_test_split.json`: the ids of the parts, which have no variants, in three lists; parts in none are left out."""
    root, out = tmp_path / "deepcad", tmp_path / "out"
    names = [f"{98 + k % 2:04d}/{980012 + k:08d}" for k in range(9)]
    for number, name in enumerate(names):
        _write_design(root, name, number)
    (root / "json").rename(root / "cad_json")
    file = _split(root / "train_val_test_split.json", train=names[:5], validation=names[5:7], test=names[7:8])
    summary = prepare(root, out, replace(NO_KERNEL, split_file=file), WORKERS)
    assert _documents(out) == {"train": sorted(names[:5]), "validation": sorted(names[5:7]), "test": names[7:8]}
    assert summary.manifest.failures == {"not_in_split_file": 1}
    (entry,) = _ledger(out)
    assert (entry["id"], entry["file"]) == (names[8], f"cad_json/{names[8]}.json")


def test_a_split_file_of_another_folder(tmp_path: Path) -> None:
    root = tmp_path / "omni"
    _folder(root, 2)
    file = _split(tmp_path / "split.json", train=["0022/00220825"], test=[])
    with pytest.raises(
        DataError, match=r"split.json: lists none of the 4 parts.*0000/00000000_00001 of document 0000/0000"
    ):
        prepare(root, tmp_path / "out", replace(NO_KERNEL, split_file=file), WORKERS)


def test_a_test_part_that_is_in_train_is_left_out_and_named(tmp_path: Path) -> None:
    root, out = tmp_path / "omni", tmp_path / "out"
    for name, index in {"0000/00000001_00001": 1, "0000/00000002_00001": 1, "0000/00000003_00001": 3}.items():
        _write_design(root, name, index)
    file = _split(tmp_path / "s.json", train=["0000/00000001"], val=[], test=["0000/00000002", "0000/00000003"])
    options = replace(NO_KERNEL, split_file=file)
    summary = prepare(root, out, replace(options, duplicates="out-of-test"), WORKERS)
    assert _documents(out)["test"] == ["0000/00000003"]
    assert summary.manifest.failures == {"duplicate": 1}
    (entry,) = _ledger(out)
    assert entry["file"] == "json/0000/00000002_00001.json"
    assert entry["reason"].startswith("the same quantized sequence as 0000/00000001_00001 in train")
    kept = prepare(root, tmp_path / "kept", replace(options, duplicates="out-of-train"), WORKERS)
    assert kept.manifest.counts == {"train": 0, "validation": 0, "test": 2}
    with pytest.raises(UsageError, match="out-of-test, out-of-train, drop, keep"):
        replace(options, duplicates="perhaps")


def test_what_each_part_took_is_written_down(tmp_path: Path) -> None:
    root, out = tmp_path / "omni", tmp_path / "out"
    ids = _folder(root, 2)
    (root / "json" / f"{ids[0]}.json").write_text("{")
    summary = prepare(root, out, NO_KERNEL, WORKERS)
    costs = read_costs(out)
    assert costs is not None
    assert sorted(costs.column("id").to_pylist()) == sorted(ids)
    assert {row["id"]: row["kind"] for row in costs.to_pylist()}[ids[0]] == "schema"
    assert all(row["seconds"] >= 0 for row in costs.to_pylist())
    assert summary.costs is not None
    assert summary.costs.total_seconds == pytest.approx(sum(costs.column("seconds").to_pylist()), rel=1e-3)
    (out / "costs.parquet").unlink()  # a dataset of an earlier version has none
    assert summarize_costs(out) is None
    assert len(PartDataset.open(out, "train")) + sum(len(PartDataset.open(out, s)) for s in SPLITS[1:]) == 3


def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cadtrain.data.writing.writer.CHUNK_ITEMS", 4)
    root = tmp_path / "omni"
    _folder(root, 5)
    options = replace(OPTIONS, num_views=0)
    whole = prepare(root, tmp_path / "whole", options, WORKERS)

    def stop(state: PrepareProgress) -> None:
        if state.done >= 7:
            raise KeyboardInterrupt

    monkeypatch.setattr("cadtrain.data.writing.progress._TELL_EVERY_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        prepare(root, tmp_path / "out", options, WORKERS, progress=stop)
    assert not (tmp_path / "out").exists()
    rest = prepare(root, tmp_path / "out", options, WORKERS)
    assert rest.resumed == 4
    assert rest.manifest == whole.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["omni", "out", "whole"]


def test_faults_of_earlier_runs_and_captions_are_in_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cadtrain.data.writing.writer.CHUNK_ITEMS", 4)
    monkeypatch.setattr("cadtrain.data.writing.progress._TELL_EVERY_SECONDS", 0.0)
    root, out = tmp_path / "omni", tmp_path / "out"
    ids = sorted(_folder(root, 5))
    (root / "txt").mkdir()
    captions = [{"id": part_id, "text caption": "A part."} for part_id in ids[:3]] + [{"id": ids[3]}]
    (root / "txt/0.json").write_text(json.dumps(captions))
    for part_id in ids:
        picture = root / "img" / f"{part_id}_000.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(_png((48, 48), "red"))
    (root / "img" / f"{ids[0]}_001.png").write_bytes(b"no picture at all")
    options = replace(NO_KERNEL, num_views=2)

    def stop(state: PrepareProgress) -> None:
        if state.done >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(root, out, options, WORKERS, progress=stop)
    rest = prepare(root, out, options, WORKERS)
    assert rest.resumed == 4
    assert rest.notes == Manifest.read(out).notes == {"bad_caption": 1, "bad_image": 1}
    assert rest.manifest.captions == {"described": 7, "file": 3}
    shown = str(summary_text(rest))
    assert "used in spite of a fault: 1 bad_caption, 1 bad_image" in shown
    assert "captions: 3 from files, 7 made from sequences" in shown
    assert prepare(root, out, options, WORKERS).notes == rest.notes
    raw = json.loads((out / "manifest.json").read_text())
    del raw["notes"], raw["captions"]  # as earlier versions wrote it
    (out / "manifest.json").write_text(json.dumps(raw))
    earlier = prepare(root, out, options, WORKERS)
    assert earlier.is_reused
    assert earlier.notes == {}
    assert "captions:" not in str(summary_text(earlier))


def test_a_disk_that_is_too_small_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "omni"
    _folder(root, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(EnvironmentFault, match=r"2 parts need about .* KiB and 1000 B are free.*--num-points"):
        prepare(root, tmp_path / "out", OPTIONS, WORKERS)


def test_a_part_that_takes_too_long_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "omni"
    _write_design(root, "0000/00000001_00001")
    with pytest.raises(DataError, match="1 × time_limit"):
        prepare(root, tmp_path / "out", OPTIONS, Workers(1, 1e-4))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder.*ROOT/json/<shard>"):
        prepare(tmp_path / "none", tmp_path / "out", OPTIONS, WORKERS)
    (tmp_path / "empty" / "json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no .json file in any folder below"):
        prepare(tmp_path / "empty", tmp_path / "out", OPTIONS, WORKERS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").touch()
    with pytest.raises(DataError, match=r"no folder `json`; found a.txt"):
        prepare(tmp_path / "other", tmp_path / "out", OPTIONS, WORKERS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes", [{"num_points": -1}, {"num_views": 9}, {"image_size": 2}, {"limit": 0}, {"codec": "klingon"}]
)
def test_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(OPTIONS, **changes)


# ------------------------------------------------------------------------------------------------------------------ real files


def test_real_files(shared_data: Path, tmp_path: Path) -> None:
    root = make_omni_layout(shared_data, tmp_path / "omni")
    # The small files are the ones that build fast.
    for design in sorted((root / "json").rglob("*.json"), key=lambda path: path.stat().st_size)[24:]:
        design.unlink()
    summary = prepare(root, tmp_path / "out", OPTIONS, WORKERS)
    assert summary.written >= 22
    sources = {
        source for split in SPLITS for source in PartDataset.open(tmp_path / "out", split).column("caption_source")
    }
    assert sources <= {"file", "described"}


@pytest.mark.slow
def test_all_real_files(shared_data: Path, tmp_path: Path) -> None:
    root = make_omni_layout(shared_data, tmp_path / "omni")
    summary = prepare(root, tmp_path / "out", OPTIONS, Workers(2, 120.0))
    assert summary.inputs == 312
    assert summary.written >= 305
    assert Manifest.read(tmp_path / "out").counts == summary.manifest.counts
    shutil.rmtree(tmp_path / "out")
