"""Merged piece by piece, a layer is what it is when it is merged whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.config.sections import LoraConfig
from cadtrain.convert.adapters import merged_entries
from cadtrain.convert.model_folder import merge_lora
from cadtrain.errors import CheckpointError

LORA = LoraConfig(rank=2, alpha=3.0)
DRAW = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW)


WEIGHTS = {
    "embed.base_layer.weight": draw(10, 4), "embed.added_rows.weight": draw(3, 4),
    "q.base_layer.weight": draw(6, 4), "q.base_layer.bias": draw(6), "q.lora_A.default.weight": draw(2, 4), "q.lora_B.default.weight": draw(6, 2),
    "head.base_layer.weight": draw(10, 4), "head.added_rows.weight": draw(3, 4),
    "head.lora_A.default.weight": draw(2, 4), "head.lora_B.default.weight": draw(10, 2),
    "norm.weight": draw(4), "one.weight": draw(1),
}  # fmt: skip


def shards(folder: Path, weights: dict[str, torch.Tensor]) -> ShardedWeights:
    content = {"module": weights, "buffer_names": [], "optimizer": None}
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    return ShardedWeights.open(folder)


@pytest.mark.parametrize("piece_values", [1, 4, 9, 28, 1000])
def test_rows_of_a_layer_are_merged_as_the_whole_layer(tmp_path: Path, piece_values: int) -> None:
    entries = merged_entries(shards(tmp_path, WEIGHTS), LORA, dtype_of=lambda name: torch.float32, piece_values=piece_values)
    expected = dict(merge_lora(WEIGHTS, alpha=LORA.alpha, rank=LORA.rank))
    assert [entry.name for entry in entries] == list(expected)
    for entry in entries:
        pieces = [piece.clone() for piece in entry.pieces()]
        found = torch.cat([piece.reshape(-1) for piece in pieces]).view(entry.shape)
        torch.testing.assert_close(found, expected[entry.name], rtol=1e-6, atol=1e-6)
        assert max(piece.numel() for piece in pieces) <= max(piece_values, 4), "a row is the least"
    assert not torch.allclose(expected["q.weight"], WEIGHTS["q.base_layer.weight"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("q.lora_embedding_A.default", "fit no layer, the first is q.lora_embedding_A"), ("z.lora_A.default.weight", "the adapter of z stands beside no weight")],
)
def test_an_adapter_that_would_be_lost_is_named(tmp_path: Path, name: str, message: str) -> None:
    weights = shards(tmp_path, {**WEIGHTS, name: draw(2, 4)})
    with pytest.raises(CheckpointError, match=message):  # noqa: PT012
        for entry in merged_entries(weights, LORA, dtype_of=lambda name: torch.float32, piece_values=8):
            list(entry.pieces())
