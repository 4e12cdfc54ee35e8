"""Triangle meshes with surface normals, as numpy arrays.

Shapes: N vertices, M triangles, C connected edges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Mesh:
    """A surface as triangles, counter-clockwise seen from outside.

    Vertices are not shared between faces of the solid, so that each has its face's normal: neighbours meet in equal
    positions.
    """

    vertices: FloatArray
    """float64[N, 3], in the unit of what was meshed."""
    triangles: IntArray
    """int64[M, 3], rows of `vertices`."""
    normals: FloatArray
    """float64[N, 3], unit, outward, from the surface itself where the mesh comes from a solid."""
    face_ids: NDArray[np.int32]
    """int32[M], the solid's face that a triangle belongs to."""

    @classmethod
    def from_triangles(cls, vertices: NDArray[Any], triangles: NDArray[Any]) -> Mesh:
        """A mesh of bare triangles (an STL file): flat normals, coplanar or not every triangle its own vertices and
        face."""
        corners = np.asarray(vertices, dtype=np.float64)[np.asarray(triangles, dtype=np.int64)]  # [M, 3, 3]
        count = len(corners)
        normals = _unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
        indices = np.arange(3 * count, dtype=np.int64).reshape(count, 3)
        _, face_ids = np.unique(np.round(normals, 3), axis=0, return_inverse=True)
        return cls(
            corners.reshape(-1, 3), indices, np.repeat(normals, 3, axis=0), face_ids.reshape(-1).astype(np.int32)
        )

    @property
    def corners(self) -> FloatArray:
        """float64[M, 3, 3]: the three positions of each triangle."""
        return self.vertices[self.triangles]

    @property
    def triangle_areas(self) -> FloatArray:
        """float64[M]."""
        corners = self.corners
        (ax, ay, az), (bx, by, bz) = (corners[:, 1] - corners[:, 0]).T, (corners[:, 2] - corners[:, 0]).T
        areas: FloatArray = np.sqrt((ay * bz - az * by) ** 2 + (az * bx - ax * bz) ** 2 + (ax * by - ay * bx) ** 2) / 2
        return areas

    @property
    def area(self) -> float:
        """The surface's area."""
        return float(self.triangle_areas.sum())

    @property
    def volume(self) -> float:
        """The enclosed volume, negative where the triangles look inwards; of meaning for a watertight mesh only."""
        a, b, c = np.moveaxis(self.corners - self.bounds.mean(axis=0), 1, 0)
        return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)

    @property
    def bounds(self) -> FloatArray:
        """float64[2, 3]: lowest and highest corner of the box around all vertices."""
        return np.stack([self.vertices.min(axis=0), self.vertices.max(axis=0)])

    @cached_property
    def is_watertight(self) -> bool:
        """Whether the surface is closed: vertices at one place taken as one, every edge is run as often one way as the
        other.

        An edge along which two solids touch has four triangles and is closed too; `is_manifold` says whether there is
        one.
        """
        forward, backward = self._edge_uses()
        return bool(len(forward)) and bool((forward == backward).all())

    @property
    def is_manifold(self) -> bool:
        """Whether every edge has exactly two triangles, which run it in opposite directions."""
        forward, backward = self._edge_uses()
        return bool(len(forward)) and bool((forward == 1).all()) and bool((backward == 1).all())

    def _edge_uses(self) -> tuple[IntArray, IntArray]:
        """How often each undirected edge is run from its lower to its higher vertex, and back: two int64[C]."""
        edges = self._welded_triangles()[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
        low, high = edges.min(axis=1), edges.max(axis=1)
        _, index = np.unique(low * len(self.vertices) + high, return_inverse=True)
        is_forward = edges[:, 0] == low
        count = int(index.max(initial=-1)) + 1
        forward = np.bincount(index[is_forward], minlength=count)
        return forward, np.bincount(index[~is_forward], minlength=count)

    def _welded_triangles(self) -> IntArray:
        low, high = self.bounds
        step = max(float((high - low).max()), 1e-300) * 1e-7
        keys = np.round((self.vertices - low) / step).astype(np.int64)  # below 2^24
        # Two passes over packed numbers: sorting rows is ten times slower.
        _, index = np.unique(keys[:, 0] << 24 | keys[:, 1], return_inverse=True)
        _, index = np.unique(index.astype(np.int64) << 24 | keys[:, 2], return_inverse=True)
        welded = index.reshape(-1)[self.triangles]
        collapsed = (welded == np.roll(welded, 1, axis=1)).any(axis=1)
        kept: IntArray = welded[~collapsed].astype(np.int64)
        return kept

    def transformed(self, scale: float, offset: FloatArray) -> Mesh:
        """The mesh at `scale * (vertex - offset)`; `scale` is positive."""
        return Mesh((self.vertices - offset) * scale, self.triangles, self.normals, self.face_ids)


def _unit(vectors: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)
