"""Where a dataset goes: what may be replaced, what never is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cadtrain.data.prepare.inputs import PrepareOptions
from cadtrain.data.prepare.parts import prepare, prepare_shard
from cadtrain.data.writing.merge import merge
from cadtrain.data.writing.pipeline import Workers, run, run_shard
from cadtrain.data.writing.share import Shard
from cadtrain.errors import CadtrainError, UsageError
from tests.data.cheap_job import cheap_job, files_of, make

COUNT = 8


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refused(out: Path, message: str, count: int = COUNT) -> None:
    """With `--overwrite` and without, whole and in shards; nothing is touched, and `--overwrite` is not offered."""
    before = _contents(out.parent)
    for overwrite in (True, False):
        with pytest.raises(UsageError, match=message) as error:
            run(cheap_job(out, count), out, overwrite=overwrite)
        assert "--overwrite" not in str(error.value)
        with pytest.raises(UsageError, match=message):
            run_shard(cheap_job(out, count), out, Shard(0, 2), overwrite=overwrite)
    assert _contents(out.parent) == before


def test_a_folder_of_someone_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("years of work")
    _refused(out, r"exists and holds chapter\.tex, which is no part of a dataset")


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "notes"
    out.write_text("years of work")
    _refused(out, "is a file, not a folder")


@pytest.mark.parametrize("entry", ["notes.txt", "more/notes.txt", "train/notes.txt", "costs.parquet.bak"])
def test_a_dataset_with_something_beside_it_is_not_replaced(tmp_path: Path, entry: str) -> None:
    out = tmp_path / "out"
    make(out, cheap_job(out, COUNT))
    (out / entry).parent.mkdir(exist_ok=True)
    (out / entry).write_text("years of work")
    first = entry if entry.startswith("train") else entry.split("/")[0]
    _refused(out, f"holds {first}", COUNT + 1)


@pytest.mark.parametrize("text", ['{"name": "an app", "icons": []}', "[]", "{", ""])
def test_another_manifest_makes_no_dataset(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(text)
    _refused(out, "its manifest.json is not that of one")


def test_split_folders_alone_make_no_dataset(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "train").mkdir(parents=True)
    _refused(out, "it has no manifest.json")


def test_a_dataset_of_any_version_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run(cheap_job(out, COUNT), out)
    raw = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(raw | {"format_version": 0}))
    assert run(cheap_job(out, COUNT + 1), out, overwrite=True).written == COUNT + 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def come(_: object) -> None:
        out.mkdir(exist_ok=True)
        (out / "chapter.tex").write_text("years of work")

    with pytest.raises(CadtrainError, match=r"is finished, in .*tmp-.*holds chapter\.tex.*Move that away"):
        run(cheap_job(out, COUNT), out, overwrite=True, progress=come)
    assert (out / "chapter.tex").read_text() == "years of work"
    (out / "chapter.tex").unlink()
    assert run(cheap_job(out, COUNT), out).written == COUNT


def test_the_same_dataset_is_said_to_be_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, cheap_job(out, COUNT))
    before = files_of(out)
    for index in range(2):
        run_shard(cheap_job(out, COUNT), out, Shard(index, 2), overwrite=True)
    with pytest.raises(UsageError, match=r"already there, made with the same options.*--overwrite"):
        merge(out)
    assert merge(out, overwrite=True).written == COUNT
    assert files_of(out) == before


def test_a_dataset_that_came_meanwhile_leaves_the_work_finished(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    make(other, cheap_job(other, COUNT + 1))

    def come(_: object) -> None:
        if other.exists():
            other.rename(out)

    with pytest.raises(CadtrainError, match=r"is finished, in .*out\.tmp-.*same command with `--overwrite`") as error:
        run(cheap_job(out, COUNT), out, progress=come)
    assert error.value.exit_code == 4  # it could start, and did
    with pytest.raises(CadtrainError, match=r"is finished, in "):
        run(cheap_job(out, COUNT), out)
    begun = (tmp_path / "out.log").read_text()
    assert run(cheap_job(out, COUNT), out, overwrite=True).written == COUNT
    assert (tmp_path / "out.log").read_text() == begun  # nothing was made again


def test_two_runs_with_other_options_are_kept_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    met: list[str] = []

    def during(_: object) -> None:
        if not met:
            with pytest.raises(
                UsageError, match=r"other options or inputs to the same place now, in .*out\.tmp-"
            ) as error:
                run(cheap_job(out, COUNT + 1), out, overwrite=True)
            met.append(str(error.value))

    assert run(cheap_job(out, COUNT), out, progress=during).written == COUNT
    assert met


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("omni", "is the raw folder itself"),
        ("omni/../omni", "is the raw folder itself"),
        (".", "holds the raw folder"),
        ("link", "is the raw folder itself"),
        ("omni/json", "overlaps with the raw folder's json/"),
        ("omni/json/0000/new", "overlaps with the raw folder's json/"),
        ("omni/txt/new", "overlaps with the raw folder's txt/"),
        ("elsewhere", "overlaps with the raw folder's pcd/"),
    ],
)
def test_the_inputs_are_never_the_output(tmp_path: Path, name: str, message: str) -> None:
    root = tmp_path / "omni"
    for folder in ("omni/json/0000", "omni/txt", "elsewhere/clouds"):
        (tmp_path / folder).mkdir(parents=True)
    (root / "pcd").symlink_to(tmp_path / "elsewhere/clouds")
    (root / "json/0000/00000001_00001.json").write_text("{}")
    (tmp_path / "link").symlink_to(root)
    before = _contents(tmp_path)
    options = PrepareOptions(num_points=0, num_views=0)
    for overwrite in (True, False):
        with pytest.raises(UsageError, match=message):
            prepare(root, tmp_path / name, options, Workers(1, 60.0), overwrite=overwrite)
        with pytest.raises(UsageError, match=message):
            prepare_shard(root, tmp_path / name, options, Workers(1, 60.0), Shard(0, 2), overwrite=overwrite)
    assert _contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------------- names of the output


@pytest.mark.parametrize("dangling", [True, False])
def test_a_linked_output_is_made_where_the_link_leads(tmp_path: Path, dangling: bool) -> None:
    disk, home = tmp_path / "big disk", tmp_path / "home"
    disk.mkdir()
    home.mkdir()
    if not dangling:
        make(disk / "data", cheap_job(tmp_path / "first", COUNT + 1))
    out = home / "out"
    out.symlink_to(disk / "data")
    seen: set[str] = set()

    def look(_: object) -> None:
        seen.update(path.name.split("-")[0] for path in tmp_path.glob("*/*"))

    summary = run(cheap_job(tmp_path / "job", COUNT), out, overwrite=not dangling, progress=look)
    assert summary.out == out
    assert "data.tmp" in seen
    assert "out.tmp" not in seen
    assert out.is_symlink()
    assert not (disk / "data").is_symlink()
    assert [path.name for path in disk.iterdir()] == ["data"]
    assert run(cheap_job(tmp_path / "job", COUNT), out).is_reused
    assert merge(out).is_reused


def test_shards_into_a_linked_output(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "real")
    run_shard(cheap_job(tmp_path / "job", COUNT), tmp_path / "out", Shard(0, 1))
    assert not (tmp_path / "real").exists()
    assert merge(tmp_path / "out").written == COUNT
    assert (tmp_path / "real" / "manifest.json").is_file()


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(cheap_job(tmp_path / "job", COUNT), Path()).written == COUNT
    assert (tmp_path / "here" / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["/", "/..", "circle"])
def test_names_that_no_dataset_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UsageError, match=r"root of a disk|leads to itself"):
        run(cheap_job(tmp_path / "job", COUNT), tmp_path / name, overwrite=True)
    with pytest.raises(UsageError, match=r"root of a disk|leads to itself"):
        merge(tmp_path / name)
