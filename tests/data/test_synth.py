"""Procedural parts: fixed by their seed, true to their captions, sound as solids, distributed like real ones."""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cadtrain.cad.codec import get_codec
from cadtrain.cad.quantize import dequantize, quantize
from cadtrain.cad.sequence import Arc, CadSequence, Circle, Extent, Line, Operation
from cadtrain.config.sections import SynthConfig
from cadtrain.data.inspect.lengths import LengthOptions
from cadtrain.data.inspect.prepared import inspect_dataset
from cadtrain.data.manifest import SPLITS
from cadtrain.data.shards import PartDataset
from cadtrain.data.synth.drawing import LONGEST_SIDE
from cadtrain.data.synth.families import FAMILIES
from cadtrain.data.synth.make import cache_folder, demo_dataset, synthesize
from cadtrain.data.synth.parts import SIMPLE_MOST_CURVES, SIMPLE_MOST_STEPS, draw_part
from tests.data.caption_facts import claims, false_claims
from tests.data.synth_statistics import STATISTICS, real_sequences, shares, total_variation

PARTS = [draw_part(3, index) for index in range(800)]


def _signed_volume(sequence: CadSequence) -> float:
    total = 0.0
    for step in sequence.steps:
        low, high = step.heights
        total += (-1 if step.operation is Operation.CUT else 1) * step.profile.area * (high - low)
    return total


def _text(sequence: CadSequence) -> str:
    return get_codec("compact").encode(quantize(sequence))


# ----------------------------------------------------------------------------------------------------------------- the draws


def test_a_part_depends_on_seed_and_index_alone() -> None:
    forwards = [draw_part(5, index) for index in range(20)]
    backwards = [draw_part(5, index) for index in reversed(range(20))][::-1]
    assert forwards == backwards
    assert draw_part(5, 0, attempt=1) != draw_part(5, 0)
    assert sum(draw_part(6, index).sequence == forwards[index].sequence for index in range(20)) <= 2


def test_another_process_draws_the_same_parts() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        elsewhere = list(pool.map(draw_part, [3] * 30, range(30)))
    assert elsewhere == PARTS[:30]


@pytest.mark.parametrize("index", [2**31, 2**32 + 1, 2**53 + 1, 2**62, 2**64 - 1])
def test_indices_do_not_run_out(index: int) -> None:
    part = draw_part(2**63, index)
    assert part == draw_part(2**63, index)
    assert part.sequence.steps
    texts = {_text(draw_part(0, index - k).sequence) for k in range(30)}
    assert len(texts) >= 28


@pytest.mark.slow
def test_nearly_all_parts_differ() -> None:
    texts = {_text(draw_part(11, index).sequence) for index in range(2000)}
    assert len(texts) >= 0.99 * 2000


def test_every_family_operation_extent_curve_and_plane_occurs() -> None:
    assert set(FAMILIES) == {part.family for part in PARTS}
    steps = [step for part in PARTS for step in part.sequence.steps]
    assert {step.operation for step in steps} == {Operation.NEW, Operation.JOIN, Operation.CUT}
    assert {step.extent for step in steps} == set(Extent)
    assert {type(c) for step in steps for loop in step.profile.loops for c in loop.curves} == {Line, Arc, Circle}
    assert any(step.extent is Extent.ONE_SIDE and step.distance_one < 0 for step in steps)
    normals = {
        tuple(round(value) for value in step.plane.z_axis) for step in steps if max(map(abs, step.plane.z_axis)) == 1
    }
    assert len(normals) == 6
    assert any(0.01 < max(map(abs, step.plane.z_axis)) < 0.999 for step in steps)
    assert max(len(part.sequence.steps) for part in PARTS) > 20


def test_simple_parts_are_short() -> None:
    parts = [draw_part(3, index, difficulty="simple") for index in range(300)]
    assert max(len(part.sequence.steps) for part in parts) <= SIMPLE_MOST_STEPS
    for part in parts:
        assert sum(len(loop.curves) for s in part.sequence.steps for loop in s.profile.loops) <= SIMPLE_MOST_CURVES
    # What the demo keeps: byte tokens of instruction, caption and sequence, and 32 of the other modalities.
    assert max(len(part.caption) + len(_text(part.sequence)) for part in parts) + 80 < 1024


