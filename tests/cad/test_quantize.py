"""The 8-bit grid: what survives it, and what it leaves out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given

from cadtrain.cad import (
    BoundingBox,
    CadSequence,
    Extent,
    Frame,
    Operation,
    PlaneAngles,
    QuantizedCircle,
    QuantizedLine,
    QuantizedLoop,
    QuantizedSequence,
    QuantizedStep,
    SketchPlane,
    dequantize,
    normalize,
    quantize,
)
from cadtrain.cad.grid import AXIS_FRAMES
from cadtrain.errors import GeometryError
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


@unhurried
@given(quantized_sequences)
def test_a_grid_design_stays_where_it_is(sequence: QuantizedSequence) -> None:
    assert quantize(dequantize(sequence)) == sequence


@pytest.mark.parametrize("frame", AXIS_FRAMES)
def test_each_axis_frame_keeps_its_orientation(frame: tuple) -> None:
    plane = SketchPlane((0.0, 0.0, 0.0), *frame)
    quantized = quantize(design(step(rectangle(0, 0, 3, 1), 1, plane=plane)))
    assert quantized.steps[0].plane == AXIS_FRAMES.index(frame)
    back = dequantize(quantized).steps[0].plane
    assert (back.x_axis, back.y_axis, back.z_axis) == frame


@pytest.mark.parametrize("degrees", [10, 100, 190, 280, 350])
def test_an_oblique_plane_is_kept_to_a_degree(degrees: float) -> None:
    turn = math.radians(degrees)
    normal = (math.cos(turn) * 0.8, math.sin(turn) * 0.8, -0.6)
    x_axis = (-math.sin(turn), math.cos(turn), 0.0)
    y_axis = tuple(
        normal[(i + 1) % 3] * x_axis[(i + 2) % 3] - normal[(i + 2) % 3] * x_axis[(i + 1) % 3] for i in range(3)
    )
    plane = SketchPlane((0.0, 0.0, 0.0), x_axis, y_axis, normal)  # type: ignore[arg-type]
    quantized = quantize(design(step(rectangle(0, 0, 3, 1), 1, plane=plane)))
    assert isinstance(quantized.steps[0].plane, PlaneAngles)
    back = dequantize(quantized).steps[0].plane
    for axis, expected in ((back.x_axis, x_axis), (back.y_axis, y_axis), (back.z_axis, normal)):
        assert math.degrees(math.acos(min(1.0, sum(a * b for a, b in zip(axis, expected, strict=True))))) < 1.5


def test_the_centred_frame_puts_the_part_in_the_middle() -> None:
    shifted = SketchPlane((5.0, -3.0, 2.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    box = normalize(design(step(rectangle(0, 0, 4, 2), 1, plane=shifted))).material_box()
    assert box.center == pytest.approx((0, 0, 0))
    assert box.size == pytest.approx((0.9375, 0.46875, 0.234375))


def test_the_deepcad_frame_only_scales() -> None:
    box = normalize(design(step(rectangle(0, 0, 4, 2), 1)), frame=Frame.DEEPCAD).material_box()
    assert box.low == pytest.approx((0, 0, 0))
    assert box.high == pytest.approx((0.75, 0.375, 0.1875))


def test_a_longest_extrusion_is_not_cut_off() -> None:
    quantized = quantize(design(step(circle(0, 0, 1), 40)))
    assert dequantize(quantized).material_box().size[2] == pytest.approx(0.9375)


def test_loops_start_left_and_run_counter_clockwise() -> None:
    backwards = polygon((4, 2), (4, 0), (0, 0), (0, 2))
    outer = quantize(design(step(backwards, 1))).steps[0].outer
    assert outer.curves == (
        QuantizedLine(223, 128),
        QuantizedLine(223, 176),
        QuantizedLine(128, 176),
        QuantizedLine(128, 128),
    )


@pytest.mark.parametrize("x", [0.0, 0.1, 0.3, 1 / 3, 0.7, 1e-3, 12.3])
@pytest.mark.parametrize("radius", [0.1, 0.3, 1 / 7, 4.000000059604645])
def test_noise_does_not_choose_between_two_texts_of_a_circle(x: float, radius: float) -> None:
    """Alone in its sketch its radius is 47.5 steps, and so is its centre's distance from the start."""
    outer = quantize(design(step(circle(x, -x, radius), 1))).steps[0].outer
    assert outer.curves == (QuantizedCircle(176, 128, 48),)


