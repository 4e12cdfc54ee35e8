"""Reading a file runs nothing from it, whatever it holds."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
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


def in_optimizer(value: Any) -> dict[str, Any]:
    """A shard of an optimizer that holds `value` where Adam's step count is."""
    return {**STATE, "optimizer_state_dict": {"base_optimizer_state": {"state": {0: {"step": value}}, "param_groups": []}}}


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
@pytest.mark.parametrize("form", ["zip", "old", "pickle", "inside a dict", "old, in the optimizer's state"])
@pytest.mark.parametrize("mmap", [True, False])
def test_a_hostile_file_is_refused_and_nothing_of_it_runs(tmp_path: Path, form: str, mmap: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    hostile = Hostile(f"touch {marker}")
    data = {
        "zip": lambda: torch_bytes(hostile),
        "old": lambda: torch_bytes(hostile, as_zip=False),
        "pickle": lambda: pickle.dumps(hostile),
        "old, in the optimizer's state": lambda: torch_bytes(in_optimizer(hostile), as_zip=False),
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


def rewritten(path: Path, *, compress: int = zipfile.ZIP_STORED, replace: dict[str, bytes] | None = None) -> None:
    """Write the archive anew, its records compressed, or some of them of other bytes."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in records.items():
            archive.writestr(name, (replace or {}).get(name.split("/", 1)[1], content))


@pytest.mark.parametrize("mmap", [True, False])
def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path: Path, mmap: bool) -> None:
    """A thousand times smaller than what it unpacks to."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(4_000_000)}, path)
    rewritten(path, compress=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 40_000
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save never does"):
        load_shard(path, mmap=mmap)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    "claim",
    [
        torch.zeros(1).expand(1 << 50),
        torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (1 << 50,), check_invariants=True),
        torch.empty(1 << 40, device="meta"),
    ],
    ids=["stride 0", "sparse", "without values"],
)
def test_a_tensor_that_claims_more_than_its_file_is_refused(tmp_path: Path, mmap: bool, claim: torch.Tensor) -> None:
    path = tmp_path / "a.pt"
    torch.save({**STATE, "deep": [{"w": claim}]}, path)
    with pytest.raises(CheckpointError, match="refused: it claims a"):
        load_shard(path, mmap=mmap)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("numel", [b"J\xff\xff\x00\x00", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"], ids=["65535", "2^31", "-1"])
def test_a_storage_that_is_smaller_than_it_says_is_refused(tmp_path: Path, mmap: bool, numel: bytes) -> None:
    """The pickle says how many values a record has and how many a tensor takes of it: here the record has 113."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(113)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("a/data.pkl")
    assert pickled.count(b"Kq") == 2, "once for the storage, once for the tensor"
    rewritten(path, replace={"data.pkl": pickled.replace(b"Kq", numel)})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_shard(path, mmap=mmap)


def test_a_file_of_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    """Turned round in memory it would come back unturned when its pages are read again."""
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    rewritten(path, replace={"byteorder": b"big"})
    with pytest.raises(CheckpointError, match="'big' byte order, this machine is little-endian"):
        load_shard(path, mmap=True)


def test_stand_ins_keep_deepspeed_out(tmp_path: Path) -> None:
    """A converter wants the tensors alone; what DeepSpeed's records hold is not looked at."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2), "scaler": LossScaler(scale=4.0)}, path)
    code = "import sys; from pathlib import Path; from cadtrain.checkpoint.safe_load import load_shard\n"
    code += "found = load_shard(Path(sys.argv[1]), stand_ins=True)\n"
    code += "print(type(found['scaler']).__name__, found['w'].tolist(), 'deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[0] == "LossScaler [1.0, 1.0] False"
