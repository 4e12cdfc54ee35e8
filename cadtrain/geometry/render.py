"""Shaded pictures of meshes by numpy alone: no display, no GL, the same pixels on every machine.

Eight fixed cameras look from the corners of a cube at the middle of the mesh's box, without perspective; the box's
sphere fills the picture, so that all views of a part have one scale. Faces are shaded by their direction, drawn apart
by dark edges, on white.

A triangle is drawn as spans, the runs of samples that it covers in one row, and the nearest span wins each sample. Rows
are drawn in bands: what a band needs stays in the processor's cache, which is several times faster than one pass over
the whole picture.

M triangles that face the viewer, S spans, F fragments (a span x a sample), H x W samples of the doubled picture.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cadtrain.errors import GeometryError
from cadtrain.geometry.mesh import FloatArray, IntArray, Mesh

NUM_CAMERAS = 8
BACKGROUND = 255
PNG_COMPRESS_LEVEL = 3
"""Twice as fast as level 6, for a sixth more bytes."""
_OVERSAMPLING = 2  # `_blocks` is written for two
_MARGIN = 0.96
_EDGE_SHADE = 0.25
_BASE_COLOR = np.array([176.0, 196.0, 222.0], dtype=np.float32)
"""Light steel blue: far from the white ground and from the dark edges."""
_LIGHT = np.array([0.35, 0.55, 0.76])
"""Towards the light: right, up, towards the viewer."""
_BAND_SAMPLES = 1 << 15
_DEPTH_STEPS = float(1 << 29)
_NOTHING = np.iinfo(np.int64).max


def camera_axes(camera_index: int) -> FloatArray:
    """float64[3, 3]: rows right, up and towards the viewer of a camera.

    Cameras 0..3 stand above at azimuths 45, 135, 225, 315 degrees, cameras 4..7 below at the same azimuths; z is up.
    """
    if not 0 <= camera_index < NUM_CAMERAS:
        raise ValueError(f"camera {camera_index} does not exist; there are 0..{NUM_CAMERAS - 1}")
    azimuth = np.deg2rad(45 + 90 * (camera_index % 4))
    # Not the cube's diagonal: from there a cube's front and back corners coincide and its depth cannot be read.
    elevation = np.deg2rad(30 if camera_index < 4 else -30)
    towards = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    return np.stack([right, np.cross(towards, right), towards])


def render_view(mesh: Mesh, camera_index: int, size: int) -> NDArray[np.uint8]:
    """A picture of the mesh: uint8[size, size, 3]. Raises `GeometryError` of kind `empty` for a mesh without extent."""
    return render_views(mesh, (camera_index,), size)[0]


def render_views(mesh: Mesh, camera_indices: Iterable[int], size: int) -> list[NDArray[np.uint8]]:
    """`render_view` for several cameras."""
    return [_render(mesh, camera_axes(index), size) for index in camera_indices]


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """The picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=PNG_COMPRESS_LEVEL)
    return buffer.getvalue()


