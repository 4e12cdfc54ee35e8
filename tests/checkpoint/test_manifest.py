"""What a manifest says of a folder that is not what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cadtrain.checkpoint.manifest import FORMAT, Manifest, record_files
from cadtrain.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint of three files."""
    (tmp_path / "engine").mkdir()
    for name in ("engine/a.pt", "engine/b.pt", "state.json"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    files = record_files(tmp_path, ["engine/a.pt", "engine/b.pt", "state.json"])
    Manifest(step=7, world_size=2, zero_stage=3, precision="bf16", versions={"torch": "2.13"}, files=files).write(tmp_path)
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest's JSON."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def test_it_reads_back_and_verifies(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert (manifest.step, manifest.world_size, manifest.zero_stage, manifest.precision) == (7, 2, 3, "bf16")
    assert sorted(manifest.files) == ["engine/a.pt", "engine/b.pt", "state.json"]
    assert manifest.faults(folder) == []


def test_one_flipped_bit_is_found(folder: Path) -> None:
    data = bytearray((folder / "engine/b.pt").read_bytes())
    data[500] ^= 1
    (folder / "engine/b.pt").write_bytes(data)
    assert Manifest.read(folder).faults(folder) == ["engine/b.pt: content differs from what was saved"]


def test_a_cut_off_file_is_found_with_both_sizes(folder: Path) -> None:
    (folder / "state.json").write_bytes(b"short")
    assert Manifest.read(folder).faults(folder) == ["state.json: 5 bytes instead of 1000"]


def test_shares_together_look_at_every_file_once(folder: Path) -> None:
    for path in ("engine/a.pt", "engine/b.pt", "state.json"):
        (folder / path).unlink()
    manifest = Manifest.read(folder)
    for count in (1, 2, 3, 5):
        found = [fault for number in range(count) for fault in manifest.faults(folder, share=(number, count))]
        assert sorted(found) == ["engine/a.pt: missing", "engine/b.pt: missing", "state.json: missing"]


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "engine/a.pt").unlink()
    assert Manifest.read(folder).faults(folder) == ["engine/a.pt: missing"]


@pytest.mark.parametrize("name", ["../outside", "engine/../../outside", "{outside}"])
def test_a_name_that_leaves_the_folder_is_a_fault_even_where_the_file_matches(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes(b"x")
    name = name.format(outside=outside)
    record = record_files(folder.parent, ["outside"])["outside"]
    change(folder, lambda raw: raw["files"].update({name: {"size": record.size, "xxh3": record.xxh3}}))
    assert Manifest.read(folder).faults(folder) == [f"{name}: points outside the checkpoint"]


def test_no_manifest_means_never_finished(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        Manifest.read(folder)


def test_a_newer_format_is_refused_with_what_to_do(folder: Path) -> None:
    """Also where it has fields of which this version knows nothing."""
    change(folder, lambda raw: raw.update(format=FORMAT + 1, topology="3d"))
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1} is newer") as caught:
        Manifest.read(folder)
    assert caught.value.hint == "Update cadtrain."


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {}, "step": 1}', '{"format": "x", "files": {}}']
)
def test_what_is_no_manifest_is_said_to_be_none(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a manifest") as caught:
        Manifest.read(folder)
    assert caught.value.where == str(folder / "manifest.json")


def test_a_manifest_of_no_files_vouches_for_nothing(folder: Path) -> None:
    change(folder, lambda raw: raw.update(files={}))
    assert Manifest.read(folder).faults(folder) == ["the manifest names no file"]


def test_a_link_out_of_the_checkpoint_is_a_fault_whatever_it_leads_to(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "b.pt"
    (folder / "engine/b.pt").rename(outside)
    (folder / "engine/b.pt").symlink_to(outside)
    assert Manifest.read(folder).faults(folder) == ["engine/b.pt: points outside the checkpoint"]
