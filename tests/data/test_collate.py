"""Packs as tensors: borders, positions, targets, and what stands in for a modality that nobody has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cadtrain.data.collate import Pack, collate, dummy_cloud, dummy_views
from cadtrain.data.examples import IGNORED, Example, ExampleShape

SHAPE = ExampleShape(tokens_per_view=2, views=1, image_size=14, point_tokens=3, num_points=4)


def example(name: str, ids: list[int], labels: list[int], *, image: bool = False, points: bool = False) -> Example:
    return Example(
        name, np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64), 2 * image, 3 * points,
        np.full((1, 3, 14, 14), 0.25, dtype=np.float32) if image else None,
        np.ones((4, 6), dtype=np.float32) if points else None,
    )  # fmt: skip


def two_sequences() -> Pack:
    """Six tokens with an image and points, then three of text."""
    first = example("a", [9, 9, 9, 9, 9, 5], [-100, -100, -100, -100, 5, 1], image=True, points=True)
    second = example("b", [7, 8, 6], [-100, 6, 1])
    return collate([first, second], SHAPE, use_images=True, use_points=True, filler_id=9)


def test_sequences_stand_end_to_end() -> None:
    pack = two_sequences()
    assert pack.input_ids.tolist() == [9, 9, 9, 9, 9, 5, 7, 8, 6]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert pack.cu_seqlens.tolist() == [0, 6, 9]
    assert pack.cu_seqlens.dtype == torch.int32
    assert pack.max_seqlen == 6
    assert pack.sample_ids == ("a", "b")
    assert (pack.num_tokens, pack.num_targets) == (9, 4)


def test_target_positions_are_exactly_the_labels_that_count() -> None:
    pack = two_sequences()
    assert pack.target_positions.tolist() == [4, 5, 7, 8]
    assert pack.labels[pack.target_positions].tolist() == [5, 1, 6, 1]
    rest = torch.ones(9, dtype=torch.bool)
    rest[pack.target_positions] = False
    assert (pack.labels[rest] == IGNORED).all()


def test_modality_positions_are_shifted_by_what_stands_before() -> None:
    text = example("t", [7, 8], [-100, 1])
    both = example("b", [9, 9, 9, 9, 9, 5], [-100] * 5 + [1], image=True, points=True)
    points = example("p", [9, 9, 9, 5], [-100] * 3 + [1], points=True)
    pack = collate([text, both, points], SHAPE, use_images=True, use_points=True, filler_id=9)
    assert pack.image_positions is not None
    assert pack.point_positions is not None
    assert pack.image_positions.tolist() == [2, 3]
    assert pack.point_positions.tolist() == [4, 5, 6, 8, 9, 10]
    assert pack.pixel_values is not None
    assert pack.points is not None
    assert pack.pixel_values.shape == (1, 3, 14, 14)
    assert pack.points.shape == (2, 4, 6)


def test_a_pack_without_the_stages_modalities_carries_dummies() -> None:
    """Every rank runs the same modules: a finite input, and no position that it is written to."""
    pack = collate([example("t", [7, 8], [-100, 1])], SHAPE, use_images=True, use_points=True, filler_id=9)
    assert pack.pixel_values is not None
    assert pack.points is not None
    assert pack.pixel_values.shape == (1, 3, 14, 14)
    assert pack.points.shape == (1, 4, 6)
    assert torch.isfinite(pack.pixel_values).all()
    assert torch.isfinite(pack.points).all()
    for positions in (pack.image_positions, pack.point_positions):
        assert positions is not None
        assert positions.shape == (0,)
        assert positions.dtype == torch.int64


@pytest.mark.parametrize(("use_images", "use_points"), [(False, False), (True, False), (False, True)])
def test_a_stage_without_a_modality_has_none_of_its_tensors(use_images: bool, use_points: bool) -> None:
    pack = collate([example("t", [7], [1])], SHAPE, use_images=use_images, use_points=use_points, filler_id=9)
    assert (pack.pixel_values is not None) == (pack.image_positions is not None) == use_images
    assert (pack.points is not None) == (pack.point_positions is not None) == use_points


def test_an_empty_pack_is_one_token_that_predicts_nothing() -> None:
    pack = collate([], SHAPE, use_images=True, use_points=True, filler_id=9)
    assert pack.input_ids.tolist() == [9]
    assert pack.labels.tolist() == [IGNORED]
    assert pack.cu_seqlens.tolist() == [0, 1]
    assert pack.num_targets == 0
    assert pack.target_positions.dtype == torch.int64
    assert pack.sample_ids == ()
    assert pack.pixel_values is not None
    assert pack.points is not None


def test_dummies_fit_the_shape() -> None:
    assert dummy_views(SHAPE).shape == (1, 3, 14, 14)
    cloud = dummy_cloud(SHAPE)
    assert cloud.shape == (1, 4, 6)
    assert np.linalg.norm(cloud[0, :, 3:], axis=1) == pytest.approx(1.0), "normals have unit length"


def test_moving_a_pack_keeps_what_is_no_tensor() -> None:
    pack = two_sequences()
    moved = pack.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.points.device.type == "meta"  # type: ignore[union-attr]
    assert (moved.max_seqlen, moved.sample_ids) == (pack.max_seqlen, pack.sample_ids)
    assert set(pack.model_inputs()) == {
        "input_ids", "position_ids", "cu_seqlens", "labels", "target_positions", "max_seqlen", "pixel_values", "image_positions",
        "points", "point_positions", "image_features", "point_features",
    }  # fmt: skip
