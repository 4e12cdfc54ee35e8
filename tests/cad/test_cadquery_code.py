"""CadQuery programs: they are run here against a stand-in for CadQuery that measures what it is told to draw."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cadtrain.cad import Arc, CadSequence, Extent, Operation, dequantize, quantize, read_deepcad_json
from cadtrain.cad.formats.cadquery_code import to_cadquery
from cadtrain.cad.sequence import Line, Loop, SketchPlane
from tests.cad.designs import PLATE_WITH_HOLE, circle, design, rectangle, slot, step

Point = tuple[float, float]
UPRIGHT = SketchPlane((0.01, 0.02, 0.03), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))


class Workplane:
    """What the programs use of `cadquery.Workplane`: the areas of closed wires, prisms, and a log of the operations."""

    def __init__(self, plane: SimpleNamespace) -> None:
        self.plane = plane
        self.areas: list[float] = []
        self.bodies: list[tuple[str, float, float, SimpleNamespace]] = []
        self.wire: Loop | None = None

    def moveTo(self, x: float, y: float) -> Workplane:
        assert self.wire is None or not self.wire.curves, "a wire is left open"
        self.at: Point = (x, y)
        self.wire = Loop(())
        return self

    def lineTo(self, x: float, y: float) -> Workplane:
        return self._add(Line(self.at, (x, y)))

    def threePointArc(self, mid: Point, end: Point) -> Workplane:
        return self._add(Arc(self.at, mid, end))

    def _add(self, curve: Any) -> Workplane:
        assert self.wire is not None
        assert curve.start != curve.end
        self.wire, self.at = Loop((*self.wire.curves, curve)), curve.end
        return self

    def circle(self, radius: float) -> Workplane:
        self.areas.append(math.pi * radius**2)
        self.wire = None
        return self

    def close(self) -> Workplane:
        assert self.wire is not None
        start = self.wire.curves[0].start  # type: ignore[union-attr]
        if math.dist(self.at, start) > 1e-6:
            self._add(Line(self.at, start))
        self.areas.append(abs(self.wire.signed_area))
        self.wire = None
        return self

    def extrude(self, distance: float, both: bool = False) -> Workplane:
        assert self.wire is None
        ends = sorted((-distance if both else 0.0, distance))
        self.bodies = [("new", (2 * max(self.areas) - sum(self.areas)) * (ends[1] - ends[0]), ends[0], self.plane)]
        return self

    def _with(self, kind: str, tool: Workplane) -> Workplane:
        self.bodies += [(kind, *body[1:]) for body in tool.bodies]
        return self

    def union(self, tool: Workplane) -> Workplane:
        return self._with("union", tool)

    def cut(self, tool: Workplane) -> Workplane:
        return self._with("cut", tool)

    def intersect(self, tool: Workplane) -> Workplane:
        return self._with("intersect", tool)


def plane(origin: Any, xDir: Any, normal: Any) -> SimpleNamespace:
    assert sum(a * b for a, b in zip(xDir, normal, strict=True)) == pytest.approx(0.0, abs=1e-6)
    return SimpleNamespace(origin=origin, xDir=xDir, normal=normal)


def run(program: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float, SimpleNamespace]]:
    """The prisms of the program: operation, volume, lower end, plane."""
    monkeypatch.setitem(__import__("sys").modules, "cadquery", SimpleNamespace(Workplane=Workplane, Plane=plane))
    names: dict[str, Any] = {}
    exec(compile(program, "program", "exec"), names)
    return names["result"].bodies


def expected_volumes(sequence: CadSequence, scale: float) -> list[float]:
    return [step.profile.area * (step.heights[1] - step.heights[0]) * scale**3 for step in sequence.steps]


def test_a_plate_with_a_hole_reads_like_a_person_wrote_it() -> None:
    assert to_cadquery(PLATE_WITH_HOLE) == (
        "# Lengths are in mm.\n"
        "import cadquery as cq\n"
        "\n"
        "# Step 1: new, 10 along the normal\n"
        "result = (\n"
        "    cq.Workplane(cq.Plane(origin=(0, 0, 0), xDir=(1, 0, 0), normal=(0, 0, 1)))\n"
        "    .moveTo(0, 0)\n"
        "    .lineTo(100, 0)\n"
        "    .lineTo(100, 60)\n"
        "    .lineTo(0, 60)\n"
        "    .close()\n"
        "    .moveTo(50, 30).circle(20)\n"
        "    .extrude(10)\n"
        ")\n"
    )


def test_every_operation_and_extent_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = design(
        step(rectangle(0, 0, 0.1, 0.06), -0.01, operation=Operation.CUT),
        step(slot(0.02, 0.005), 0.003, operation=Operation.JOIN, plane=UPRIGHT, extent=Extent.SYMMETRIC),
        step(circle(0, 0, 0.01), 0.004, operation=Operation.CUT, plane=UPRIGHT, extent=Extent.TWO_SIDES, other=0.002),
        step(circle(0, 0, 1), 1, operation=Operation.INTERSECT),
        step(rectangle(0, 0, 0.01, 0.01), 0.01, operation=Operation.NEW),
    )
    program = to_cadquery(sequence)
    bodies = run(program, monkeypatch)
    assert [kind for kind, *_ in bodies] == ["new", "union", "cut", "intersect", "union"]
    assert [volume for _, volume, *_ in bodies] == pytest.approx(expected_volumes(sequence, 1000.0))
    assert [low for *_, low, _ in bodies] == pytest.approx([-10, -3, 0, 0, 0])
    assert bodies[2][3].origin == pytest.approx((10, 22, 30))  # 2 mm below the sketch, whose normal is -y
    assert [line for line in program.splitlines() if line.startswith("# Step")] == [
        "# Step 1: new, 10 against the normal",
        "# Step 2: join, 3 to both sides of the sketch",
        "# Step 3: cut, from 2 below the sketch to 4 above it",
        "# Step 4: intersect, 1000 along the normal",
        "# Step 5: new, 10 along the normal",
    ]


def test_a_normalised_design_keeps_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = dequantize(quantize(PLATE_WITH_HOLE))
    program = to_cadquery(sequence)
    assert program.startswith("# Lengths are in the normalised frame")
    assert [body[1] for body in run(program, monkeypatch)] == pytest.approx(expected_volumes(sequence, 1.0), rel=1e-6)


def test_no_steps_are_no_program() -> None:
    with pytest.raises(ValueError, match="no program"):
        to_cadquery(design())


@pytest.mark.parametrize("folder", ["omni-cad-test-subset/json", "text2cad-random100/deepcad_cad_json"])
def test_programs_of_real_files_make_prisms_of_the_right_volume(
    shared_data: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted((shared_data / folder).rglob("*.json"))[::4]:
        sequence = read_deepcad_json(path)
        program = to_cadquery(sequence)
        assert isinstance(ast.parse(program), ast.Module)
        volumes = [body[1] for body in run(program, monkeypatch)]
        assert volumes == pytest.approx(expected_volumes(sequence, 1000.0), rel=1e-5), path.name
