"""What a design's solid is: building, measuring, meshing, sampling, drawing and exporting it.

Nothing here loads the CAD kernel on import; `geometry.kernel` does, and whoever works on many designs leaves it to the
processes of `KernelPool`.
"""

from cadtrain.geometry.exchange import read_stl, write_glb, write_step, write_stl
from cadtrain.geometry.mesh import Mesh
from cadtrain.geometry.part import Part, PartRequest, make_part, part_maker
from cadtrain.geometry.render import NUM_CAMERAS, encode_png, render_view, render_views
from cadtrain.geometry.sample import SAMPLINGS, Sampling, farthest_points, sample_surface
from cadtrain.geometry.sandbox import Failure, KernelPool, Outcome

__all__ = [
    "NUM_CAMERAS", "SAMPLINGS", "Failure", "KernelPool", "Mesh", "Outcome", "Part", "PartRequest", "Sampling", "encode_png", "farthest_points",
    "make_part", "part_maker", "read_stl", "render_view", "render_views", "sample_surface", "write_glb", "write_step", "write_stl",
]  # fmt: skip
