"""Solids and meshes as files for other programs; a file appears whole under its name or not at all."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cadtrain.errors import DataError
from cadtrain.geometry.mesh import Mesh

if TYPE_CHECKING:
    from cadtrain.geometry.kernel import Solid

MM_PER_UNIT = 1000.0

_Z_UP_TO_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
_GLB_COLOR = (110, 142, 184, 255)
"""Steel blue, as sRGB bytes."""

_STL_RECORD = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def write_step(solid: Solid, path: str | Path) -> None:
    """Write a solid as STEP in millimetres. Raises `GeometryError` of kind `step`, `OSError`."""
    from cadtrain.geometry import kernel

    with _replacing(Path(path)) as temporary:
        kernel.write_step(solid, temporary)


def write_stl(mesh: Mesh, path: str | Path, *, scale: float = MM_PER_UNIT) -> None:
    """Write a mesh as binary STL, in millimetres for a mesh in metres. Raises `OSError`."""
    corners = mesh.corners * scale  # [M, 3, 3]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    records = np.zeros(len(corners), dtype=_STL_RECORD)
    records["normal"] = normals / np.where(lengths > 0, lengths, 1)
    records["corners"] = corners
    with _replacing(Path(path)) as temporary:
        temporary.write_bytes(b"cadtrain".ljust(80) + struct.pack("<I", len(records)) + records.tobytes())


def write_glb(mesh: Mesh, path: str | Path) -> None:
    """Write a mesh as binary glTF with its normals: in metres for a mesh in metres, and turned so that y points up.

    glTF wants y up where designs have z: a point (x, y, z) becomes (x, z, -y). Raises `OSError`.
    """
    import trimesh

    surface = trimesh.Trimesh(
        vertices=mesh.vertices @ _Z_UP_TO_Y_UP.T,
        faces=mesh.triangles,
        vertex_normals=mesh.normals @ _Z_UP_TO_Y_UP.T,
        process=False,
    )
    material = trimesh.visual.material.PBRMaterial(
        name="part", baseColorFactor=_GLB_COLOR, metallicFactor=0.1, roughnessFactor=0.6
    )
    surface.visual = trimesh.visual.TextureVisuals(material=material)
    data = trimesh.exchange.gltf.export_glb(trimesh.Scene(surface), include_normals=True)
    with _replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def read_stl(path: str | Path) -> Mesh:
    """The mesh in a binary STL file, in the file's unit. Raises `DataError` for any other content."""
    where = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}.", where=where) from error
    count = struct.unpack("<I", data[80:84])[0] if len(data) >= 84 else -1
    if count <= 0 or len(data) != 84 + count * _STL_RECORD.itemsize:
        raise DataError(f"is no binary STL file: {len(data)} bytes do not hold {max(count, 0)} triangles.", where=where)
    corners = np.frombuffer(data, dtype=_STL_RECORD, offset=84)["corners"].astype(np.float64)
    if not np.isfinite(corners).all():
        raise DataError("holds coordinates that are not finite.", where=where)
    return Mesh.from_triangles(corners.reshape(-1, 3), np.arange(3 * count).reshape(-1, 3))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well and vanishes when it does not."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".tmp{path.suffix}")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files for their owner only; a result is for whom the umask says.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