def test_heights_and_planes_fall_on_the_grid_exactly() -> None:
    unit = 1 / 128
    for part in PARTS:
        if max(map(abs, part.sequence.steps[0].plane.z_axis)) < 1:
            continue  # an oblique part is scaled into the grid's box again
        assert max(part.sequence.material_box().size) == pytest.approx(LONGEST_SIDE)
        quantized = dequantize(quantize(part.sequence))
        assert len(quantized.steps) == len(part.sequence.steps), part.long
        for drawn, gridded in zip(part.sequence.steps, quantized.steps, strict=True):
            assert gridded.heights == pytest.approx(tuple(height * unit for height in drawn.heights)), part.long


# -------------------------------------------------------------------------------------------------------------- real parts


def test_statistics_are_those_of_real_parts(shared_data: Path) -> None:
    real = real_sequences(shared_data)
    drawn = [part.sequence for part in PARTS]
    distances = {s.name: total_variation(shares(s, real), shares(s, drawn)) for s in STATISTICS}
    assert len(real) == 412
    assert max(distances.values()) < 0.2, distances
    assert statistics.mean(distances.values()) < 0.1, distances


# ------------------------------------------------------------------------------------------------------------- true captions


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_say_what_the_sequence_holds(family: str) -> None:
    parts = [part for part in PARTS if part.family == family]
    assert len(parts) >= 8
    for part in parts:
        assert not false_claims(part.long, part.sequence), part.long
        assert not false_claims(part.short, part.sequence), part.short
    checked = [sum(1 for _ in claims(part.long, part.sequence)) for part in parts]
    assert statistics.mean(checked) >= 2.5


@pytest.mark.slow
def test_a_changed_number_in_a_caption_is_found_to_be_false() -> None:
    # The check above means something only if it would notice: every number of a long caption is changed in turn.
    noticed = total = 0
    for part in PARTS[:200]:
        for found in re.finditer(r"(?<![\d.])\d+(?![\d.]*\d)(?! degrees)", part.long):
            changed = f"{part.long[: found.start()]}{int(found[0]) + 7}{part.long[found.end() :]}"
            total += 1
            noticed += bool(false_claims(changed, part.sequence))
    assert noticed / total > 0.85, f"{noticed} of {total}"


def test_short_captions_are_one_clause_without_sizes_and_long_ones_have_them() -> None:
    for part in PARTS:
        assert len(part.short) < 160
        assert part.short.count(".") == 1
        assert not re.search(r"diameter| x |\bhigh\b|\bdeep\b", part.short), part.short
        assert len(part.long) < 700
        assert "  " not in part.short + part.long
    sized = sum(bool(re.search(r"\d", part.long)) for part in PARTS)
    assert sized > 0.97 * len(PARTS)


def test_half_of_the_stored_captions_are_short_unless_it_is_said_otherwise() -> None:
    num_short = sum(part.caption == part.short for part in PARTS)
    assert 0.44 < num_short / len(PARTS) < 0.56
    for index in range(20):
        short, long = (draw_part(3, index, captions=length) for length in ("short", "long"))
        assert short.sequence == long.sequence == PARTS[index].sequence
        assert short.caption == PARTS[index].short
        assert long.caption == PARTS[index].long


# -------------------------------------------------------------------------------------------------------------------- solids


@pytest.mark.kernel
def test_solids_have_the_volume_of_their_steps() -> None:
    # Cuts remove only material that is there and joins add only what is not: else this sum is not the volume, and a caption's
    # hole or rib would be missing or misshapen.
    from cadtrain.geometry import kernel

    for part in PARTS[:60]:
        solid = kernel.build_solid(part.sequence)
        assert kernel.volume(solid) == pytest.approx(_signed_volume(part.sequence), rel=1e-6), part.long
        assert kernel.is_valid(solid), part.long


