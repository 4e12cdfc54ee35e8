"""What a body measures."""

from __future__ import annotations

from OCP.Bnd import Bnd_Box
from OCP.BRepBndLib import BRepBndLib
from OCP.BRepGProp import BRepGProp
from OCP.GProp import GProp_GProps

from cadtrain.cad.sequence import BoundingBox
from cadtrain.errors import GeometryError
from cadtrain.geometry.kernel.body import Solid, faces_of, passes_check, solids_of


def is_valid(solid: Solid) -> bool:
    """Whether topology and geometry of the body agree (`BRepCheck_Analyzer`)."""
    return passes_check(solid.shape) if solid.known_validity is None else solid.known_validity


def volume(solid: Solid) -> float:
    """Cubic metres, always positive."""
    properties = GProp_GProps()
    BRepGProp.VolumeProperties_s(solid.shape, properties)
    return abs(float(properties.Mass())) * solid.unit**3


def area(solid: Solid) -> float:
    """Square metres of surface."""
    properties = GProp_GProps()
    BRepGProp.SurfaceProperties_s(solid.shape, properties)
    return float(properties.Mass()) * solid.unit**2


def bounding_box(solid: Solid) -> BoundingBox:
    """The smallest box along the axes, in metres, to the kernel's tolerance."""
    box = Bnd_Box()
    BRepBndLib.AddOptimal_s(solid.shape, box, False, False)
    if box.IsVoid():
        raise GeometryError("empty", "the body has no extent")
    corners = [(p.X() * solid.unit, p.Y() * solid.unit, p.Z() * solid.unit) for p in (box.CornerMin(), box.CornerMax())]
    return BoundingBox(corners[0], corners[1])


def num_faces(solid: Solid) -> int:
    """Faces of the body."""
    return sum(1 for _ in faces_of(solid.shape))


def num_solids(solid: Solid) -> int:
    """Separate solids in the body."""
    return sum(1 for _ in solids_of(solid.shape))
