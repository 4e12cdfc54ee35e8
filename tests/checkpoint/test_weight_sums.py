"""Hashes of spans on several ranks, and whole weights compared with them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from cadtrain.checkpoint import weight_sums
from cadtrain.checkpoint.weight_sums import LiveSpan, RunningCheck, hash_values, read_sums, sums_of, write_sums
from cadtrain.errors import CheckpointError

WEIGHT = torch.randn(1001, generator=torch.Generator().manual_seed(0))


def save(folder: Path, cuts: list[int]) -> None:
    """`WEIGHT` as ranks hold it that cut it at these values, and a buffer that only rank 0 has."""
    edges = [0, *cuts, WEIGHT.numel()]
    for rank, (start, end) in enumerate(itertools.pairwise(edges)):
        spans = [LiveSpan("w", WEIGHT.numel(), start, WEIGHT[start:end])]
        spans += [LiveSpan("table", 3, 0, torch.arange(3)), LiveSpan("empty", 0, 0, torch.zeros(0))] if rank == 0 else []
        write_sums(folder, rank, spans)


def check(folder: Path, values: torch.Tensor, piece: int, name: str = "w") -> str | None:
    running = RunningCheck(read_sums(folder)[name])
    for part in values.split(piece):
        running.update(part)
    return running.finish()


@pytest.mark.parametrize("cuts", [[], [500], [1, 2, 700], [334, 668, 1001]])
@pytest.mark.parametrize("piece", [1, 7, 500, 5000])
def test_the_same_values_agree_however_they_are_cut(tmp_path: Path, cuts: list[int], piece: int) -> None:
    save(tmp_path, cuts)
    assert check(tmp_path, WEIGHT, piece) is None
    assert check(tmp_path, torch.arange(3), piece, "table") is None
    assert check(tmp_path, torch.zeros(0), piece, "empty") is None


@pytest.mark.parametrize("at", [0, 499, 500, 1000])
def test_one_bit_is_found_and_its_span_named(tmp_path: Path, at: int) -> None:
    save(tmp_path, [500])
    bits = WEIGHT.clone().view(torch.int32)
    bits[at] ^= 1
    fault = check(tmp_path, bits.view(torch.float32), 64)
    assert fault == f"differs from the live weight between values {'0 and 500' if at < 500 else '500 and 1,001'}"


def test_values_in_another_order_are_found(tmp_path: Path) -> None:
    save(tmp_path, [500])
    swapped = WEIGHT.clone()
    swapped[[3, 9]] = swapped[[9, 3]]
    assert "differs" in str(check(tmp_path, swapped, 64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (WEIGHT[:-1], "ends too early"),
        (torch.cat([WEIGHT, WEIGHT[:1]]), "has more than its 1001 values"),
        (WEIGHT.double(), "is float64 instead of float32"),
    ],
)
def test_another_number_or_type_of_values_is_found(tmp_path: Path, values: torch.Tensor, message: str) -> None:
    save(tmp_path, [500])
    assert message in str(check(tmp_path, values, 64))


def test_large_values_are_hashed_piece_by_piece_to_the_same_end() -> None:
    import xxhash

    values = torch.zeros(20_000_000, dtype=torch.int32)
    assert hash_values(values) == xxhash.xxh3_128(values.numpy().data).hexdigest()


def test_a_missing_rank_is_named_by_what_it_held(tmp_path: Path) -> None:
    save(tmp_path, [300, 600])
    (tmp_path / "zero_pp_rank_1_weight_sums.json").unlink()
    with pytest.raises(CheckpointError, match="the hashes of w leave out its values from 300 on"):
        read_sums(tmp_path)
    (tmp_path / "zero_pp_rank_2_weight_sums.json").unlink()
    with pytest.raises(CheckpointError, match="of 300 of its 1001 values"):
        read_sums(tmp_path)


def test_a_folder_without_hashes_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without --verify"):
        read_sums(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "holds no hashes"),
        ("[]", "holds no hashes"),
        (json.dumps({"format": 2, "spans": []}), "format 2 is newer"),
        (json.dumps({"format": 1, "spans": [["w", "float32", 3]]}), "holds no hashes"),
        (json.dumps({"format": 1, "spans": [["w", "float32", 3, 0, -1, ""]]}), "leave out its values"),
        (json.dumps({"format": 1, "spans": [["w", "save", 0, 0, 0, ""]]}), "values of type 'save'"),
    ],
)
def test_what_is_no_file_of_hashes(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "zero_pp_rank_0_weight_sums.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_sums(tmp_path)


def test_values_on_a_gpu_are_hashed_when_the_file_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [LiveSpan("w", 4, 0, torch.arange(4.0)), LiveSpan("frozen", 2, 0, torch.ones(2), is_constant=True)]
    at_once = sums_of(spans)
    monkeypatch.setattr(weight_sums, "_can_wait", lambda values: True)
    later = sums_of(spans)
    assert [isinstance(row[-1], str) for row in at_once.tensors] == [True, True]
    assert [isinstance(row[-1], str) for row in later.tensors] == [False, True], "what is constant is hashed once a run"
    assert later.text(later.tensors) == at_once.text(at_once.tensors)
