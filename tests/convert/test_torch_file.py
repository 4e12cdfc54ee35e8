"""A `.bin` written as a stream is what `torch.save` would have written."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from cadtrain.checkpoint.weight_files import Entry, entries_of
from cadtrain.convert.torch_file import write_bin
from cadtrain.errors import CheckpointError

VALUES = {
    "flag": torch.tensor([True, False, True]), "half": torch.arange(3).half(), "count": torch.tensor(7), "none": torch.zeros(0, 4),
    "brain": torch.arange(12).bfloat16().view(3, 4), "wide": torch.arange(2).double(), "é": torch.arange(100.0).view(5, 4, 5),
    "small": torch.arange(3, dtype=torch.int8), "short": torch.arange(3, dtype=torch.int16), "byte": torch.arange(3, dtype=torch.uint8),
}  # fmt: skip


def write(path: Path, entries: list[Entry]) -> None:
    write_bin(path, entries, written=lambda name, piece: None)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it_mapped_or_not(tmp_path: Path, mmap: bool) -> None:
    write(tmp_path / "a.bin", entries_of(VALUES))
    state = torch.load(tmp_path / "a.bin", weights_only=True, mmap=mmap)
    assert list(state) == list(VALUES)
    for name, tensor in VALUES.items():
        assert state[name].dtype == tensor.dtype
        assert state[name].stride() == tensor.stride()
        assert torch.equal(state[name], tensor), name
    if mmap:
        assert {tensor.data_ptr() % 64 for name, tensor in state.items() if name != "none"} == {0}


def test_it_is_an_archive_that_other_tools_read(tmp_path: Path) -> None:
    """Checksums and names are right: `unzip -t` and every reader of torch files go by them."""
    write(tmp_path / "a.bin", entries_of(VALUES))
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        assert archive.testzip() is None
        assert {name.split("/")[0] for name in archive.namelist()} == {"weights"}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_tied_weights_share_their_values_in_the_file(tmp_path: Path) -> None:
    entries = [*entries_of({"a": torch.arange(6.0).view(2, 3)}), Entry("b", torch.Size([2, 3]), torch.float32, tuple, alias_of="a")]
    write(tmp_path / "a.bin", entries)
    state = torch.load(tmp_path / "a.bin", weights_only=True)
    state["a"][0, 0] = 9
    assert state["b"][0, 0] == 9


def test_two_conversions_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin"):
        write(tmp_path / name, entries_of(VALUES))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_pieces_are_put_together_and_counted(tmp_path: Path) -> None:
    values = torch.arange(10.0)
    write(tmp_path / "a.bin", [Entry("a", torch.Size([2, 5]), torch.bfloat16, lambda: values.split(3))])
    assert torch.equal(torch.load(tmp_path / "a.bin", weights_only=True)["a"], values.bfloat16().view(2, 5))
    short = Entry("a", torch.Size([11]), torch.float32, lambda: values.split(3))
    with pytest.raises(CheckpointError, match="came out as 10 values, 11 belong"):
        write(tmp_path / "b.bin", [short])


def test_a_value_too_large_for_fp16_is_named_and_not_made_infinite(tmp_path: Path) -> None:
    wide = torch.tensor([1.0, -70_000.0])
    with pytest.raises(CheckpointError, match=r"big holds 70000, beyond the 65504 of fp16\. Use --dtype bf16"):
        write(tmp_path / "a.bin", entries_of({"big": wide}, dtype=torch.float16))
    write(tmp_path / "b.bin", entries_of({"mask": torch.tensor([0.0, -torch.inf])}, dtype=torch.float16))
    assert torch.load(tmp_path / "b.bin", weights_only=True)["mask"].tolist() == [0.0, -torch.inf]
