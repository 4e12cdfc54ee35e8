"""DeepCAD's vectors: its own numbers for real files, its limits, and designs read back from rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from cadtrain.cad import Operation, QuantizedSequence, dequantize, get_codec, quantize, read_deepcad_json
from cadtrain.cad.formats.deepcad17 import from_vectors, limits, to_vectors
from cadtrain.cad.sequence import Extent, SketchPlane
from cadtrain.errors import GeometryError, SchemaError
from tests.cad.designs import (
    PLATE_WITH_HOLE,
    circle,
    design,
    polygon,
    quantized_sequences,
    rectangle,
    slot,
    step,
    unhurried,
)

N = -1
PLATE = (
    (4, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N),
    (0, 223, 128, N, N, N, N, N, N, N, N, N, N, N, N, N, N),
    (0, 223, 185, N, N, N, N, N, N, N, N, N, N, N, N, N, N),
    (0, 128, 185, N, N, N, N, N, N, N, N, N, N, N, N, N, N),
    (0, 128, 128, N, N, N, N, N, N, N, N, N, N, N, N, N, N),
    (4, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N),
    (2, 176, 156, N, N, 19, N, N, N, N, N, N, N, N, N, N, N),
    (5, N, N, N, N, N, 128, 128, 128, 128, 128, 128, 96, 138, 128, 0, 0),
    (3, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N, N),
)
END = PLATE[-1]


def test_a_plate_with_a_hole_has_the_rows_it_should() -> None:
    assert to_vectors(PLATE_WITH_HOLE) == PLATE


def test_an_arc_has_its_sweep_and_a_flag() -> None:
    arcs = [row for row in to_vectors(design(step(slot(2, 1), 1))) if row[0] == 1]
    assert [row[3:6] for row in arcs] == [(128, 1, N)] * 2


@pytest.mark.parametrize(
    ("z_axis", "x_axis", "angles"),
    [
        ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (128, 128, 128)),
        ((0.0, 0.0, -1.0), (1.0, 0.0, 0.0), (255, 128, 255)),
        ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (192, 128, 192)),
        ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (192, 128, 192)),
        ((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (192, 64, 192)),
    ],
)
def test_planes_get_deepcads_angles_mirrored_ones_too(z_axis: Any, x_axis: Any, angles: tuple[int, ...]) -> None:
    """The fourth is mirrored: it gets the angles of the third."""
    y_axis = tuple(
        z_axis[(i + 1) % 3] * x_axis[(i + 2) % 3] - z_axis[(i + 2) % 3] * x_axis[(i + 1) % 3] for i in range(3)
    )
    plane = SketchPlane((0.0, 0.0, 0.0), x_axis, y_axis, z_axis)  # type: ignore[arg-type]
    assert to_vectors(design(step(rectangle(0, 0, 2, 1), 1, plane=plane)))[-2][6:9] == angles


def test_a_design_without_extent_is_refused() -> None:
    with pytest.raises(GeometryError, match="no steps"):
        to_vectors(design())


# ------------------------------------------------------------------------------------------------------------- limits


def test_an_ordinary_design_exceeds_nothing() -> None:
    assert limits(PLATE_WITH_HOLE) == ()


def test_everything_beyond_the_limits_is_reported_at_once() -> None:
    many_corners = polygon(*((x, x * x) for x in range(15)))
    holes = [circle(10 + 10 * x, 5, 1) for x in range(6)]
    steps = [step(many_corners, 1), step(rectangle(0, 0, 100, 10), 1, *holes), *[step(circle(0, 0, 1), 1)] * 20]
    steps.append(step(circle(0, 0, 1), -600, operation=Operation.CUT))
    found = limits(design(*steps))
    assert [(excess.kind, excess.step) for excess in found] == [
        ("steps", None),
        ("commands", None),
        ("curves", 1),
        ("loops", 2),
        ("distance", 23),
    ]
    assert [str(excess) for excess in found] == [
        "23 extrusions, DeepCAD takes no more than 10",
        "99 commands, DeepCAD takes no more than 60",
        "step 1: a loop of 15 curves, DeepCAD takes no more than 14",
        "step 2: 7 loops, DeepCAD takes no more than 6",
        "step 23: an extrusion by 2.29592 of the normalised frame, DeepCAD takes no more than 2",
    ]


# ------------------------------------------------------------------------------------------------------------- reading


@unhurried
@given(quantized_sequences)
def test_grid_designs_come_back_but_for_what_deepcads_angles_lose(sequence: QuantizedSequence) -> None:
    rows = to_vectors(dequantize(sequence))
    back = from_vectors(rows)
    plain = get_codec("deepcad17").encode(sequence)
    for ours, theirs in zip(sequence.steps, back.steps, strict=True):
        assert (ours.position, ours.size, ours.distance_one, ours.distance_two) == (
            theirs.position,
            theirs.size,
            theirs.distance_one,
            theirs.distance_two,
        )
        assert sorted(map(repr, ours.loops)) == sorted(map(repr, theirs.loops))
    assert len(plain.splitlines()) == len(rows)


def test_padding_is_passed_over_and_arrays_are_taken() -> None:
    numpy = pytest.importorskip("numpy")
    expected = quantize(dequantize(from_vectors(PLATE)))
    assert from_vectors(numpy.asarray([*PLATE, END, END])) == expected
    assert from_vectors([numpy.asarray(numbers) for numbers in PLATE]) == expected
    assert to_vectors(dequantize(expected)) == PLATE


def test_what_has_collapsed_is_left_out() -> None:
    rows = list(PLATE)
    rows[2] = (0, 223, 128, *rows[2][3:])
    assert len(from_vectors(rows).steps[0].outer.curves) == 3
    rows[3] = (0, 223, 128, *rows[3][3:])
    assert len(from_vectors(rows).steps[0].outer.curves) == 1  # the circle is all that is left
    flat = [*PLATE[:7], (*PLATE[7][:13], 128, 128, 0, 0), END]
    assert from_vectors(flat).steps[0].distance_one == 129
    with pytest.raises(GeometryError, match="nothing is left of step 1"):
        from_vectors([*PLATE[:7], (*PLATE[7][:12], 0, *PLATE[7][13:]), END])


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        (lambda rows: rows.clear(), "$", "no extrusion makes anything"),
        (lambda rows: rows.insert(0, 4), "$[0]", "expected a list, found 4"),
        (lambda rows: rows.insert(0, [1, 2]), "$[0]", "expected 17 columns, found 2"),
        (lambda rows: rows[1].__setitem__(0, 6), "$[1][0]", "expected a whole number in 0..5, found 6"),
        (lambda rows: rows[1].__setitem__(2, 256), "$[1][2]", "expected a whole number in 0..255, found 256"),
        (lambda rows: rows[1].__setitem__(2, 1.5), "$[1][2]", "found 1.5"),
        (lambda rows: rows[1].__setitem__(3, 7), "$[1][3]", "expected -1, found 7"),
        (lambda rows: rows[6].__setitem__(5, 0), "$[6][5]", "expected a whole number in 1..255, found 0"),
        (lambda rows: rows[7].__setitem__(15, 4), "$[7][15]", "expected a whole number in 0..3, found 4"),
        (lambda rows: rows.pop(5), "$[5]", "a circle stands beside other curves"),
        (lambda rows: rows.pop(0), "$[0]", "a curve stands outside a loop"),
        (lambda rows: rows.pop(7), "$", "after the last loop there is no extrusion"),
        (lambda rows: rows.insert(6, rows[5]), "$[6]", "no curve yet"),
        (lambda rows: rows.pop(6), "$[6]", "an extrusion follows no curve"),
    ],
)
def test_rows_that_are_no_vectors_are_refused_with_the_place(change: Any, path: str, reason: str) -> None:
    rows = [list(numbers) for numbers in PLATE]
    change(rows)
    with pytest.raises(SchemaError) as caught:
        from_vectors(rows, "part.h5")
    assert caught.value.json_path == path
    assert reason in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- real files


def test_all_hundred_files_give_deepcads_vectors_bit_for_bit(shared_data: Path) -> None:
    """And all of them but four come back from the rows as they were; those have numbers that are no design."""
    h5py = pytest.importorskip("h5py")
    folder = shared_data / "text2cad-random100"
    paths = sorted((folder / "deepcad_cad_json").glob("*.json"))
    different, lossy = [], {}
    for path in paths:
        with h5py.File(folder / "deepcad_cad_vec" / f"{path.stem}.h5") as file:
            golden = tuple(map(tuple, file["vec"][:].tolist()))
        if to_vectors(read_deepcad_json(path)) != golden:
            different.append(path.stem)
        back = to_vectors(dequantize(from_vectors(golden)))
        if back != golden:
            lossy[path.stem] = len(golden) - len(back)
    assert len(paths) == 100
    assert different == []
    assert lossy == {
        "024_00676703": 0,  # an extrusion of no thickness
        "048_00108068": 2,  # curves that end where they start
        "054_00595180": 1,
        "100_00578995": 0,  # a symmetric extrusion by a negative distance
    }


def test_a_padded_vector_of_another_project_is_read(shared_data: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(shared_data / "gencad3d-examples" / "00152170_gen_cad.h5") as file:
        rows = file["vec"][:]
    assert rows.shape == (60, 17)
    sequence = from_vectors(rows)
    assert [s.operation for s in sequence.steps] == [
        Operation.NEW,
        Operation.JOIN,
        Operation.JOIN,
        Operation.CUT,
        Operation.JOIN,
        Operation.JOIN,
    ]
    assert {s.extent for s in sequence.steps} == {Extent.ONE_SIDE}


def test_the_real_files_beyond_deepcads_limits_are_counted(shared_data: Path) -> None:
    folders = {"omni-cad-test-subset": 46, "text2cad-medium": 23, "text2cad-random100": 0}
    for folder, expected in folders.items():
        paths = [
            path for path in (shared_data / folder).rglob("*.json") if "cad_json" in str(path) or "/json/" in str(path)
        ]
        assert sum(bool(limits(read_deepcad_json(path))) for path in paths) == expected
