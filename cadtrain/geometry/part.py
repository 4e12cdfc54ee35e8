"""Everything that training needs of one design's solid, made in one go."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cadtrain.cad.sequence import BoundingBox, CadSequence
from cadtrain.errors import GeometryError
from cadtrain.geometry.mesh import Mesh
from cadtrain.geometry.render import encode_png, render_views
from cadtrain.geometry.sample import Sampling, sample_surface

PART_VERSION = 2
"""Raised whenever the same arguments of `make_part` give other points or pictures; datasets are kept apart by it."""
UNIT_CUBE_SIDE = 2.0
"""Longest side of the box around a part's points, so that they fill [-1, 1]^3."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A design's solid as data.

    `points` lie in the unit frame: the middle of the solid's box at the origin, its longest side from -1 to 1, axes as
    in the design. Everything else is in the design's own frame and unit.
    """

    points: NDArray[np.float32]
    """float32[P, 6]: position and outward unit normal."""
    images: list[bytes]
    """One PNG per asked camera."""
    volume: float
    area: float
    bounding_box: BoundingBox
    num_faces: int
    is_valid: bool
    """Whether the kernel's own check finds no fault."""
    is_watertight: bool
    """Whether the mesh is closed (`Mesh.is_watertight`)."""
    seconds: float
    """How long it took."""


def make_part(
    sequence: CadSequence,
    *,
    num_points: int,
    camera_indices: tuple[int, ...],
    image_size: int,
    seed: int,
    sampling: Sampling = "area",
) -> Part:
    """Build, check, mesh, sample and draw a design; the same arguments give the same part.

    Raises `GeometryError` with the kinds of `kernel.build_solid` and `kernel.tessellate`, and `empty` for a solid
    without volume.
    """
    from cadtrain.geometry import kernel

    start = time.perf_counter()
    solid = kernel.build_solid(sequence)
    box, volume = kernel.bounding_box(solid), kernel.volume(solid)
    longest = max(box.size)
    if not volume > 1e-12 * longest**3:
        raise GeometryError("empty", f"the solid's volume is {volume:g} in a box of {longest:g}")
    mesh = kernel.tessellate(solid)
    views = render_views(mesh, camera_indices, image_size)
    return Part(
        points=sample_surface(to_unit_frame(mesh, box), num_points, np.random.default_rng(seed), sampling=sampling),
        images=[encode_png(view) for view in views],
        volume=volume,
        area=kernel.area(solid),
        bounding_box=box,
        num_faces=kernel.num_faces(solid),
        is_valid=kernel.is_valid(solid),
        is_watertight=mesh.is_watertight,
        seconds=time.perf_counter() - start,
    )


def to_unit_frame(mesh: Mesh, box: BoundingBox) -> Mesh:
    """The mesh moved and scaled so that the box's middle is the origin and its longest side runs from -1 to 1."""
    return mesh.transformed(UNIT_CUBE_SIDE / max(box.size), np.array(box.center))


@dataclass(frozen=True, slots=True)
class PartRequest:
    """One item for a pool of kernel processes: a design and its own seed."""

    sequence: CadSequence
    seed: int


def make_requested_part(
    request: PartRequest,
    *,
    num_points: int,
    camera_indices: tuple[int, ...],
    image_size: int,
    sampling: Sampling = "area",
) -> Part:
    """`make_part` for a request."""
    return make_part(
        request.sequence,
        num_points=num_points,
        camera_indices=camera_indices,
        image_size=image_size,
        seed=request.seed,
        sampling=sampling,
    )


def part_maker(
    *, num_points: int, camera_indices: tuple[int, ...], image_size: int, sampling: Sampling = "area"
) -> partial[Part]:
    """A picklable function from `PartRequest` to `Part`, for `sandbox.KernelPool.map`."""
    return partial(
        make_requested_part,
        num_points=num_points,
        camera_indices=camera_indices,
        image_size=image_size,
        sampling=sampling,
    )
