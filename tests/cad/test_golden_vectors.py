"""The grid against DeepCAD's own numbers: 100 files with the vectors that its code made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadtrain.cad import Frame, QuantizedArc, QuantizedCircle, QuantizedSequence, quantize, read_deepcad_json

h5py = pytest.importorskip("h5py")


def rows_of(sequence: QuantizedSequence) -> list[list[int]]:
    """Command and arguments, orientation and operation left out: those DeepCAD spells otherwise."""
    rows = []
    for step in sequence.steps:
        for loop in step.loops:
            rows.append([4])
            for curve in loop.curves:
                if isinstance(curve, QuantizedArc):
                    rows.append([1, curve.x, curve.y, curve.sweep, int(curve.is_ccw)])
                elif isinstance(curve, QuantizedCircle):
                    rows.append([2, curve.x, curve.y, curve.radius])
                else:
                    rows.append([0, curve.x, curve.y])
        rows.append([5, *step.position, step.size, step.distance_one, step.distance_two])
    return [*rows, [3]]


def golden_rows(path: Path) -> list[list[int]]:
    columns = {0: [1, 2], 1: [1, 2, 3, 4], 2: [1, 2, 5], 3: [], 4: [], 5: [9, 10, 11, 12, 13, 14]}
    with h5py.File(path) as file:
        vector = file["vec"][:].tolist()
    return [[row[0], *(row[column] for column in columns[row[0]])] for row in vector]


def test_the_deepcad_frame_gives_deepcads_numbers_to_a_step(shared_data: Path) -> None:
    """All but those where this grid differs on purpose: collapsed curves, symmetric extents, mirrored planes.

    Values that lie halfway always go up here, and either way there; `formats.deepcad17` is the one that is exact.
    """
    folder = shared_data / "text2cad-random100"
    different = []
    for path in sorted((folder / "deepcad_cad_json").glob("*.json")):
        ours = rows_of(quantize(read_deepcad_json(path), frame=Frame.DEEPCAD))
        golden = golden_rows(folder / "deepcad_cad_vec" / f"{path.stem}.h5")
        is_close = [row[0] for row in ours] == [row[0] for row in golden] and all(
            abs(a - b) <= 1 for x, y in zip(ours, golden, strict=True) for a, b in zip(x, y, strict=True)
        )
        if not is_close:
            different.append(path.stem[:3])
    assert different == ["026", "044", "048", "054", "065", "100"]
