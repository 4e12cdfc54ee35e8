"""Writing and reading prepared datasets, and what is said about folders that are none."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from cadtrain.data.manifest import MANIFEST_NAME, SPLITS
from cadtrain.data.shards import PartDataset
from cadtrain.data.writing.writer import DatasetWriter, LedgerEntry
from cadtrain.errors import DataError, UsageError
from tests.data.conftest import plain_plan, plain_row, write_rows


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [plain_row(index, images=(b"one", b"two")[: index % 3]) for index in range(300)]
    path = write_rows(tmp_path / "data", rows, plain_plan())
    by_id = {row.id: row for row in rows}
    seen = set()
    for split in SPLITS:
        dataset = PartDataset.open(path, split)
        for index in range(len(dataset)):
            sample = dataset[index]
            row = by_id[sample.id]
            seen.add(sample.id)
            assert (sample.document, sample.caption, sample.sequence) == (row.document, row.caption, row.sequence)
            assert sample.images == row.images
            assert sample.points is not None
            assert sample.points.dtype == np.float32
            np.testing.assert_array_equal(sample.points, row.points)
        assert dataset.captions() == [by_id[part_id].caption for part_id in dataset.column("id")]
    assert seen == set(by_id)


def test_missing_modalities_are_none_and_empty(tmp_path: Path) -> None:
    rows = [plain_row(index) for index in range(20)]
    rows[::2] = [replace(row, points=None) for row in rows[::2]]
    rows[::5] = [replace(row, images=(b"png",)) for row in rows[::5]]
    path = write_rows(tmp_path / "data", rows, plain_plan())
    for split in SPLITS:
        dataset = PartDataset.open(path, split)
        samples = [dataset[index] for index in range(len(dataset))]
        assert dataset.has_points.tolist() == [sample.points is not None for sample in samples]
        assert dataset.has_images.tolist() == [bool(sample.images) for sample in samples]
        for sample in samples:
            assert (sample.points is None) == (int(sample.id[-8:]) % 2 == 0)


def test_a_dataset_without_points_takes_no_room_for_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data", [plain_row(k, num_points=0) for k in range(40)], plain_plan(num_points=0))
    dataset = PartDataset.open(path, "train")
    assert not dataset.has_points.any()
    assert dataset[0].points is None


def test_points_are_a_view_of_the_file(tmp_path: Path) -> None:
    dataset = PartDataset.open(write_rows(tmp_path / "data", [plain_row(k) for k in range(12)], plain_plan()), "train")
    points = dataset[3].points
    assert points is not None
    assert not points.flags.owndata
    assert not points.flags.writeable


def test_indices(tmp_path: Path) -> None:
    dataset = PartDataset.open(write_rows(tmp_path / "data", [plain_row(k) for k in range(12)], plain_plan()), "train")
    assert dataset[-1].id == dataset[len(dataset) - 1].id
    with pytest.raises(IndexError, match=f"sample {len(dataset)} of a split of {len(dataset)}"):
        dataset[len(dataset)]


def test_a_copy_in_another_process_reads_the_same_and_threads_may_share(synthetic: Path) -> None:
    dataset = PartDataset.open(synthetic, "train")
    payload = pickle.dumps(dataset)
    assert len(payload) < 1000  # the place of the data travels, not the data
    copy = pickle.loads(payload)
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda k: copy[k % len(copy)].sequence, range(200)))
    assert texts == [dataset[k % len(dataset)].sequence for k in range(200)]


def test_hugging_face_datasets_opens_it_and_decodes_the_views(synthetic: Path) -> None:
    loaded = datasets.load_from_disk(str(synthetic / "train"))
    row = loaded[0]
    assert row["images"][0].size == (64, 64)
    assert len(row["points"]) == 256 * 6
    assert loaded.with_format("numpy")[0]["points"].dtype == np.float32


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    rows = [plain_row(index) for index in range(30)]
    first = PartDataset.open(write_rows(tmp_path / "a", rows, plain_plan()), "train").digest
    assert PartDataset.open(write_rows(tmp_path / "b", rows, plain_plan()), "train").digest == first
    for name, change in {"caption": "other", "sequence": "S."}.items():
        changed = [replace(rows[0], **{name: change}), *rows[1:]]
        digests = {
            s: PartDataset.open(write_rows(tmp_path / name, changed, plain_plan()), s).digest for s in SPLITS[:1]
        }
        assert digests["train"] != first
        shutil.rmtree(tmp_path / name)


# ------------------------------------------------------------------------------------------------------ folders that are none


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder.*cadtrain data prepare"):
        PartDataset.open(tmp_path / "none", "train")


def test_some_other_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no manifest.json, but notes.txt"):
        PartDataset.open(tmp_path, "train")


def test_a_raw_omni_cad_folder(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "txt").mkdir()
    with pytest.raises(DataError, match=r"raw Omni-CAD folder.*prepare --root"):
        PartDataset.open(tmp_path, "train")


def test_one_split_instead_of_the_dataset(synthetic: Path) -> None:
    with pytest.raises(DataError, match="Give the dataset itself"):
        PartDataset.open(synthetic / "train", "train")


def test_a_half_written_dataset(tmp_path: Path) -> None:
    out = tmp_path / "data"
    with DatasetWriter(out, plain_plan()) as writer, writer.chunk(0) as chunk:
        chunk.add(plain_row(0), "train")
    (half,) = tmp_path.iterdir()
    with pytest.raises(DataError, match=r"not finished.*goes on where it stopped"):
        PartDataset.open(half, "train")
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"codec_version": 99}, "codec 'compact' version 99, this cadtrain has version"),
        ({"counts": {"train": 1000, "validation": 0, "test": 0}}, r"rows, but manifest.json says 1000"),
    ],
)
def test_manifests_of_another_kind(synthetic: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(synthetic, copy)
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=message):
        PartDataset.open(copy, "train")


def test_a_manifest_that_is_cut_off(synthetic: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(synthetic, copy)
    (copy / MANIFEST_NAME).write_text((copy / MANIFEST_NAME).read_text()[:40])
    with pytest.raises(DataError, match=r"manifest.json: not readable as JSON"):
        PartDataset.open(copy, "train")


def test_a_shard_that_is_cut_off(synthetic: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(synthetic, copy)
    shard = copy / "train" / "data-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"train"):
        PartDataset.open(copy, "train")


def test_an_unknown_split_and_an_unknown_column(synthetic: Path) -> None:
    with pytest.raises(UsageError, match="no split named 'val'"):
        PartDataset.open(synthetic, "val")
    with pytest.raises(UsageError, match="no column named 'colour'"):
        PartDataset.open(synthetic, "train").column("colour")


# ------------------------------------------------------------------------------------------------------------------- writing


def test_a_taken_folder_is_refused_and_replaced_on_demand(tmp_path: Path) -> None:
    out = write_rows(tmp_path / "data", [plain_row(k) for k in range(10)], plain_plan(first=1))
    with pytest.raises(UsageError, match=r"exists and is a dataset made with other options.*--overwrite"):
        DatasetWriter(out, plain_plan(second=1))
    with DatasetWriter(out, plain_plan(second=1), overwrite=True) as writer:
        with writer.chunk(0) as chunk:
            chunk.add(plain_row(0), "train")
        assert PartDataset.open(out, "validation")  # the old one is there until the new one is whole
        writer.finish()
    assert len(PartDataset.open(out, "train")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_two_writers_of_one_dataset(tmp_path: Path) -> None:
    with (
        DatasetWriter(tmp_path / "data", plain_plan()),
        pytest.raises(UsageError, match="another process is writing"),
        DatasetWriter(tmp_path / "data", plain_plan()),
    ):
        pass


def test_an_interrupted_run_goes_on_and_comes_to_the_same(tmp_path: Path) -> None:
    rows = [plain_row(index) for index in range(200)]

    def write(writer: DatasetWriter, number: int) -> None:
        with writer.chunk(number) as chunk:
            for row in rows[number * 50 : (number + 1) * 50]:
                chunk.add(row, "train")
            chunk.note(asdict(LedgerEntry("x", "x.json", "schema", "why", dropped=True)))

    with DatasetWriter(tmp_path / "whole", plain_plan(), 4) as writer:
        for number in range(4):
            write(writer, number)
        whole = writer.finish()

    class PowerCut(RuntimeError):
        pass

    def start() -> None:
        with DatasetWriter(tmp_path / "cut", plain_plan(), 4) as writer:
            for number in (3, 0, 1):  # in any order
                write(writer, number)
            with writer.chunk(2) as chunk:
                chunk.add(rows[100], "train")
                raise PowerCut

    with pytest.raises(PowerCut):
        start()
    with DatasetWriter(tmp_path / "cut", plain_plan(), 4) as writer:
        assert writer.resume() == {"written": 150, "schema": 3}
        assert writer.missing_chunks == [2]
        write(writer, 2)
        manifest = writer.finish()
    assert manifest == whole
    assert manifest.failures == {"schema": 4}
    assert _files(tmp_path / "cut") == _files(tmp_path / "whole")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_chunk_whose_rows_never_reached_the_disk_is_written_again(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", plain_plan(), 2) as writer, writer.chunk(1) as chunk:
        chunk.add(plain_row(1), "train")
    (rows,) = tmp_path.rglob("chunks/*.arrow")
    rows.write_bytes(b"")  # what a power cut leaves of a file on some disks
    with DatasetWriter(tmp_path / "data", plain_plan(), 2) as writer:
        assert not writer.resume()
        assert writer.missing_chunks == [0, 1]


def test_nothing_usable_is_an_error_that_counts(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", plain_plan()) as writer:
        with writer.chunk(0) as chunk:
            chunk.note(asdict(LedgerEntry("a", "json/a.json", "schema", "no sequence", dropped=True)))
        with pytest.raises(
            DataError, match=r"1 × schema; the first: json/a.json: no sequence.*data.failures.jsonl has"
        ):
            writer.finish()
    (ledger,) = tmp_path.iterdir()
    assert ledger.name == "data.failures.jsonl"
    assert json.loads(ledger.read_text())["file"] == "json/a.json"