def _render(mesh: Mesh, axes: FloatArray, size: int) -> NDArray[np.uint8]:
    samples = size * _OVERSAMPLING
    scene = _scene(mesh, axes, samples)
    faces = np.full((samples, samples), -1, dtype=np.int32)
    tint = np.zeros((samples, samples), dtype=np.float32)
    spans = _spans(scene, samples)
    band_rows = max(1, _BAND_SAMPLES // samples)
    tops = range(0, samples, band_rows)
    limits = np.searchsorted(spans.rows, [*tops, samples])
    for top, begin, end in zip(tops, limits[:-1], limits[1:], strict=True):
        if begin < end:
            band = slice(top, top + band_rows)
            _draw(spans.part(begin, end), scene, top, faces[band], tint[band])
    return _developed(faces, tint)


def _developed(faces: NDArray[np.int32], tint: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The picture in colour and half as large: int32[H, W] faces and float32[H, W] light to uint8[H/2, W/2, 3]."""
    edges = _edges(faces)
    # A sample is either ground or part: two grey pictures, of which only the small sums are coloured.
    ground = (faces < 0) * np.where(edges, np.uint8(1), np.uint8(4))  # in quarters, as `_EDGE_SHADE` is one
    light = tint * np.where(edges, np.float32(_EDGE_SHADE), np.float32(1))
    white = _blocks(ground) * np.float32(BACKGROUND / 16) + np.float32(0.5)
    shade = _blocks(light) * np.float32(0.25)
    picture = np.empty((*shade.shape, 3), dtype=np.uint8)
    for channel, strength in enumerate(_BASE_COLOR):
        picture[:, :, channel] = np.minimum(shade * strength + white, np.float32(255))
    return picture


def _blocks(image: NDArray[Any]) -> NDArray[Any]:
    """Sums over blocks of 2 x 2."""
    rows = image[::2] + image[1::2]
    return rows[:, ::2] + rows[:, 1::2]


def _edges(faces: NDArray[np.int32]) -> NDArray[np.bool_]:
    """bool[H, W]: samples whose right or lower neighbour shows another face, or the ground."""
    edges = np.zeros(faces.shape, dtype=bool)
    right, down = faces[:, :-1] != faces[:, 1:], faces[:-1] != faces[1:]
    edges[:, :-1] |= right
    edges[:, 1:] |= right
    edges[:-1] |= down
    edges[1:] |= down
    return edges


# ------------------------------------------------------------------------------------------------- triangles


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """The triangles to draw, seen from one camera."""

    corners: FloatArray
    """float64[M, 3, 2]: x to the right and y downwards, in samples."""
    depth: FloatArray
    """float64[M, 3]: coefficients (x, y, 1) of the depth, from -1 (near) to 1."""
    light: FloatArray
    """float64[M, 3]: coefficients (x, y, 1) of the light on it."""
    faces: NDArray[np.int32]
    """int32[M]."""


def _scene(mesh: Mesh, axes: FloatArray, samples: int) -> _Scene:
    low, high = mesh.bounds
    radius = float(np.linalg.norm(high - low)) / 2
    if not radius > 0:
        raise GeometryError("empty", "the mesh has no extent to draw")
    view = (mesh.vertices - (low + high) / 2) @ (axes.T * (_MARGIN / radius))  # [N, 3] in [-1, 1]
    screen = np.empty((len(view), 2))
    screen[:, 0] = (view[:, 0] + 1) * (samples / 2)
    screen[:, 1] = (1 - view[:, 1]) * (samples / 2)
    corners = screen[mesh.triangles]
    (bx, by), (cx, cy) = (corners[:, 1] - corners[:, 0]).T, (corners[:, 2] - corners[:, 0]).T
    doubled = bx * cy - by * cx
    # The picture's y axis points down, which turns counter-clockwise into clockwise: towards the viewer is negative.
    # The backs of a closed surface are hidden by its front.
    kept = np.flatnonzero(doubled < -1e-9 if mesh.is_watertight else np.abs(doubled) > 1e-9)
    triangles, corners = mesh.triangles[kept], corners[kept]
    return _Scene(
        corners,
        _planes(corners, -view[:, 2][triangles]),
        _planes(corners, _light(mesh, axes)[triangles]),
        mesh.face_ids[kept],
    )


def _light(mesh: Mesh, axes: FloatArray) -> FloatArray:
    """float64[N]: the light on each vertex. It is nearly linear in the normal, so that it interpolates like normals."""
    direction = _LIGHT / np.linalg.norm(_LIGHT)
    normals = mesh.normals @ axes.T
    falling = normals @ direction
    # Open surfaces show their backs.
    return 0.42 + 0.58 * np.maximum(np.where(normals[:, 2] < -0.2, -falling, falling), 0.0)


def _planes(corners: FloatArray, values: FloatArray) -> FloatArray:
    """Coefficients (x, y, 1) of the linear function with `values` [M, 3] at the corners: float64[M, 3]."""
    ax, ay = corners[:, 0, 0], corners[:, 0, 1]
    bx, by = corners[:, 1, 0] - ax, corners[:, 1, 1] - ay
    cx, cy = corners[:, 2, 0] - ax, corners[:, 2, 1] - ay
    determinant = bx * cy - by * cx
    vb, vc = values[:, 1] - values[:, 0], values[:, 2] - values[:, 0]
    along_x = (vb * cy - vc * by) / determinant
    along_y = (vc * bx - vb * cx) / determinant
    return np.stack([along_x, along_y, values[:, 0] - along_x * ax - along_y * ay], axis=1)


# ------------------------------------------------------------------------------------------------- spans


@dataclass(frozen=True, slots=True, eq=False)
class _Spans:
    """Runs of samples, by row: int64[S] arrays."""

    rows: IntArray
    first: IntArray
    """The first covered column."""
    counts: IntArray
    owners: IntArray
    """Which triangle."""

    def part(self, begin: int, end: int) -> _Spans:
        """Those from `begin` to `end`."""
        return _Spans(self.rows[begin:end], self.first[begin:end], self.counts[begin:end], self.owners[begin:end])


def _spans(scene: _Scene, samples: int) -> _Spans:
    """Which samples each triangle covers: those whose middle lies inside."""
    ordered = np.take_along_axis(scene.corners, np.argsort(scene.corners[:, :, 1], axis=1)[:, :, None], axis=1)
    tops = np.maximum(np.ceil(ordered[:, 0, 1] - 0.5), 0).astype(np.int64)
    ends = np.minimum(np.ceil(ordered[:, 2, 1] - 0.5), samples).astype(np.int64)
    rows, owners = _expanded(tops, ends - tops)
    # From the highest corner one side runs to the lowest, the other one over the middle corner.
    slopes = [_slope(ordered[:, a], ordered[:, b]) for a, b in ((0, 2), (0, 1), (1, 2))]
    (x0, y0), (x1, y1) = ordered[:, 0].T, ordered[:, 1].T
    y = rows + 0.5
    long_side = (x0 - y0 * slopes[0])[owners] + y * slopes[0][owners]
    upper = (y < y1[owners]).astype(np.int64)
    choice = owners * 2 + upper
    offsets = np.stack([x1 - y1 * slopes[2], x0 - y0 * slopes[1]], axis=1).reshape(-1)
    short_side = offsets[choice] + y * np.stack([slopes[2], slopes[1]], axis=1).reshape(-1)[choice]
    first = np.maximum(np.ceil(np.minimum(long_side, short_side) - 0.5), 0).astype(np.int64)
    ends = np.minimum(np.ceil(np.maximum(long_side, short_side) - 0.5), samples).astype(np.int64)
    order = np.flatnonzero(ends > first)
    order = order[np.argsort(rows[order].astype(np.int16), kind="stable")]
    return _Spans(rows[order], first[order], (ends - first)[order], owners[order])


def _slope(start: FloatArray, end: FloatArray) -> FloatArray:
    """float64[M]: how x changes with y from one point to another; 0 where y does not change."""
    rise = end[:, 1] - start[:, 1]
    return np.divide(end[:, 0] - start[:, 0], rise, out=np.zeros(len(rise)), where=rise > 1e-9)


def _expanded(first: IntArray, counts: IntArray) -> tuple[IntArray, IntArray]:
    """`first[i], first[i] + 1, ...` for `counts[i]` values each, and the i of every value."""
    counts = np.maximum(counts, 0)
    owners = np.repeat(np.arange(len(first)), counts)
    starts = np.cumsum(counts) - counts
    return np.arange(len(owners)) + (first - starts)[owners], owners


def _draw(spans: _Spans, scene: _Scene, top: int, faces: NDArray[np.int32], tint: NDArray[np.float32]) -> None:
    """Draw one band's spans into its samples: int32[R, W] and float32[R, W], whose first row is row `top`."""
    width = faces.shape[1]
    numbers = np.arange(len(spans.rows))
    starts = np.cumsum(spans.counts) - spans.counts
    beginnings = (spans.rows - top) * width + spans.first
    owners = np.repeat(numbers, spans.counts)  # [F]
    pixels = np.repeat(beginnings - starts, spans.counts) + np.arange(len(owners))
    winners = np.full(faces.size, -1)
    winners[pixels] = owners
    # Few samples are covered twice where backs are not drawn: only there depths are compared.
    (lost,) = np.nonzero(winners[pixels] != owners)
    if len(lost):
        _settle(winners, pixels[lost], owners[lost], *_along(scene.depth, spans, beginnings))
    (covered,) = np.nonzero(winners >= 0)
    owners = winners[covered]
    faces.reshape(-1)[covered] = scene.faces[spans.owners][owners]
    constant, slope = _along(scene.light, spans, beginnings)
    tint.reshape(-1)[covered] = np.minimum(np.maximum(constant[owners] + slope[owners] * covered, 0.3), 1.05)


def _along(planes: FloatArray, spans: _Spans, beginnings: IntArray) -> tuple[FloatArray, FloatArray]:
    """The linear functions `planes` of the spans' triangles as constant and slope over the number of the band's
    sample: two float64[S]."""
    along_x, along_y, at_origin = planes[spans.owners].T
    return along_x * (spans.first + 0.5 - beginnings) + along_y * (spans.rows + 0.5) + at_origin, along_x


def _settle(winners: IntArray, pixels: IntArray, losers: IntArray, constant: FloatArray, slope: FloatArray) -> None:
    """Give each of `pixels` to the nearest of its spans: the one that `winners` holds and those in `losers`."""
    nearest = np.full(len(winners), _NOTHING)
    for owners in (losers, winners[pixels]):
        # Depth and span in one number: the least tells the nearest span, and the same one every time.
        # A sliver's depth can run away from that of its corners, and out of the number.
        depth = np.minimum(np.maximum(constant[owners] + slope[owners] * pixels, -1.5), 1.5)
        np.minimum.at(nearest, pixels, ((depth + 2) * _DEPTH_STEPS).astype(np.int64) << 32 | owners)
    winners[pixels] = nearest[pixels] & 0xFFFFFFFF
