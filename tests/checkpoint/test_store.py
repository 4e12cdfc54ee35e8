"""A save is a transaction, a load verifies first; retention by the exact list of what stays."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cadtrain.checkpoint.layout import checkpoint_name, list_steps, step_of, write_atomically
from cadtrain.checkpoint.manifest import Manifest
from cadtrain.checkpoint.retention import Retention, steps_to_remove
from cadtrain.checkpoint.shard_writer import ShardSink
from cadtrain.checkpoint.store import CheckpointStore, verify
from cadtrain.distributed import Place
from cadtrain.errors import CheckpointError
from cadtrain.logs import start_logging

FACTS = {"zero_stage": 2, "precision": "fp32", "versions": {"torch": "2.13"}}


def store_in(run_dir: Path, keep_last: int = 10) -> CheckpointStore:
    return CheckpointStore(run_dir, place=Place(), retention=Retention(keep_last), facts=FACTS)


def write_shards(text: str) -> Callable[[Path, ShardSink], None]:
    """Shards as DeepSpeed names them, and the script that it leaves beside them."""

    def write(folder: Path, sink: ShardSink) -> None:
        sink(folder / "mp_rank_00_model_states.pt", {"text": text})
        sink(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"text": text * 2})
        (folder.parent / "zero_to_fp32.py").write_text("print('code')")

    return write


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, {"step": step}, config_text=f"name: run{step}\n", write_engine=write_shards(f"weights {step} ")).path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_save_holds_everything_and_no_code(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    folder = save(store, 12)
    assert folder == tmp_path / "checkpoints" / "step-00000012"
    assert set(contents(folder)) == {
        "manifest.json", "state.json", "config.yaml", "engine/mp_rank_00_model_states.pt",
        "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    }  # fmt: skip
    assert json.loads((folder / "state.json").read_text()) == {"step": 12}
    manifest = Manifest.read(folder)
    assert set(manifest.files) == set(contents(folder)) - {"manifest.json"}, "every file is under the manifest"
    assert (manifest.step, manifest.world_size, manifest.zero_stage) == (12, 1, 2)
    assert verify(folder) == []
    assert (store.root / "latest").read_text() == "step-00000012\n"
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "step-00000012"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("NCCL is gone"), CheckpointError("no shard")])
def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    store = store_in(tmp_path, keep_last=1)
    save(store, 10)
    before = contents(store.root)

    def fail(folder: Path, sink: ShardSink) -> None:
        sink(folder / "mp_rank_00_model_states.pt", {"text": "half"})
        raise error

    with pytest.raises(CheckpointError, match=r"rank 0.*while writing its shards") as caught:
        store.save(20, {"step": 20}, config_text="", write_engine=fail)
    assert "Earlier checkpoints are untouched" in (caught.value.hint or "")
    after = contents(store.root)
    assert {name: data for name, data in after.items() if ".tmp/" not in name} == before
    assert list_steps(store.root) == [10]
    assert store.newest() == store.root / "step-00000010"


@pytest.mark.parametrize(
    ("error", "is_loud"),
    [
        (CheckpointError("it needs about 3.0 GiB, 1.0 GiB are free"), False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), False),
        (RuntimeError("NCCL is gone"), True),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), True),
    ],
)
def test_the_console_gets_a_traceback_only_of_what_nobody_expected(
    tmp_path: Path, error: Exception, is_loud: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path, sink: ShardSink) -> None:
        raise error

    kept, level = list(logging.root.handlers), logging.root.level
    try:
        log_file = start_logging(tmp_path / "run", 0)
        with pytest.raises(CheckpointError, match=r"was not saved, rank 0: .*while writing its shards"):
            store_in(tmp_path / "run").save(20, {"step": 20}, config_text="", write_engine=fail)
    finally:
        for handler in set(logging.root.handlers) - set(kept):
            handler.close()
        logging.root.handlers[:] = kept
        logging.root.setLevel(level)
        logging.captureWarnings(False)
    assert ("Traceback" in capsys.readouterr().err) == is_loud
    written = log_file.read_text()
    assert "checkpoint failed while writing its shards" in written
    assert "Traceback" in written
    assert str(error) in written


def test_a_save_that_the_disk_has_no_room_for_is_not_begun(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 1)
    with pytest.raises(CheckpointError, match=r"needs about .+, .+ are free"):
        store.save(2, {}, config_text="", write_engine=write_shards("w"), expected_bytes=1 << 63)
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "step-00000001"]
    assert verify(store.root / "step-00000001") == []


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    """On every rank: a bare OSError on rank 0 would leave the others waiting."""
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="while making its folder"):
        save(store_in(tmp_path), 10)


def test_the_next_save_of_the_same_step_starts_from_nothing(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    leftover = store.root / "step-00000010.tmp" / "engine"
    leftover.mkdir(parents=True)
    (leftover / "mp_rank_07_model_states.pt").write_text("of an interrupted save")
    folder = save(store, 10)
    assert not (folder / "engine" / "mp_rank_07_model_states.pt").exists()
    assert sorted(path.name for path in store.root.iterdir()) == ["latest", "step-00000010"]


def test_what_an_interrupted_save_left_is_cleaned(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    before = contents(store.root)
    (store.root / "step-00000020.tmp" / "engine").mkdir(parents=True)
    (store.root / "step-00000020.tmp" / "engine" / "a.pt").write_text("half")
    (store.root / ".latest.123.tmp").write_text("step-0000")
    assert list_steps(store.root) == [10], "an unfinished checkpoint does not count"
    store.clean_unfinished()
    assert contents(store.root) == before
    store_in(tmp_path / "new run").clean_unfinished()


def test_saving_a_damaged_step_again_replaces_it(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    folder = save(store, 10)
    (folder / "state.json").write_text("{}")
    assert verify(folder)
    save(store, 10)
    assert verify(folder) == []


def test_newest_is_none_in_a_new_run(tmp_path: Path) -> None:
    assert store_in(tmp_path).newest() is None


def test_newest_passes_over_damaged_ones_and_names_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_in(tmp_path)
    for step in (10, 20, 30):
        save(store, step)
    shard = store.root / "step-00000030" / "engine" / "mp_rank_00_model_states.pt"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    (store.root / "step-00000020" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert store.newest() == store.root / "step-00000010"
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 2
    assert "step-00000030: engine/mp_rank_00_model_states.pt: content differs" in named[0]
    assert "step-00000020" in named[1]
    assert "never finished" in named[1]


def test_newest_refuses_to_begin_anew_where_all_are_damaged(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for step in (10, 20):
        (save(store, step) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* verifies: step-00000020: state.json: missing \| step-00000010"):
        store.newest()


def test_a_file_that_the_disk_does_not_give_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path)
    folder = save(store, 10)

    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("cadtrain.checkpoint.manifest.hash_file", fail)
    assert "Input/output error" in verify(folder)[0]


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [50]), (2, [40, 50]), (3, [30, 40, 50]), (5, [10, 20, 30, 40, 50])])
def test_retention(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    store = store_in(tmp_path, keep_last)
    (store.root / "my notes").mkdir(parents=True)
    for step in (10, 20, 30, 40, 50):
        save(store, step)
    assert list_steps(store.root) == kept
    assert (store.root / "my notes").is_dir()


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    """Step 10 was restored by hand beside a damaged step 20; the resumed run is stopped at step 15."""
    store = store_in(tmp_path, keep_last=1)
    (save(store, 20) / "state.json").unlink()
    save(store, 10)
    folder = save(store, 15)
    assert verify(folder) == []
    assert store.newest() == folder
    save(store, 20)
    assert list_steps(store.root) == [20]
    assert verify(store.root / "step-00000020") == []


@pytest.mark.parametrize(
    ("steps", "rules", "removed"),
    [
        ([], Retention(1), []),
        ([1], Retention(1), []),
        ([1, 2], Retention(1), [1]),
        ([1, 2, 3, 4], Retention(2), [1, 2]),
        ([1, 2], Retention(9), []),
        ([10, 15, 20, 25, 30], Retention(1, keep_every=10), [15, 25]),
        ([10, 15, 20, 25, 30], Retention(1, keep_best=1), [10, 15, 20]),
        ([10, 15, 20, 25, 30], Retention(1, keep_best=2), [10, 20]),
        ([10, 15, 20, 25, 30], Retention(2, keep_every=20, keep_best=1), [10, 15]),
        ([10, 15, 20], Retention(1, keep_best=9), [10]),
    ],
)
def test_steps_to_remove(steps: list[int], rules: Retention, removed: list[int]) -> None:
    """Losses: 25 is best, then 15 and 20, of which the later counts as better only where they are equal."""
    assert steps_to_remove(steps, rules, {15: 0.5, 20: 0.6, 25: 0.4}) == removed


def test_of_equal_losses_the_later_is_kept() -> None:
    assert steps_to_remove([1, 2, 3], Retention(1, keep_best=1), {1: 0.5, 2: 0.5}) == [1]


@pytest.mark.parametrize(
    ("name", "step"),
    [("step-00001200", 1200), ("step-123456789", 123456789), ("step-1200", None), ("step-00001200.tmp", None), ("latest", None)],
)
def test_names(name: str, step: int | None) -> None:
    assert step_of(name) == step
    if step is not None:
        assert checkpoint_name(step) == name


def test_an_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    for text in ("one\n", "zwei\n"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]
