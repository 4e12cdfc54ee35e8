"""Bodies as triangle meshes."""

from __future__ import annotations

from typing import Any

import numpy as np
from OCP.BRep import BRep_Tool
from OCP.BRepAdaptor import BRepAdaptor_Surface
from OCP.BRepLib import BRepLib_ToolTriangulatedShape
from OCP.BRepMesh import BRepMesh_IncrementalMesh
from OCP.BRepTools import BRepTools
from OCP.GeomAbs import GeomAbs_Cylinder, GeomAbs_Plane
from OCP.IMeshTools import IMeshTools_MeshAlgoType, IMeshTools_Parameters
from OCP.TopAbs import TopAbs_REVERSED
from OCP.TopLoc import TopLoc_Location

from cadtrain.errors import GeometryError
from cadtrain.geometry.kernel.body import KERNEL_ERRORS, Solid, faces_of, reason
from cadtrain.geometry.kernel.measure import bounding_box
from cadtrain.geometry.mesh import FloatArray, IntArray, Mesh

LINEAR_DEFLECTION = 1e-3
"""Largest distance between mesh and surface, of the longest side of the solid's box."""
ANGULAR_DEFLECTION_RAD = 0.2

_FAST = IMeshTools_MeshAlgoType.IMeshTools_MeshAlgoType_Delabella
_THOROUGH = IMeshTools_MeshAlgoType.IMeshTools_MeshAlgoType_Watson


def tessellate(
    solid: Solid,
    *,
    linear_deflection: float = LINEAR_DEFLECTION,
    angular_deflection_rad: float = ANGULAR_DEFLECTION_RAD,
) -> Mesh:
    """The body's surface as triangles, in metres, with the surfaces' own outward normals.

    `linear_deflection` is relative to the longest side of the body's box. The faster of the kernel's two ways to mesh
    is taken, and the other where that leaves a surface open. Raises `GeometryError` of kind `tessellation`.
    """
    try:
        longest = max(bounding_box(solid).size) / solid.unit
        mesh = _meshed(solid, _FAST, linear_deflection * longest, angular_deflection_rad)
        if mesh is None or not mesh.is_watertight:
            BRepTools.Clean_s(solid.shape, True)
            mesh = _meshed(solid, _THOROUGH, linear_deflection * longest, angular_deflection_rad)
    except KERNEL_ERRORS as error:
        raise GeometryError("tessellation", reason(error)) from error
    if mesh is None:
        raise GeometryError("tessellation", "no face could be meshed")
    if not np.isfinite(mesh.vertices).all() or not np.isfinite(mesh.normals).all():
        raise GeometryError("tessellation", "the mesh holds values that are not finite")
    return mesh


def _meshed(solid: Solid, algorithm: Any, deflection: float, angle_rad: float) -> Mesh | None:
    parameters = IMeshTools_Parameters()
    parameters.MeshAlgo = algorithm
    parameters.Deflection = deflection
    parameters.Angle = angle_rad
    # Points inside a cylinder's face only help where it is far from its border; the kernel still adds those itself.
    parameters.InternalVerticesMode = False
    BRepMesh_IncrementalMesh(solid.shape, parameters)
    parts = [part for face in faces_of(solid.shape) if (part := _face_mesh(face)) is not None]
    if not parts:
        return None
    starts = np.cumsum([0] + [len(vertices) for vertices, _, _ in parts])
    return Mesh(
        vertices=np.concatenate([vertices for vertices, _, _ in parts]) * solid.unit,
        triangles=np.concatenate([triangles + start for (_, triangles, _), start in zip(parts, starts, strict=False)]),
        normals=np.concatenate([normals for _, _, normals in parts]),
        face_ids=np.repeat(np.arange(len(parts), dtype=np.int32), [len(triangles) for _, triangles, _ in parts]),
    )


def _face_mesh(face: Any) -> tuple[FloatArray, IntArray, FloatArray] | None:
    """One face's vertices (in kernel units), triangles and normals; None for a face that the mesher left out."""
    location = TopLoc_Location()
    triangulation = BRep_Tool.Triangulation_s(face, location)
    if triangulation is None:
        return None
    nodes = [triangulation.Node(index) for index in range(1, triangulation.NbNodes() + 1)]
    if not location.IsIdentity():
        transformation = location.Transformation()
        nodes = [point.Transformed(transformation) for point in nodes]
    vertices = np.array([point.Coord() for point in nodes], dtype=np.float64)
    count = triangulation.NbTriangles()
    triangles = np.array([triangulation.Triangle(index).Get() for index in range(1, count + 1)], dtype=np.int64)
    triangles = triangles.reshape(-1, 3) - 1
    normals = _normals(face, vertices, triangulation, location)
    if face.Orientation() == TopAbs_REVERSED:
        triangles, normals = triangles[:, ::-1], -normals
    return vertices, triangles, normals


def _normals(face: Any, vertices: FloatArray, triangulation: Any, location: Any) -> FloatArray:
    """float64[N, 3]: the surface's normals at the vertices, before the face's orientation is looked at.

    Extruded lines and arcs make planes and cylinders, whose normals are had at once; other surfaces come from files.
    """
    surface = BRepAdaptor_Surface(face, False)
    kind = surface.GetType()
    if kind == GeomAbs_Plane:
        frame = surface.Plane().Position()
        normal = np.array(frame.Direction().Coord()) * (1.0 if frame.Direct() else -1.0)
        return np.tile(normal, (len(vertices), 1))
    if kind == GeomAbs_Cylinder:
        frame = surface.Cylinder().Position()
        axis = np.array(frame.Direction().Coord())
        offsets = vertices - np.array(frame.Location().Coord())
        radial = offsets - (offsets @ axis)[:, None] * axis
        lengths = np.linalg.norm(radial, axis=1, keepdims=True)
        if (lengths > 0).all():
            return radial / lengths * (1.0 if frame.Direct() else -1.0)
    BRepLib_ToolTriangulatedShape.ComputeNormals_s(face, triangulation)
    normals = [triangulation.Normal(index) for index in range(1, triangulation.NbNodes() + 1)]
    if not location.IsIdentity():
        transformation = location.Transformation()
        normals = [normal.Transformed(transformation) for normal in normals]
    return np.array([normal.Coord() for normal in normals], dtype=np.float64)
