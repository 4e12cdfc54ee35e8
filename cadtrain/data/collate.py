"""Packs of examples as tensors.

Legend: T tokens of the pack, S sequences, V views, C clouds, P points, N tokens of a view or cloud, W width of an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch

from cadtrain.data.examples import IGNORED, Example, ExampleShape
from cadtrain.data.features.store import SplitFeatures

Order = TypeVar("Order")


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch of one rank: sequences end to end, each attending only within itself.

    Where a stage uses a modality, its tensors are present in every pack; a pack that holds none of it carries one
    finite dummy and empty positions, so that every rank runs the same modules.
    """

    input_ids: torch.Tensor
    """int64[T]"""
    position_ids: torch.Tensor
    """int64[T], from 0 in each sequence"""
    cu_seqlens: torch.Tensor
    """int32[S + 1], borders of the sequences"""
    labels: torch.Tensor
    """int64[T], shifted"""
    target_positions: torch.Tensor
    """int64[K], where a label is not ignored: known on the host, so the device is never asked"""
    max_seqlen: int
    pixel_values: torch.Tensor | None
    """float32[V, 3, H, W] in [0, 1]; None where their features are read"""
    image_positions: torch.Tensor | None
    """int64[image tokens], ascending"""
    points: torch.Tensor | None
    """float32[C, P, 6]; None where their features are read"""
    point_positions: torch.Tensor | None
    """int64[point tokens], ascending"""
    sample_ids: tuple[str, ...]
    image_features: torch.Tensor | None = None
    """[V, N, W], stored outputs of the image encoder"""
    point_features: torch.Tensor | None = None
    """[C, N, W], stored outputs of the point encoder"""

    @property
    def num_targets(self) -> int:
        """Tokens that the pack's loss sums over."""
        return len(self.target_positions)

    @property
    def num_tokens(self) -> int:
        """Tokens of the pack, modality placeholders included."""
        return len(self.input_ids)

    def model_inputs(self) -> dict[str, torch.Tensor | int | None]:
        """Keyword arguments of `CadMllm.forward`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sample_ids"}

    def to(self, device: torch.device, *, pin: bool = False) -> Pack:
        """A copy on `device`, or in pinned host memory (`pin`) to be copied without waiting."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved[field.name] = value.pin_memory() if pin else value.to(device, non_blocking=True)
        return replace(self, **moved)


def collate(
    examples: Sequence[Example],
    shape: ExampleShape,
    *,
    use_images: bool,
    use_points: bool,
    filler_id: int,
    features: SplitFeatures | None = None,
) -> Pack:
    """Join examples into a pack; an empty one becomes a single token that predicts nothing.

    With `features`, from which the examples were made, the pack holds features of views and clouds and nothing of themselves.
    """
    ids = [example.input_ids for example in examples] or [np.array([filler_id], dtype=np.int64)]
    labels = [example.labels for example in examples] or [np.array([IGNORED], dtype=np.int64)]
    lengths = [len(row) for row in ids]
    borders = np.concatenate([[0], np.cumsum(lengths)])
    image_positions, point_positions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for example, start in zip(examples, borders[:-1], strict=False):
        image_positions.append(np.arange(start, start + example.num_image_tokens))
        after = start + example.num_image_tokens
        point_positions.append(np.arange(after, after + example.num_point_tokens))
    if features is None:
        shown = _shown(examples, shape, use_images, use_points)
    else:
        shown = _stored(examples, features, use_images, use_points)
    all_labels = np.concatenate(labels)
    return Pack(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        labels=torch.from_numpy(all_labels),
        target_positions=torch.from_numpy(np.flatnonzero(all_labels != IGNORED)),
        max_seqlen=max(lengths),
        image_positions=torch.from_numpy(np.concatenate(image_positions)) if use_images else None,
        point_positions=torch.from_numpy(np.concatenate(point_positions)) if use_points else None,
        sample_ids=tuple(example.sample_id for example in examples),
        **shown,
    )


def _shown(
    examples: Sequence[Example], shape: ExampleShape, use_images: bool, use_points: bool
) -> dict[str, torch.Tensor | None]:
    """The views and clouds of the pack, or a dummy."""
    views = [example.pixel_values for example in examples if example.pixel_values is not None]
    clouds = [example.points for example in examples if example.points is not None]
    return {
        "pixel_values": torch.from_numpy(np.concatenate(views) if views else dummy_views(shape))
        if use_images
        else None,
        "points": torch.from_numpy(np.stack(clouds) if clouds else dummy_cloud(shape)) if use_points else None,
    }


def _stored(
    examples: Sequence[Example], features: SplitFeatures, use_images: bool, use_points: bool
) -> dict[str, torch.Tensor | None]:
    """The features of the pack's views and clouds, or a dummy."""
    views = [example.image_features for example in examples if example.image_features is not None]
    clouds = [example.point_features for example in examples if example.point_features is not None]
    return {
        "pixel_values": None,
        "points": None,
        "image_features": torch.cat(views or [features.dummy("image")]) if use_images else None,
        "point_features": torch.cat(clouds or [features.dummy("point")]) if use_points else None,
    }


def made_for(device: torch.device, make: Callable[[Order], Pack]) -> Callable[[Order], Pack]:
    """`make`, whose packs lie in page-locked memory where they go to a GPU, so that their way there costs the loop nothing."""
    if device.type != "cuda":
        return make
    return lambda order: make(order).to(device, pin=True)


def dummy_views(shape: ExampleShape) -> np.ndarray:
    """float32[1, 3, H, W]: a grey view, finite through any encoder, whose features go nowhere but into the graph."""
    return np.full((1, 3, shape.image_size, shape.image_size), 0.5, dtype=np.float32)


def dummy_cloud(shape: ExampleShape) -> np.ndarray:
    """float32[1, P, 6]: points on a line with unit normals, finite through any encoder."""
    cloud = np.zeros((1, shape.num_points, 6), dtype=np.float32)
    cloud[0, :, 0] = np.linspace(-0.5, 0.5, shape.num_points)
    cloud[0, :, 5] = 1.0
    return cloud
