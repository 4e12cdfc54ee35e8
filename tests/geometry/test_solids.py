"""Solids of known volume, and what is made of them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh

from cadtrain.cad import CadSequence, Extent, Operation, dequantize, normalize, quantize
from cadtrain.cad.sequence import SketchPlane
from cadtrain.errors import DataError, GeometryError
from cadtrain.geometry import (
    Mesh,
    Sampling,
    farthest_points,
    make_part,
    read_stl,
    render_view,
    sample_surface,
    write_glb,
    write_step,
    write_stl,
)
from tests.cad.designs import PLATE_WITH_HOLE, circle, design, polygon, rectangle, slot, step

kernel = pytest.importorskip("cadtrain.geometry.kernel", exc_type=ImportError)

pytestmark = pytest.mark.kernel

PLATE_VOLUME = (0.1 * 0.06 - math.pi * 0.02**2) * 0.01
PLATE_AREA = 2 * (0.1 * 0.06 - math.pi * 0.02**2) + (2 * 0.16 + 2 * math.pi * 0.02) * 0.01
SIDEWAYS = SketchPlane((0.5, 0.0, 0.5), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
CUBE = step(rectangle(0, 0, 1, 1), 1)
CUBE_ALONE = design(CUBE)


def scaled_plate(factor: float) -> CadSequence:
    f = factor
    return design(step(rectangle(0, 0, 0.1 * f, 0.06 * f), 0.01 * f, circle(0.05 * f, 0.03 * f, 0.02 * f)))


@pytest.mark.parametrize(
    ("sequence", "volume"),
    [
        (PLATE_WITH_HOLE, PLATE_VOLUME),
        (design(step(slot(3, 1), 2)), (3 * 2 + math.pi) * 2),
        (design(step(slot(3, 1).reversed(), 2)), (3 * 2 + math.pi) * 2),
        (design(step(polygon((0, 0), (2, 0), (0, 2)), -1.5)), 3.0),
        (design(step(rectangle(0, 0, 1, 1), 1, extent=Extent.SYMMETRIC)), 2.0),
        (design(step(rectangle(0, 0, 1, 1), 1, extent=Extent.TWO_SIDES, other=0.5)), 1.5),
        (design(step(rectangle(0, 0, 1, 1), -1, extent=Extent.TWO_SIDES, other=3)), 3.0),
        (design(CUBE, step(rectangle(0.5, 0, 1, 1), 1)), 1.5),
        (design(CUBE, step(rectangle(1, 0, 1, 1), 1, operation=Operation.JOIN)), 2.0),
        (design(CUBE, step(rectangle(5, 0, 1, 1), 1, operation=Operation.NEW)), 2.0),
        (design(CUBE, step(circle(0.5, 0.5, 0.25), 1, operation=Operation.CUT)), 1 - math.pi / 16),
        (design(CUBE, step(rectangle(0.5, 0.5, 9, 9), 0.5, operation=Operation.INTERSECT)), 0.125),
        (design(CUBE, step(circle(0.5, 0, 0.25), 9, plane=SIDEWAYS, operation=Operation.CUT)), 1 - math.pi / 32),
        (design(step(rectangle(0, 0, 1, 1), 1, operation=Operation.CUT)), 1.0),
        (design(step(rectangle(0, 0, 1, 1), 1, rectangle(0, 0.25, 0.5, 0.5))), 0.75),
        (design(step(rectangle(0, 0, 1, 1), 1, rectangle(-1, 0.25, 1.5, 0.5))), 0.75),
        (design(CUBE, *[step(rectangle(x / 4, 0, 0.125, 1), 2) for x in range(4)]), 1.5),
    ],
)  # fmt: skip
def test_volumes_are_those_of_the_formula(sequence: CadSequence, volume: float) -> None:
    solid = kernel.build_solid(sequence)
    assert kernel.is_valid(solid)
    assert kernel.volume(solid) == pytest.approx(volume, rel=1e-6)
    mesh = kernel.tessellate(solid)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(volume, rel=0.02)


@pytest.mark.parametrize("factor", [0.002, 1.0, 200.0])
def test_a_part_is_the_same_at_every_size(factor: float) -> None:
    solid = kernel.build_solid(scaled_plate(factor))
    assert kernel.volume(solid) == pytest.approx(PLATE_VOLUME * factor**3, rel=1e-6)
    assert kernel.bounding_box(solid).size == pytest.approx((0.1 * factor, 0.06 * factor, 0.01 * factor), rel=1e-5)
    assert kernel.num_faces(solid) == 7
    assert kernel.area(solid) == pytest.approx(PLATE_AREA * factor**2, rel=1e-6)
    assert kernel.tessellate(solid).is_manifold


def test_faces_of_one_surface_are_merged() -> None:
    solid = kernel.build_solid(design(CUBE, step(rectangle(1, 0, 1, 1), 1, operation=Operation.JOIN)))
    assert kernel.num_faces(solid) == 6
    assert kernel.num_solids(solid) == 1


def test_solids_that_touch_in_an_edge_are_closed_but_no_manifold() -> None:
    mesh = kernel.tessellate(kernel.build_solid(design(CUBE, step(rectangle(1, 1, 1, 1), 1))))
    assert mesh.is_watertight
    assert not mesh.is_manifold


@pytest.mark.parametrize(
    ("sequence", "kind"),
    [
        (CadSequence(()), "empty"),
        (design(CUBE, step(rectangle(-1, -1, 9, 9), 9, operation=Operation.CUT)), "empty"),
        (design(CUBE, step(rectangle(5, 5, 1, 1), 1, operation=Operation.INTERSECT)), "empty"),
        (design(step(rectangle(0, 0, 1, 1), 0)), "empty"),
    ],
)
def test_what_makes_no_solid_is_refused_by_kind(sequence: CadSequence, kind: str) -> None:
    with pytest.raises(GeometryError) as caught:
        make_part(sequence, num_points=8, camera_indices=(), image_size=8, seed=0)
    assert caught.value.kind == kind


def test_a_body_cut_away_whole_can_be_begun_again() -> None:
    gone = step(rectangle(-1, -1, 9, 9), 9, operation=Operation.CUT)
    again = step(rectangle(0, 0, 2, 1), 1, operation=Operation.JOIN)
    assert kernel.volume(kernel.build_solid(design(CUBE, gone, again))) == pytest.approx(2.0)


def test_the_grid_keeps_a_plates_volume() -> None:
    exact = kernel.volume(kernel.build_solid(normalize(PLATE_WITH_HOLE)))
    rounded = kernel.volume(kernel.build_solid(dequantize(quantize(PLATE_WITH_HOLE))))
    assert rounded == pytest.approx(exact, rel=0.03)


# -------------------------------------------------------------------------------------------------------------------- parts


def test_a_part_holds_points_pictures_and_measures() -> None:
    part = make_part(PLATE_WITH_HOLE, num_points=2000, camera_indices=(0, 5), image_size=64, seed=1)
    assert part.points.shape == (2000, 6)
    assert part.points.dtype == np.float32
    low, high = part.points[:, :3].min(axis=0), part.points[:, :3].max(axis=0)
    np.testing.assert_allclose(low, [-1, -0.6, -0.1], atol=0.02)
    np.testing.assert_allclose(high, [1, 0.6, 0.1], atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(part.points[:, 3:], axis=1), 1, atol=1e-4)
    assert [image[:4] for image in part.images] == [b"\x89PNG"] * 2
    assert part.volume == pytest.approx(PLATE_VOLUME)
    assert (part.num_faces, part.is_valid, part.is_watertight) == (7, True, True)
    assert part.bounding_box.size == pytest.approx((0.1, 0.06, 0.01), rel=1e-5)


def test_the_seed_alone_decides_the_points() -> None:
    first, same, other = (
        make_part(PLATE_WITH_HOLE, num_points=64, camera_indices=(), image_size=8, seed=seed).points
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_points_lie_on_the_surface_with_its_normals() -> None:
    mesh = kernel.tessellate(kernel.build_solid(design(step(circle(0, 0, 1), 2))))
    points = sample_surface(mesh, 4000, np.random.default_rng(0))
    on_side = np.abs(points[:, 5]) < 0.5
    radius = np.linalg.norm(points[on_side, :2], axis=1)
    np.testing.assert_allclose(radius, 1, atol=0.01)
    np.testing.assert_allclose(points[on_side, 3:5], points[on_side, :2] / radius[:, None], atol=0.01)
    # Two caps of pi against a side of 4 pi: a third of the points lies on the caps.
    assert on_side.mean() == pytest.approx(2 / 3, abs=0.03)


def test_farthest_points_are_spread_better_than_random_ones() -> None:
    mesh = kernel.tessellate(kernel.build_solid(PLATE_WITH_HOLE))

    def gaps(sampling: Sampling) -> np.ndarray:
        points = sample_surface(mesh, 300, np.random.default_rng(0), sampling=sampling)
        np.testing.assert_allclose(np.linalg.norm(points[:, 3:], axis=1), 1, atol=1e-4)
        between = np.linalg.norm(points[:, None, :3] - points[None, :, :3], axis=2)
        np.fill_diagonal(between, np.inf)
        return between.min(axis=1)

    assert gaps("farthest").min() > 5 * gaps("area").min()
    first, same = (
        make_part(PLATE_WITH_HOLE, num_points=64, camera_indices=(), image_size=8, seed=3, sampling="farthest").points
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, same)


def test_farthest_points_by_hand() -> None:
    line = np.array([[0.0, 0, 0], [1, 0, 0], [4, 0, 0], [10, 0, 0], [10, 0, 0]])
    assert farthest_points(line, 3).tolist() == [0, 3, 2]
    # Row 4 lies where row 3 does, and still no row is taken twice.
    assert sorted(farthest_points(line, 5).tolist()) == [0, 1, 2, 3, 4]
    assert farthest_points(line, 0).tolist() == []
    with pytest.raises(ValueError, match="6 of 5"):
        farthest_points(line, 6)


def test_normals_from_formulas_are_those_of_the_kernel() -> None:
    """Planes and cylinders, inside and outside, turned every way: the kernel's own normals are the other witness."""
    from cadtrain.geometry.kernel import meshing

    sequences = [
        PLATE_WITH_HOLE,
        design(CUBE, step(circle(0.5, 0, 0.25), 9, plane=SIDEWAYS, operation=Operation.CUT)),
        design(step(slot(3, 1), -2), step(circle(1, 0, 0.5), 3, operation=Operation.CUT)),
    ]
    for solid in map(kernel.build_solid, sequences):
        quick = kernel.tessellate(solid).normals
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(meshing, "GeomAbs_Plane", None)
            patch.setattr(meshing, "GeomAbs_Cylinder", None)
            slow = kernel.tessellate(solid).normals
        np.testing.assert_allclose(quick, slow, atol=1e-6)


