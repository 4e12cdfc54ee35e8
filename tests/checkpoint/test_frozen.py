"""Weights that never learn: written once, shared by checkpoints, put back when they are read, removed with the last that needs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cadtrain.checkpoint.frozen import merge_frozen, split_frozen, without_repeats
from cadtrain.checkpoint.layout import is_frozen_name
from cadtrain.checkpoint.manifest import Manifest
from cadtrain.checkpoint.retention import Retention
from cadtrain.checkpoint.shard_files import open_shard_files
from cadtrain.checkpoint.shard_writer import ShardSink
from cadtrain.checkpoint.store import CheckpointStore, verify
from cadtrain.distributed import Place
from cadtrain.errors import CheckpointError

FACTS = {"zero_stage": 0, "precision": "fp32", "versions": {}}
BASE = torch.arange(50_000, dtype=torch.float32)


def model_states(step: int, base: torch.Tensor = BASE) -> dict[str, Any]:
    return {"module": {"base": base, "learns": torch.full((3,), float(step))}, "dp_world_size": 1, "optimizer": None}


def store_in(run_dir: Path, keep_last: int = 2) -> CheckpointStore:
    return CheckpointStore(
        run_dir, place=Place(), retention=Retention(keep_last), facts=FACTS, frozen_names=frozenset({"base", "elsewhere"})
    )


def save(store: CheckpointStore, step: int, base: torch.Tensor = BASE) -> Path:
    def write(folder: Path, sink: ShardSink) -> None:
        sink(folder / "mp_rank_00_model_states.pt", model_states(step, base))

    return store.save(step, {"step": step}, config_text="", write_engine=write).path


def frozen_folders(store: CheckpointStore) -> list[Path]:
    return [entry for entry in store.root.iterdir() if is_frozen_name(entry.name)]


def test_they_are_written_once_and_read_with_every_checkpoint(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    folders = [save(store, step) for step in (1, 2)]
    assert len(frozen_folders(store)) == 1
    assert store.has_frozen
    for step, folder in enumerate(folders, 1):
        assert verify(folder) == []
        assert sum(path.stat().st_size for path in folder.rglob("*")) < BASE.nbytes / 2
        module = open_shard_files(folder / "engine").model[0]["module"]
        assert torch.equal(module["base"], BASE)
        assert torch.equal(module["learns"], torch.full((3,), float(step)))


def test_a_resumed_run_finds_them_by_their_content_and_writes_them_again_only_if_it_differs(tmp_path: Path) -> None:
    save(store_in(tmp_path), 1)
    before = frozen_folders(store_in(tmp_path))[0]
    written = (before / "mp_rank_00_model_states.pt").stat().st_mtime_ns
    again = store_in(tmp_path)
    save(again, 2)
    assert frozen_folders(again) == [before]
    assert (before / "mp_rank_00_model_states.pt").stat().st_mtime_ns == written
    other = store_in(tmp_path)
    save(other, 3, BASE + 1)
    assert len(frozen_folders(other)) == 2


def test_they_go_with_the_last_checkpoint_that_needs_them(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=1)
    save(store, 1)
    other = store_in(tmp_path, keep_last=1)
    folder = save(other, 2, BASE + 1)
    frozen = Manifest.read(folder).frozen
    assert frozen is not None
    assert [entry.name for entry in frozen_folders(other)] == [frozen.folder]
    assert verify(folder) == []


def test_a_checkpoint_without_them_says_what_to_copy(tmp_path: Path) -> None:
    folder = save(store_in(tmp_path), 1)
    alone = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, alone)
    name = frozen_folders(store_in(tmp_path))[0].name
    assert verify(alone) == [f"its frozen weights are missing: copy the folder {name} beside it"]
    with pytest.raises(CheckpointError, match=f"there is no {name}/mp_rank_00_model_states.pt beside it"):
        open_shard_files(alone / "engine")


def test_damage_to_them_is_found(tmp_path: Path) -> None:
    folder = save(store_in(tmp_path), 1)
    path = next(frozen_folders(store_in(tmp_path))[0].iterdir())
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    assert verify(folder) == [f"../{path.parent.name}/{path.name}: content differs from what was saved"]


@pytest.mark.parametrize("name", ["../../etc", "frozen-x", "/etc", "step-00000001"])
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = save(store_in(tmp_path), 1)
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw["frozen"]["folder"] = name
    path.write_text(json.dumps(raw))
    assert verify(folder) == [f"{name!r} is no folder of frozen weights"]
    with pytest.raises(CheckpointError, match="is no folder of frozen weights"):
        open_shard_files(folder / "engine")


def test_a_run_that_trains_everything_has_no_such_folder(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, place=Place(), retention=Retention(1), facts=FACTS)
    folder = save(store, 1)
    assert frozen_folders(store) == []
    assert Manifest.read(folder).frozen is None


@pytest.mark.parametrize(
    "content",
    [
        {"module": {"base": torch.ones(4), "a": torch.ones(2)}, "frozen_param_fragments": None},
        {"module": {"base": torch.ones(4), "a": torch.ones(2)}, "frozen_param_fragments": {"base": torch.ones(4), "rests": torch.ones(2)}},
        {"module": {"base": torch.empty(0), "a": torch.empty(0)}, "frozen_param_fragments": {"base": torch.ones(2)}},
        {"optimizer_state_dict": {"base": torch.ones(4)}},
    ],
)
def test_split_and_merge_are_opposites(content: dict[str, Any]) -> None:
    """At stages 0 and 1, 2 (with a weight that only rests), 3, and for optimizer states."""
    left, taken = split_frozen(content, {"base"})
    assert not any(value.numel() for held in left.values() if isinstance(held, dict) for name, value in held.items() if name == "base") or (
        "module" not in content
    )
    merged = merge_frozen(left, taken)
    assert merged.keys() == content.keys()
    for key, held in content.items():
        if not isinstance(held, dict):
            assert merged[key] is held
            continue
        assert {name: value.tolist() for name, value in merged[key].items()} == {name: value.tolist() for name, value in held.items()}


def test_what_stage_2_holds_twice_is_one_tensor() -> None:
    content = {"module": {"base": torch.ones(4)}, "frozen_param_fragments": {"base": torch.ones(4)}}
    found = without_repeats(content)
    assert found["frozen_param_fragments"]["base"] is found["module"]["base"]
