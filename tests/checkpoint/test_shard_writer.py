"""Shards on their way to the disk: hashed, flushed, read back; copied to host memory where they are written behind the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cadtrain.checkpoint import shard_writer
from cadtrain.checkpoint.manifest import hash_file
from cadtrain.checkpoint.shard_writer import Derived, HostPool, ShardWriter, write_shard
from cadtrain.errors import CheckpointError


def content() -> dict[str, Any]:
    """Tied weights, a view, an empty tensor, plain values."""
    weight = torch.arange(12.0)
    return {"a": weight.view(3, 4), "tied": weight.view(3, 4), "part": weight[4:8], "empty": torch.empty(0), "step": 7, "rows": [1, (2.0, None)]}


def test_the_record_is_that_of_the_file(tmp_path: Path) -> None:
    record = write_shard(tmp_path / "a.pt", content())
    assert (record.size, record.xxh3) == ((tmp_path / "a.pt").stat().st_size, hash_file(tmp_path / "a.pt"))
    assert write_shard(None, content()) == record, "the same without a file"
    torch.testing.assert_close(torch.load(tmp_path / "a.pt", weights_only=True), content())


def test_a_copy_is_equal_shares_storages_and_stays_as_it_was() -> None:
    original = content()
    copied = HostPool().begin().copy(original, "shard")
    torch.testing.assert_close(copied, content())
    assert copied["a"].untyped_storage().data_ptr() == copied["tied"].untyped_storage().data_ptr()
    assert copied["part"].untyped_storage().data_ptr() == copied["a"].untyped_storage().data_ptr()
    original["a"].zero_()
    original["rows"].append(3)
    torch.testing.assert_close(copied, content())


def test_the_buffers_are_used_again() -> None:
    pool = HostPool()
    first = pool.begin().copy(content(), "shard")["a"].data_ptr()
    assert pool.begin().copy(content(), "shard")["a"].data_ptr() == first
    assert pool.begin().copy(content(), "other")["a"].data_ptr() != first
    grown = {**content(), "a": torch.zeros(100)}
    torch.testing.assert_close(pool.begin().copy(grown, "shard"), grown)


@pytest.mark.parametrize("outlives", [True, False])
def test_a_storage_that_outlives_its_shard_is_copied_once_a_save(
    outlives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "_outlives_its_shard", lambda storage: outlives)
    copies, weight = HostPool().begin(), torch.arange(6.0)
    first, second = (copies.copy([weight[start:]], name)[0] for start, name in ((0, "shard"), (2, "other")))
    copies.finish()
    assert (first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()) == outlives
    weight.zero_()
    assert torch.equal(second, torch.arange(2.0, 6.0))


@pytest.mark.parametrize("behind", [True, False])
def test_a_derived_text_is_made_of_what_was_taken(behind: bool, tmp_path: Path) -> None:
    writer, weight = ShardWriter(tmp_path, HostPool() if behind else None), torch.arange(3.0)
    writer.take(tmp_path / "sums.json", Derived([weight], lambda tensors: str(tensors[0].tolist())))
    weight.zero_()
    if behind:
        writer.start()
        writer.join()
    writer.read_back()
    assert (tmp_path / "sums.json").read_text() == "[0.0, 1.0, 2.0]"


def test_what_is_written_behind_is_what_was_taken(tmp_path: Path) -> None:
    writer, original = ShardWriter(tmp_path, HostPool()), content()
    writer.take(tmp_path / "a.pt", original)
    original["a"].zero_()
    writer.start()
    writer.join()
    assert not writer.is_writing
    torch.testing.assert_close(torch.load(tmp_path / "a.pt", weights_only=True), content())
    assert list(writer.records) == ["a.pt"]


def test_what_goes_wrong_behind_is_raised_by_join(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, HostPool())
    writer.take(tmp_path / "no such folder" / "a.pt", content())
    writer.start()
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        writer.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_nobody_thought_of_is_a_failure_too(tmp_path: Path) -> None:
    def fails(tensors: Any) -> str:
        raise KeyError("unforeseen")

    writer = ShardWriter(tmp_path, HostPool())
    writer.take(tmp_path / "a.pt", content())
    writer.take(tmp_path / "b.json", Derived([], fails))
    writer.take(tmp_path / "c.pt", content())
    writer.start()
    with pytest.raises(CheckpointError, match="ended early"):
        writer.join()


@pytest.mark.parametrize(("damage", "fault"), [(b"", "bytes instead of"), (None, "missing")])
def test_a_file_that_does_not_read_back_is_a_fault(tmp_path: Path, damage: bytes | None, fault: str) -> None:
    writer = ShardWriter(tmp_path, None)
    writer.take(tmp_path / "a.pt", content())
    writer.read_back()
    if damage is None:
        (tmp_path / "a.pt").unlink()
    else:
        (tmp_path / "a.pt").write_bytes(damage)
    with pytest.raises(CheckpointError, match=f"a.pt does not read back: .*{fault}"):
        writer.read_back()


@pytest.mark.parametrize("nbytes", [1 << 20, (64 << 20) + 12345])
def test_mapped_memory_is_of_the_size_asked_for(nbytes: int) -> None:
    found = shard_writer._touched(nbytes)
    assert found.nbytes == nbytes
    found.fill_(7)
    assert int(found[-1]) == 7
