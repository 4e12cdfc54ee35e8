"""Array jobs: each process does its share, and the merged dataset is the one that a single process would have made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cadtrain.cli.data import app
from cadtrain.data.writing.blocks import Record
from cadtrain.data.writing.merge import merge
from cadtrain.data.writing.pipeline import PrepareProgress, ShardSummary, Summary
from cadtrain.data.writing.share import Shard
from cadtrain.errors import DataError, UsageError
from tests.data.cheap_job import CheapTask, cheap_job, files_of, make

ROOT = Path(__file__).resolve().parents[2]
COUNT = 320


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    make(out, cheap_job(out, COUNT))
    return files_of(out)


def _shard(out: Path, name: str) -> ShardSummary:
    summary = make(out, cheap_job(out, COUNT), name)
    assert isinstance(summary, ShardSummary)
    return summary


def test_shards_of_several_processes_at_once(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.data.cheap_job", str(out), str(COUNT), "1", "20"]
    processes = [subprocess.Popen([*command, f"{index}/2"], cwd=ROOT) for index in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert not out.exists()
    summary = merge(out)
    assert summary.written == COUNT
    assert files_of(out) == whole
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]
    assert merge(out).is_reused


def test_what_is_missing_is_named_and_can_be_made_up_for(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"nothing to merge.*--shard 0/4"):
        merge(out)
    first = _shard(out, "0/3")
    assert (first.inputs, first.written, first.blocks_left, first.num_blocks) == (128, 128, 3, 5)

    def stop(state: PrepareProgress) -> None:
        if state.done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(out, cheap_job(out, COUNT, seconds=0.01), "1/3", progress=stop)
    with pytest.raises(DataError) as error:
        merge(out)
    assert (
        "3 of 5 blocks are missing: shard 1/3 lacks 2 of 2 blocks; shard 2/3 lacks 1 of 1 blocks (never begun)"
        in str(error.value)
    )
    assert 32 <= _shard(out, "1/3").resumed < 128
    assert _shard(out, "0/3").resumed == 128  # nothing is done twice
    last = _shard(out, "2/3")
    assert last.blocks_left == 0
    merge(out)
    assert files_of(out) == whole


def test_a_run_without_shard_does_what_is_left(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    _shard(out, "1/2")
    summary = make(out, cheap_job(out, COUNT))
    assert isinstance(summary, Summary)
    assert summary.resumed == 128
    assert files_of(out) == whole


def test_more_shards_than_blocks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    summaries = [make(out, cheap_job(out, 100), f"{index}/4") for index in range(4)]
    assert [summary.inputs for summary in summaries] == [64, 36, 0, 0]
    assert merge(out).written == 100


def test_shards_with_other_options_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, cheap_job(out, 40), "0/2")
    make(out, cheap_job(out, 40, views=3), "1/2")
    with pytest.raises(DataError) as error:
        merge(out)
    text = str(error.value)
    assert "different options or inputs, in 2 folders" in text
    assert "shards 0/2; views None" in text
    assert "shards 1/2; views 3" in text


def test_shards_of_another_version_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, cheap_job(out, 0), "0/1")
    (plan,) = tmp_path.glob("out.tmp-*/plan.json")
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"fingerprint": "0123456789abcdef"}))
    with pytest.raises(DataError, match="written by another version"):
        merge(out)


def test_writers_that_would_meet_are_kept_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def intrude(shard: str | None) -> None:
        make(out, cheap_job(out, COUNT), shard)

    met: list[str] = []

    def during(state: PrepareProgress) -> None:
        if not met:
            for other in ("0/2", "1/3", None):
                with pytest.raises(UsageError, match=r"another process is writing shard 0/2 of this dataset now"):
                    intrude(other)
                met.append(str(other))
            with pytest.raises(UsageError, match="another process is writing shard 0/2"):
                merge(out)
            _shard(out, "1/2")  # a shard of the same count may run beside it

    make(out, cheap_job(out, COUNT), "0/2", progress=during)
    assert met == ["0/2", "1/3", "None"]
    merge(out)


def test_a_finished_dataset_is_left_as_it_is_and_another_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, cheap_job(out, 40))
    again = make(out, cheap_job(out, 40), "0/2")
    assert isinstance(again, Summary)
    assert again.is_reused
    with pytest.raises(UsageError, match="--overwrite"):
        make(out, cheap_job(out, 41), "0/2")


@pytest.mark.parametrize("text", ["", "3", "4/4", "a/2", "-1/2", "1/0", "1/2/3", "0/4 "])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--shard.*i from 0 to n-1"):
        Shard.parse(text)


def test_every_block_is_in_one_shard() -> None:
    for count in (1, 2, 3, 7, 40):
        dealt = [block for index in range(count) for block in range(40)[index::count]]
        assert sorted(dealt) == list(range(40))


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "no folder yet" / "out [v1]*"  # nothing in a name is a pattern
    found = CliRunner().invoke(app, ["merge", str(out)])
    assert isinstance(found.exception, DataError)
    make(out, cheap_job(out, 40), "0/1")
    shown = CliRunner().invoke(app, ["merge", str(out), "--json"])
    assert shown.exit_code == 0, shown.exception
    assert sum(json.loads(shown.stdout)["manifest"]["counts"].values()) == 40
    assert "one dataset already; no finished shards" in CliRunner().invoke(app, ["merge", str(out)]).stdout


def test_work_of_other_options_is_named_and_stops_no_merge(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, cheap_job(out, 80))
    (tmp_path / "out").rename(tmp_path / "kept")
    make(out, cheap_job(out, 81), "0/2")
    (tmp_path / "kept").rename(tmp_path / "out")
    shown = CliRunner().invoke(app, ["merge", str(out)])
    assert shown.exit_code == 0, shown.exception
    words = " ".join(shown.stdout.split())
    assert "one dataset already" in words
    assert "was left by a run with other options: delete it if not wanted" in words
    values = json.loads(CliRunner().invoke(app, ["merge", str(out), "--json"]).stdout)
    assert values["leftovers"][0]["num_bytes"] > 0
    assert [left.folder.name[:8] for left in make(out, cheap_job(out, 80)).leftovers] == ["out.tmp-"]  # type: ignore[union-attr]


def test_work_that_was_begun_before_caption_sources_were_kept_is_read() -> None:
    record = Record.parse({"rows": [["a", "a.json", 0, "00", "01", "02", 1]], "entries": [], "costs": []})
    assert [(row.id, row.is_whole, row.caption_source) for row in record.rows] == [("a", True, "")]


def test_a_task_knows_its_document() -> None:
    assert CheapTask(3, "x").document == CheapTask(3, "x").id == "doc/00000003"
