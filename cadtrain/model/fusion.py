"""Puts the tokens of images and point clouds into the embeddings of a pack.

Legend: T tokens of the pack, G views or clouds, N tokens of one view or cloud, M placeholder positions, D width.
"""

from __future__ import annotations

import torch

from cadtrain.errors import UsageError


def scatter_features(
    embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, what: str
) -> torch.Tensor:
    """`embeddings` [T, D] with the first M rows of `features` [G, N, D] at the int64[M] `positions`.

    Views or clouds past the first M / N are not real: they touch nothing but keep their place in the graph, so that
    the modules they came from get a gradient (of zero) on every rank. All checks read shapes only and never the device.
    """
    groups, tokens, width = features.shape
    wanted = positions.shape[0]
    if wanted > groups * tokens:
        raise UsageError(
            f"the pack has {wanted} {what} placeholder positions but {groups} {what} inputs of {tokens} tokens give {groups * tokens} features."
        )
    if wanted % tokens:
        raise UsageError(
            f"the pack has {wanted} {what} placeholder positions, not a multiple of the {tokens} tokens of one {what}."
        )
    if width != embeddings.shape[1]:
        raise UsageError(
            f"{what} features are {width} wide, but the language model's embeddings {embeddings.shape[1]}."
        )
    # An empty slice still carries the graph: its gradient is a zero for every feature, and exactly zero, whereas
    # features * 0 would turn an infinite feature into NaN.
    rows = features.flatten(0, 1)[:wanted].to(embeddings.dtype)
    return embeddings.index_copy(0, positions, rows)