def test_an_open_mesh_is_made_again_the_thorough_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from cadtrain.geometry.kernel import meshing

    whole, asked = meshing._meshed, []

    def broken_at_first(solid: object, algorithm: object, *rest: float) -> Mesh | None:
        asked.append(algorithm)
        mesh = whole(solid, algorithm, *rest)  # type: ignore[arg-type]
        assert mesh is not None
        return mesh if len(asked) > 1 else Mesh(mesh.vertices, mesh.triangles[:-1], mesh.normals, mesh.face_ids[:-1])

    monkeypatch.setattr(meshing, "_meshed", broken_at_first)
    assert kernel.tessellate(kernel.build_solid(PLATE_WITH_HOLE)).is_watertight
    assert asked == [meshing._FAST, meshing._THOROUGH]


def test_an_open_mesh_shows_its_inside() -> None:
    mesh = kernel.tessellate(kernel.build_solid(CUBE_ALONE))
    keep = mesh.face_ids != mesh.face_ids[mesh.normals[mesh.triangles[:, 0], 2].argmax()]
    box = Mesh(mesh.vertices, mesh.triangles[keep], mesh.normals, mesh.face_ids[keep])
    assert not box.is_watertight
    drawn = (render_view(box, 0, 64) < 250).any(axis=2)
    assert (drawn == (render_view(mesh, 0, 64) < 250).any(axis=2)).mean() > 0.98


