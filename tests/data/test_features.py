"""Features on the disk: what is written is read, and whatever is wrong with a folder is said by name."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cadtrain.data.collate import collate
from cadtrain.data.examples import ExampleBuilder, ExampleShape
from cadtrain.data.features import store as store_module
from cadtrain.data.features.manifest import Encoded, FeatureManifest
from cadtrain.data.features.store import FeatureStore, SplitFeatures
from cadtrain.data.features.writer import LEDGER, FeatureWriter
from cadtrain.data.order import draw_views
from cadtrain.data.sample import Sample
from cadtrain.errors import DataError, EnvironmentFault, UsageError

VIEWS = np.array([2, 0, 3, 1])
"""Views of each training sample."""
CLOUDS = np.array([True, True, False, True])


def plan(**changes: Any) -> FeatureManifest:
    """Six views in files of four, six draws of points (two of each of three samples) in files of three; a validation sample."""
    made = FeatureManifest(
        dataset="abc", dataset_path="parts", dtype="bf16", num_points=16, variants=2, seed=0,
        encoded={"image": Encoded("w1", {"kind": "dinov2"}, 3, 8), "point": Encoded("w2", {"kind": "michelangelo"}, 2, 4)},
        rows={"train": {"image": 6, "point": 6}, "validation": {"image": 1, "point": 1}, "test": {"image": 0, "point": 0}},
        rows_per_file={"image": 4, "point": 3},
    )  # fmt: skip
    return replace(made, **changes)


def row(split: str, kind: str, number: int) -> torch.Tensor:
    """What stands in a row."""
    shape = (3, 8) if kind == "image" else (2, 4)
    start = number * 100 + (50 if split == "validation" else 0)
    return torch.arange(start, start + shape[0] * shape[1]).reshape(shape).to(torch.bfloat16)


def write(folder: Path, made: FeatureManifest | None = None, *, overwrite: bool = False) -> list[str]:
    """Write all that is missing; the names of what was."""
    with FeatureWriter(folder, made or plan(), overwrite=overwrite) as writer:
        tasks = list(writer.missing())
        for task in tasks:
            writer.write(task, torch.stack([row(task.split, task.kind, n) for n in range(task.start, task.stop)]))
        writer.finish()
    return [task.name for task in tasks]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "features")
    return tmp_path / "features"


def split(folder: Path, **changes: Any) -> SplitFeatures:
    """The features of the training split."""
    dataset = SimpleNamespace(split="train", num_images=VIEWS, has_points=CLOUDS, **changes)
    return SplitFeatures(FeatureStore.open(folder), dataset)  # type: ignore[arg-type]


def test_a_folder_has_what_its_manifest_says(folder: Path) -> None:
    manifest = FeatureManifest.read(folder)
    assert manifest == replace(plan(), files=manifest.files)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "manifest.json",
        *sorted(manifest.files),
    ]
    assert list(folder.parent.iterdir()) == [folder]
    assert [name for name in manifest.files if name.startswith("train/image")] == [
        "train/image-00000.safetensors", "train/image-00001.safetensors",
    ]  # fmt: skip
    tensors = load_file(folder / "train" / "image-00001.safetensors")
    assert torch.equal(tensors["features"], torch.stack([row("train", "image", 4), row("train", "image", 5)]))
    mode = (folder / "manifest.json").stat().st_mode
    assert (folder / "train" / "image-00001.safetensors").stat().st_mode == mode, "who reads the one may read the other"
    assert (manifest.row_bytes("image"), manifest.total_rows, manifest.total_bytes) == (48, 14, 7 * 48 + 7 * 16)


def test_rows_are_found_by_sample(folder: Path) -> None:
    features = split(folder)
    assert [features.num_views(index) for index in range(4)] == [2, 0, 3, 1]
    assert [features.has_cloud(index) for index in range(4)] == [True, True, False, True]
    found = features.views(2, [0, 2])  # the third and fifth view of all, in two files
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.stack([row("train", "image", 2), row("train", "image", 4)]))
    for epoch, number in ((0, 4), (1, 5), (2, 4), (7, 5)):
        assert torch.equal(features.cloud(3, epoch), row("train", "point", number)[None])
    assert features.dummy("point").shape == (1, 2, 4)
    assert torch.count_nonzero(features.dummy("image")) == 0


def test_validation_has_one_draw_whatever_the_epoch(folder: Path) -> None:
    dataset = SimpleNamespace(split="validation", num_images=np.array([1]), has_points=np.array([True]))
    features = SplitFeatures(FeatureStore.open(folder), dataset)  # type: ignore[arg-type]
    assert torch.equal(features.cloud(0, -1), row("validation", "point", 0)[None])
    assert torch.equal(features.views(0, [0]), row("validation", "image", 0)[None])


def test_a_sample_that_is_not_covered_is_an_error(folder: Path) -> None:
    dataset = SimpleNamespace(split="train", num_images=np.array([2, 0, 3, 2]), has_points=CLOUDS)
    with pytest.raises(DataError, match="6 rows of image features for the train split, whose samples have 7"):
        SplitFeatures(FeatureStore.open(folder), dataset)  # type: ignore[arg-type]


def test_many_threads_read_with_few_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_OPEN_FILES", 1)
    features = split(folder)

    def look(number: int) -> bool:
        index, views, first = ((0, 2, 0), (2, 3, 2), (3, 1, 5))[number % 3]
        view = number % views
        return torch.equal(features.views(index, [view])[0], row("train", "image", first + view)) and torch.equal(
            features.cloud(3, number)[0], row("train", "point", 4 + number % 2)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(400)))
    assert len(features._store._open) == 1


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def test_a_damaged_row_is_named_when_it_is_read(folder: Path) -> None:
    path = folder / "train" / "image-00000.safetensors"
    damage(path, -1)  # the last byte of the last row
    features = split(folder)
    assert features.views(0, [0, 1]).shape == (2, 3, 8)
    with pytest.raises(DataError, match=r"train/image-00000.safetensors: row 3 is damaged") as caught:
        features.views(2, [1])
    assert "cadtrain data encode" in str(caught.value)
    names: list[str] = []
    assert [line.split(": ")[0] for line in FeatureStore.open(folder).check(names.append)] == [str(path)]
    assert names == [task.name for task in plan().tasks()], "all others were read as well"


def sums_offset(path: Path) -> int:
    header = int.from_bytes(path.read_bytes()[:8], "little")
    told = json.loads(path.read_bytes()[8 : 8 + header])
    return 8 + header + int(told["sums"]["data_offsets"][0])


def test_damaged_checksums_and_headers_are_named(folder: Path) -> None:
    path = folder / "train" / "point-00001.safetensors"
    whole = path.read_bytes()
    for at, message in ((sums_offset(path), "row checksums are not those"), (0, "header"), (12, "header is damaged")):
        path.write_bytes(whole)
        damage(path, at)
        with pytest.raises(DataError, match=message) as caught:
            split(folder).cloud(3, 0)
        assert str(path) in str(caught.value)


def test_a_file_of_other_rows_is_named(folder: Path) -> None:
    """One that is whole in itself, but not what the manifest means."""
    other, path = folder / "train" / "point-00000.safetensors", folder / "train" / "point-00001.safetensors"
    shutil.copy(other, path)
    with pytest.raises(DataError, match=r"point-00001.safetensors: its row checksums are not those"):
        split(folder).cloud(3, 0)


def test_short_and_missing_files_are_named_at_once(folder: Path) -> None:
    path = folder / "validation" / "image-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{path}: has {len(whole) - 1} bytes, the manifest says {len(whole)}"):
        FeatureStore.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: cannot be read: No such file"):
        FeatureStore.open(folder)
    path.write_bytes(whole)
    store = FeatureStore.open(folder)
    path.write_bytes(whole[:-1])  # cut off while a run goes on
    with pytest.raises(DataError, match=rf"{path}: ends too early"):
        store.rows("validation", "image", [0])


def test_what_is_no_manifest_of_features_is_said(folder: Path, tmp_path: Path) -> None:
    path = folder / "manifest.json"
    told = json.loads(path.read_text())
    cases = {
        "not readable as JSON": "{",
        "a JSON list": "[]",
        "the manifest of a prepared dataset": json.dumps({"codec": "compact", "format_version": 1}),
        "format version 9, this cadtrain": json.dumps({**told, "format_version": 9}),
        "keys missing: dataset, seed": json.dumps({k: v for k, v in told.items() if k not in ("dataset", "seed")}),
        "not what such a manifest holds": json.dumps({**told, "files": [1]}),
        "no word of train/image-00000.safetensors": json.dumps({**told, "files": {}}),
    }
    for message, text in cases.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            FeatureStore.open(folder)
    with pytest.raises(DataError, match="no such folder"):
        FeatureStore.open(tmp_path / "nowhere")
    (tmp_path / "features.tmp-12").mkdir()
    with pytest.raises(DataError, match="not finished"):
        FeatureStore.open(tmp_path / "features.tmp-12")


def begin(folder: Path, count: int, made: FeatureManifest | None = None) -> tuple[Path, list[str]]:
    """Write the first `count` missing files and stop; the work folder, and their names."""
    with FeatureWriter(folder, made or plan()) as writer:
        tasks = list(writer.missing())[:count]
        for task in tasks:
            writer.write(task, torch.stack([row(task.split, task.kind, n) for n in range(task.start, task.stop)]))
    return writer.work, [task.name for task in tasks]


def test_an_interrupted_writer_leaves_whole_files_and_the_next_one_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "features"
    work, done = begin(out, 3)
    assert not out.exists()
    (work / done[0]).write_bytes(b"short")  # lost in a power cut
    with (work / LEDGER).open("a") as ledger:
        ledger.write('{"name": "train/poi')  # the kill came here
    (work / "train" / "point-00001.safetensors.partial").write_bytes(b"half")
    names = [task.name for task in plan().tasks()]
    assert done == names[:3]
    assert write(out) == [names[0], *names[3:]]
    assert FeatureStore.open(out).check() == []
    assert list(tmp_path.iterdir()) == [out]


def test_a_torn_ledger_line_spoils_no_later_one(tmp_path: Path) -> None:
    out = tmp_path / "features"
    for count in (1, 2):
        work, _ = begin(out, count)
        with (work / LEDGER).open("a") as ledger:
            ledger.write('{"na')
    assert len(write(out)) == 6 - 3


def test_other_encoders_or_data_do_not_go_on_with_the_work(tmp_path: Path) -> None:
    out = tmp_path / "features"
    work, done = begin(out, 1)
    others = (
        {"dataset": "other"}, {"seed": 1}, {"variants": 3}, {"num_points": 17}, {"dtype": "fp16"},
        {"encoded": {**plan().encoded, "image": Encoded("w9", {}, 3, 8)}},
    )  # fmt: skip
    for change in others:
        with FeatureWriter(out, plan(**change)) as other:
            assert other.finished == {}
            assert other.work != work
    with FeatureWriter(out, plan(dataset_path="moved", cadtrain_version="9")) as same:
        assert list(same.finished) == done


def test_a_full_disk_is_said_before_the_first_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_kibibytes(path: Path) -> Any:
        return SimpleNamespace(total=4096, used=2048, free=free)

    monkeypatch.setattr(shutil, "disk_usage", two_kibibytes)
    free = 400
    with pytest.raises(EnvironmentFault, match=r"the features need about 4.* and 400 B are free"):
        write(tmp_path / "features")
    assert not (tmp_path / "features").exists()
    free = 4096
    assert len(write(tmp_path / "features")) == 6, "the lock was given back"


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path / "features", plan()), pytest.raises(UsageError, match="another process is encoding"):
        FeatureWriter(tmp_path / "features", plan()).__enter__()


def test_nothing_but_features_is_replaced(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="these features are already there"):
        FeatureWriter(folder, plan())
    with pytest.raises(UsageError, match="another encoder, dataset or choice of options"):
        FeatureWriter(folder, plan(seed=4))
    (folder / "train" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"holds train/notes.txt, which is no part of features"):
            FeatureWriter(folder, plan(), overwrite=overwrite)
    (folder / "train" / "notes.txt").unlink()
    assert len(write(folder, plan(seed=4), overwrite=True)) == 6
    assert FeatureManifest.read(folder).seed == 4
    assert list(tmp_path.iterdir()) == [folder]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text(json.dumps({"codec": "compact"}))
    with pytest.raises(UsageError, match="is no folder of features"):
        FeatureWriter(mine, plan(), overwrite=True)


class Bytes:
    """A tokenizer of bytes."""

    eos_token_id = 257

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(item.encode()) for item in text]}


SHAPE = ExampleShape(tokens_per_view=3, views=2, image_size=14, point_tokens=2, num_points=16)


def test_examples_and_packs_hold_features_of_the_views_that_would_be_drawn(folder: Path) -> None:
    builder = ExampleBuilder(Bytes(), "Make it.", SHAPE, 5, features=split(folder))
    sample = Sample("a", "a", "a block", "S1,2;E.", None, ())
    example = builder.build(sample, index=2, epoch=1, modalities="text+image")
    chosen = draw_views(5, 1, 2, 3, 2)
    assert torch.equal(example.image_features, torch.stack([row("train", "image", 2 + view) for view in chosen]))  # type: ignore[arg-type]
    assert (example.num_image_tokens, example.pixel_values, example.point_features) == (6, None, None)
    both = builder.build(sample, index=3, epoch=1, modalities="text+point+image")
    assert torch.equal(both.point_features, row("train", "point", 5)[None])  # type: ignore[arg-type]
    pack = collate([example, both], SHAPE, use_images=True, use_points=True, filler_id=257, features=builder.features)
    assert (pack.pixel_values, pack.points) == (None, None)
    assert torch.equal(pack.image_features, torch.cat([example.image_features, both.image_features]))  # type: ignore[list-item, arg-type]
    assert pack.point_features.shape == (1, 2, 4)  # type: ignore[union-attr]
    assert len(pack.image_positions) == 12  # type: ignore[arg-type]
    empty = collate([], SHAPE, use_images=True, use_points=False, filler_id=257, features=builder.features)
    assert empty.image_features.shape == (1, 3, 8)  # type: ignore[union-attr]
    assert (empty.point_features, empty.point_positions) == (None, None)
    assert len(empty.image_positions) == 0  # type: ignore[arg-type]


def test_a_sample_without_the_modality_is_named(folder: Path) -> None:
    builder = ExampleBuilder(Bytes(), "Make it.", SHAPE, 5, features=split(folder))
    sample = Sample("part-7", "a", "a block", "S1,2;E.", None, ())
    with pytest.raises(DataError, match="part-7: the sample has no images"):
        builder.build(sample, index=1, epoch=0, modalities="image")
    with pytest.raises(DataError, match="part-7: the sample has no points"):
        builder.build(sample, index=2, epoch=0, modalities="point")
