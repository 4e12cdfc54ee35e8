"""Reading a file runs nothing from it, whatever it holds."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cadtrain.checkpoint.safe_load import ALLOWED_CLASSES, load_shard
from cadtrain.errors import CheckpointError

STATE = {"module": {"w": torch.arange(20.0)}, "step": 3, "names": ["a", "b"], "nested": {"x": (1, None, True)}}


class Hostile:
    """Unpickling it runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return (os.system, (self.command,))


def torch_bytes(value: Any, *, as_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_what_training_writes_is_read(tmp_path: Path, as_zip: bool, mmap: bool) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(torch_bytes(STATE, as_zip=as_zip))
    loaded = load_shard(path, mmap=mmap and as_zip)
    assert torch.equal(loaded["module"]["w"], STATE["module"]["w"])  # type: ignore[index]
    assert {key: loaded[key] for key in ("step", "names", "nested")} == {key: STATE[key] for key in ("step", "names", "nested")}


def test_deepspeeds_own_records_are_read(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    path = tmp_path / "a.pt"
    path.write_bytes(torch_bytes([ZeroStageEnum.weights, LossScaler(scale=4.0), fragment_address(numel=3, start=2)]))
    stage, scaler, address = load_shard(path)
    assert stage == ZeroStageEnum.weights
    assert scaler.cur_scale == 4.0
    assert (address.numel, address.start) == (3, 2)
    assert len(ALLOWED_CLASSES) == 4, "every class here is one that a file may ask for: look at it before adding one"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "old", "pickle", "inside a dict"])
@pytest.mark.parametrize("mmap", [True, False])
def test_a_hostile_file_is_refused_and_nothing_of_it_runs(tmp_path: Path, form: str, mmap: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    hostile = Hostile(f"touch {marker}")
    data = {
        "zip": lambda: torch_bytes(hostile),
        "old": lambda: torch_bytes(hostile, as_zip=False),
        "pickle": lambda: pickle.dumps(hostile),
        "inside a dict": lambda: torch_bytes({**STATE, "optimizer": [hostile]}),
    }[form]()
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_shard(path, mmap=mmap)
    assert caught.value.where == str(path)
    assert not marker.exists()
    if not mmap:
        assert "refused" in str(caught.value)
        assert "Nothing of it was run" in (caught.value.hint or "")


def test_the_hostile_file_would_run_elsewhere(tmp_path: Path) -> None:
    """Without this, the test above could not fail."""
    pickle.loads(pickle.dumps(Hostile(f"touch {tmp_path / 'marker'}")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_cut_off_file_is_a_checkpoint_error_wherever_it_ends(tmp_path: Path, as_zip: bool) -> None:
    path, data = tmp_path / "a.pt", torch_bytes(STATE, as_zip=as_zip)
    for length in [*range(0, len(data) - 1, 23), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError) as caught:
            load_shard(path)
        assert caught.value.where == str(path)
        assert "cannot be read: The" not in str(caught.value), "the reason is never empty"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_damaged_file_is_read_or_is_a_checkpoint_error(tmp_path: Path, as_zip: bool) -> None:
    """A flipped bit makes an unpickler fail in any way: assertions, index errors, wrong types."""
    path, data, choices, refused = tmp_path / "a.pt", torch_bytes(STATE, as_zip=as_zip), random.Random(0), 0
    for _ in range(250):
        damaged = bytearray(data)
        damaged[choices.randrange(len(damaged))] ^= 1 << choices.randrange(8)
        path.write_bytes(damaged)
        try:
            load_shard(path)
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_what_is_no_torch_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("weights: none\n")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("readme", "nothing")
    for name in ("text", "zip", "missing", "."):
        with pytest.raises(CheckpointError):
            load_shard(tmp_path / name)