def test_every_camera_sees_another_picture_and_no_part_of_it_is_cut_off() -> None:
    wedge = design(step(polygon((0, 0), (3, 0), (0, 2)), 1), step(circle(0.5, 0.5, 0.3), 2))
    mesh = kernel.tessellate(kernel.build_solid(wedge))
    views = [render_view(mesh, camera, 64) for camera in range(8)]
    for view in views:
        assert view.shape == (64, 64, 3)
        assert view.dtype == np.uint8
        covered = (view < 250).any(axis=2)
        assert 0.05 < covered.mean() < 0.9
        assert not covered[[0, -1]].any()
        assert not covered[:, [0, -1]].any()
    assert len({view.tobytes() for view in views}) == 8
    with pytest.raises(ValueError, match="camera 8"):
        render_view(mesh, 8, 64)


def test_the_nearer_face_hides_the_farther_one() -> None:
    front = kernel.tessellate(kernel.build_solid(design(step(rectangle(0, 0, 1, 1), 1))))
    both = kernel.tessellate(kernel.build_solid(design(step(rectangle(0, 0, 1, 1), 1, rectangle(0.4, 0.4, 0.2, 0.2)))))
    # The shaft through the cube runs along z: from the side it is hidden but for its rim on top.
    difference = (render_view(front, 0, 64) != render_view(both, 0, 64)).any(axis=2)
    assert 0 < difference.mean() < 0.05