@pytest.mark.kernel
@pytest.mark.slow
def test_quantised_solids_keep_the_volume() -> None:
    from cadtrain.geometry import kernel

    num_valid = num_alike = 0
    for part in PARTS:
        solid = kernel.build_solid(dequantize(quantize(part.sequence)))
        num_valid += kernel.is_valid(solid) and kernel.tessellate(solid).is_watertight
        is_oblique = max(map(abs, part.sequence.steps[0].plane.z_axis)) < 1
        num_alike += is_oblique or abs(kernel.volume(solid) * 128**3 / _signed_volume(part.sequence) - 1) < 0.08
    # The rest is drawn again, or is so thin that a rounded edge is more than 8 % of it.
    assert num_valid >= 0.97 * len(PARTS)
    assert num_alike >= 0.97 * len(PARTS)


# ------------------------------------------------------------------------------------------------------------------ datasets


@pytest.mark.kernel
def test_a_synthetic_dataset(synthetic: Path) -> None:
    samples = [
        sample
        for split in SPLITS
        for sample in (lambda d: [d[k] for k in range(len(d))])(PartDataset.open(synthetic, split))
    ]
    assert sorted(sample.id for sample in samples) == [f"synth-7/{index:08d}" for index in range(16)]
    codec = get_codec("compact")
    for sample in samples:
        drawn = draw_part(7, int(sample.id[-8:]))
        assert sample.caption == drawn.caption
        assert codec.decode(sample.sequence) == quantize(drawn.sequence)
        points = sample.checked_points()
        assert points.shape == (256, 6)
        assert np.abs(points[:, :3]).max() <= 1.0 + 1e-5
        np.testing.assert_allclose(np.linalg.norm(points[:, 3:], axis=1), 1, atol=1e-4)
        assert len(sample.images) == 1


@pytest.mark.kernel
def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(synthetic: Path, tmp_path: Path) -> None:
    synthesize(16, tmp_path / "again", seed=7, num_points=256, num_views=1, image_size=64, workers=2)
    for split in SPLITS:
        first, second = (path / split / "data-00000.arrow" for path in (synthetic, tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.kernel
def test_equal_designs_lie_in_one_split(tmp_path: Path) -> None:
    # Parts 3 and 51 of this seed are the same design, and by their names 51 belongs to test.
    assert _text(draw_part(724, 3, difficulty="simple").sequence) == _text(
        draw_part(724, 51, difficulty="simple").sequence
    )
    made = [
        synthesize(
            52, tmp_path / f"{workers}", seed=724, num_points=0, num_views=0, difficulty="simple", workers=workers
        ).manifest
        for workers in (1, 2)
    ]
    assert made[0].digest == made[1].digest
    assert sum(made[0].counts.values()) == 52
    assert made[0].notes["moved"] == 1
    for split in SPLITS:
        rows = [PartDataset.open(tmp_path / f"{workers}", split) for workers in (1, 2)]
        first, second = ([(row[k].id, row[k].sequence) for k in range(len(row))] for row in rows)
        assert first == second
    report = inspect_dataset(tmp_path / "1", LengthOptions()).report
    assert report.duplicates.repeats == 1
    assert report.leaks == {"validation": 0, "test": 0}


@pytest.mark.kernel
def test_the_demo_dataset_is_made_once_by_whoever_comes_first(tmp_path: Path) -> None:
    config = SynthConfig(count=8, image_size=32, num_views=1)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        paths = list(pool.map(demo_dataset, [config] * 2, [tmp_path] * 2))
    assert paths[0] == paths[1]
    made = paths[0].stat().st_mtime_ns
    assert demo_dataset(config, tmp_path) == paths[0]
    assert paths[0].stat().st_mtime_ns == made
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CADTRAIN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/cadtrain")
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "xdg")
    assert cache_folder() == Path("/xdg/cadtrain")
    monkeypatch.setenv("CADTRAIN_CACHE", "/own")
    assert cache_folder() == Path("/own")