def test_halves_go_up_so_that_a_boss_stands_on_its_plate() -> None:
    """The plate is 15 of 120 steps thick, from -7.5 to 7.5; the boss is sketched on its top."""
    plane = SketchPlane((0.0, 0.0, 15.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    box = BoundingBox((-60.0, -60.0, 0.0), (60.0, 60.0, 15.0))
    boss = step(circle(0, 0, 5), -5, operation=Operation.CUT, plane=plane)
    plate, cut = quantize(design(step(rectangle(-60, -60, 120, 120), 15), boss), box=box).steps
    assert (plate.position[2], plate.distance_one) == (121, 143)
    assert cut.position[2] == plate.position[2] + plate.distance_one - 128


def test_an_arc_keeps_its_sweep() -> None:
    loop = dequantize(quantize(design(step(slot(3, 1), 1)))).steps[0].profile.outer
    assert sorted(round(c.sweep_rad, 6) for c in loop.curves if hasattr(c, "mid")) == [round(math.pi, 6)] * 2


def test_what_shrinks_to_nothing_is_left_out() -> None:
    chipped = polygon((0, 0), (4, 0), (4, 2), (3.999, 2.001), (0, 2.001))
    thin = rectangle(1, 1, 2, 0.001)
    sliver = step(rectangle(0, 0, 4, 0.001), 1, operation=Operation.JOIN)
    quantized = quantize(design(step(chipped, 1, thin), sliver))
    assert len(quantized.steps) == 1
    assert len(quantized.steps[0].outer.curves) == 4
    assert quantized.steps[0].inner == ()


def test_a_first_step_below_the_grid_is_refused() -> None:
    with pytest.raises(GeometryError, match=r"step 1 .* thinner than half a grid step") as caught:
        quantize(design(step(rectangle(0, 0, 4, 0.001), 1)))
    assert caught.value.kind == "below_resolution"


def test_a_thin_extrusion_never_becomes_flat() -> None:
    up, down = (quantize(design(step(rectangle(0, 0, 4, 4), height))).steps[0].distance_one for height in (1e-4, -1e-4))
    assert (up, down) == (129, 127)


def test_a_symmetric_extrusion_has_no_direction() -> None:
    steps = [step(rectangle(0, 0, 4, 4), height, extent=Extent.SYMMETRIC) for height in (1, -1)]
    assert quantize(design(steps[0])) == quantize(design(steps[1]))


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(GeometryError, match="no steps"):
        quantize(CadSequence(()))


def test_prefixes_end_with_the_whole() -> None:
    whole = design(*PLATE_WITH_HOLE.steps, step(circle(0, 0, 1), 1, operation=Operation.JOIN))
    prefixes = list(whole.prefixes())
    assert [len(prefix.steps) for prefix in prefixes] == [1, 2]
    assert prefixes[-1] is whole


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": 0}, "size is 0"),
        ({"plane": 24}, "axis frame is 24"),
        ({"position": (0, 256, 0)}, "position is 256"),
        ({"distance_one": 128}, "no thickness"),
        ({"distance_two": 130}, "only a two-sided"),
        ({"plane": PlaneAngles(64, 64, 0)}, "axis frame"),
    ],
)
def test_a_grid_step_that_is_no_design_cannot_exist(changes: dict, reason: str) -> None:
    good = quantize(PLATE_WITH_HOLE).steps[0]
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__} | changes
    with pytest.raises(ValueError, match=reason):
        QuantizedStep(**fields)


def test_a_loop_without_area_cannot_exist() -> None:
    with pytest.raises(ValueError, match="encloses no area"):
        QuantizedLoop((QuantizedLine(1, 1), QuantizedLine(2, 2)))