# -------------------------------------------------------------------------------------------------------------------- files


def test_step_keeps_the_volume(tmp_path: Path) -> None:
    solid = kernel.build_solid(PLATE_WITH_HOLE)
    write_step(solid, tmp_path / "plate.step")
    assert [path.name for path in tmp_path.iterdir()] == ["plate.step"]
    back = kernel.read_step(tmp_path / "plate.step")
    assert kernel.volume(back) == pytest.approx(PLATE_VOLUME, rel=1e-6)
    assert kernel.bounding_box(back).size == pytest.approx((0.1, 0.06, 0.01), rel=1e-5)


def test_stl_keeps_the_mesh_in_millimetres(tmp_path: Path) -> None:
    mesh = kernel.tessellate(kernel.build_solid(PLATE_WITH_HOLE))
    write_stl(mesh, tmp_path / "plate.stl")
    back = read_stl(tmp_path / "plate.stl")
    assert back.is_watertight
    assert back.volume == pytest.approx(mesh.volume * 1e9, rel=1e-5)


def test_glb_stands_upright_in_metres(tmp_path: Path) -> None:
    mesh = kernel.tessellate(kernel.build_solid(PLATE_WITH_HOLE))
    write_glb(mesh, tmp_path / "plate.glb")
    assert [path.name for path in tmp_path.iterdir()] == ["plate.glb"]
    back = trimesh.load(tmp_path / "plate.glb", force="mesh", process=False)
    # The plate lies in x and y and is 0.01 thick along z, which is y in glTF.
    np.testing.assert_allclose(back.extents, [0.1, 0.01, 0.06], atol=1e-6)
    assert back.volume == pytest.approx(mesh.volume, rel=1e-4)
    top = back.vertices[:, 1] > 0.009
    assert (back.vertex_normals[top] @ [0, 1, 0] > -0.01).all()
    write_glb(mesh, tmp_path / "again.glb")
    assert (tmp_path / "again.glb").read_bytes() == (tmp_path / "plate.glb").read_bytes()


def test_step_is_read_in_its_own_unit(tmp_path: Path) -> None:
    solid = kernel.build_solid(PLATE_WITH_HOLE)
    write_step(solid, tmp_path / "mm.step")
    text = (tmp_path / "mm.step").read_text()
    assert "SI_UNIT(.MILLI.,.METRE.)" in text
    (tmp_path / "m.step").write_text(text.replace("SI_UNIT(.MILLI.,.METRE.)", "SI_UNIT($,.METRE.)"))
    for name, factor in (("mm", 1.0), ("m", 1000.0)):
        back = kernel.read_step(tmp_path / f"{name}.step")
        assert kernel.bounding_box(back).size == pytest.approx([0.1 * factor, 0.06 * factor, 0.01 * factor], rel=1e-5)
        assert kernel.volume(back) == pytest.approx(PLATE_VOLUME * factor**3, rel=1e-6)
        assert kernel.area(back) == pytest.approx(PLATE_AREA * factor**2, rel=1e-6)
        assert kernel.is_valid(back)


def test_a_scaled_body_measures_in_proportion() -> None:
    solid = kernel.scaled(kernel.build_solid(PLATE_WITH_HOLE), 3.0)
    assert kernel.volume(solid) == pytest.approx(27 * PLATE_VOLUME)
    assert kernel.tessellate(solid).bounds[1] == pytest.approx([0.3, 0.18, 0.03])


def test_what_is_no_stl_or_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.stl").write_text("solid nothing")
    with pytest.raises(DataError, match="no binary STL"):
        read_stl(tmp_path / "bad.stl")
    (tmp_path / "bad.step").write_text("no step")
    with pytest.raises(GeometryError, match="cannot be read as STEP"):
        kernel.read_step(tmp_path / "bad.step")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken:
        corners = "not an array"

    with pytest.raises(TypeError):
        write_stl(Broken(), tmp_path / "x.stl")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_importing_the_packages_loads_neither_kernel_nor_torch() -> None:
    code = "import sys, cadtrain.cad, cadtrain.geometry, cadtrain.geometry.part; print([m for m in ('OCP', 'torch', 'pydantic', 'scipy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
