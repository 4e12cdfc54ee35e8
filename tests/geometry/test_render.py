"""The renderer against a plain one: every sample asked of every triangle."""

from __future__ import annotations

import numpy as np
import pytest

from cadtrain.geometry import Mesh, render
from cadtrain.geometry.render import camera_axes, render_view, render_views

SIZE = 40


def soup(count: int, seed: int) -> Mesh:
    """Triangles at random that pierce and hide each other, some of them slivers; each is a face of its own."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-1, 1, size=(count, 3, 3))
    corners[::5, 2] = corners[::5, 0] * 0.999 + corners[::5, 1] * 0.001 + 1e-3
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    indices = np.arange(3 * count).reshape(-1, 3)
    return Mesh(corners.reshape(-1, 3), indices, np.repeat(normals, 3, axis=0), np.arange(count, dtype=np.int32))


def plainly_visible(mesh: Mesh, camera: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """int[H, W] nearest triangle at the middle of each sample, -1 for none; and where two are too near to tell."""
    low, high = mesh.bounds
    view = (mesh.vertices - (low + high) / 2) @ camera_axes(camera).T / (np.linalg.norm(high - low) / 2) * 0.96
    middles = (np.arange(samples) + 0.5) * 2 / samples - 1
    x, y = np.meshgrid(middles, -middles)
    depths = np.full((len(mesh.triangles), samples, samples), np.inf)
    for number, (a, b, c) in enumerate(view[mesh.triangles]):
        matrix = np.array([b[:2] - a[:2], c[:2] - a[:2]]).T
        u, v = np.linalg.solve(matrix, np.stack([x - a[0], y - a[1]]).reshape(2, -1)).reshape(2, samples, samples)
        inside = (u > 0) & (v > 0) & (u + v < 1)
        depths[number] = np.where(inside, -(a[2] + u * (b[2] - a[2]) + v * (c[2] - a[2])), np.inf)
    nearest = np.where(np.isfinite(depths.min(axis=0)), depths.argmin(axis=0), -1)
    first, second = np.sort(depths, axis=0)[:2]
    return nearest, np.isfinite(second) & (second < first + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_every_sample_shows_its_nearest_triangle(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = soup(40, seed)
    assert not mesh.is_watertight
    seen: list[np.ndarray] = []
    developed = render._developed

    def kept(faces: np.ndarray, tint: np.ndarray) -> np.ndarray:
        seen.append(faces.copy())
        return developed(faces, tint)

    monkeypatch.setattr(render, "_developed", kept)
    monkeypatch.setattr(render, "_BAND_SAMPLES", 1000)  # several bands, the last one shorter
    for camera in (0, 6):
        render_view(mesh, camera, SIZE)
        expected, tied = plainly_visible(mesh, camera, 2 * SIZE)
        assert (expected >= 0).mean() > 0.2
        assert (seen[-1] != expected)[~tied].mean() < 1e-3


def test_views_together_are_views_one_by_one() -> None:
    mesh = soup(20, 5)
    together = render_views(mesh, (3, 0, 7), SIZE)
    for camera, view in zip((3, 0, 7), together, strict=True):
        np.testing.assert_array_equal(view, render_view(mesh, camera, SIZE))
    assert render_views(mesh, (), SIZE) == []


def test_the_ground_is_white_and_the_edges_are_dark() -> None:
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    view = render_view(Mesh.from_triangles(corners, np.array([[0, 1, 2]])), 0, SIZE)
    assert (view[0, 0] == 255).all()
    assert view.min() < 80
    assert len(np.unique(view.reshape(-1, 3), axis=0)) > 3
