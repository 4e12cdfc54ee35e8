"""Solids by OpenCascade: the only package that imports it.

Everything that goes in or comes out here is in the design's unit, metres. Inside, a part is built with its longest side
1 long: the kernel takes points closer than 1e-7 for one, while designs range from 0.2 mm to 23 m and carry noise of
1e-8 m. Built in millimetres, small parts lose faces and large ones keep cracks that are only noise.

The kernel can run for minutes or take the process down: callers who build many designs do it in `sandbox`'s processes.
"""

from __future__ import annotations

from cadtrain.errors import EnvironmentFault

try:
    import OCP.gp  # noqa: F401
except ImportError as error:
    raise EnvironmentFault(
        f"the CAD kernel cannot be loaded: {error}.",
        hint="It needs the packages `libgl1` and `libx11-6` (`apt install libgl1 libx11-6`)."
        if ".so" in str(error)
        else "Install `cadquery-ocp-novtk`.",
    ) from error

from cadtrain.geometry.kernel.body import Solid, scaled
from cadtrain.geometry.kernel.build import build_solid
from cadtrain.geometry.kernel.files import read_step, write_step
from cadtrain.geometry.kernel.measure import area, bounding_box, is_valid, num_faces, num_solids, volume
from cadtrain.geometry.kernel.meshing import tessellate

__all__ = [
    "Solid", "area", "bounding_box", "build_solid", "is_valid", "num_faces", "num_solids", "read_step", "scaled",
    "tessellate", "volume", "write_step",
]  # fmt: skip
