"""Real designs as solids: how many come out sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadtrain.cad import dequantize, quantize, read_deepcad_json
from cadtrain.geometry import KernelPool, Outcome, Part, PartRequest, part_maker

kernel = pytest.importorskip("cadtrain.geometry.kernel", exc_type=ImportError)

pytestmark = pytest.mark.kernel

MAKE = part_maker(num_points=64, camera_indices=(0,), image_size=32)


def built(files: list[Path], *, on_grid: bool) -> list[Outcome[Part]]:
    sequences = [read_deepcad_json(path) for path in files]
    if on_grid:
        sequences = [dequantize(quantize(sequence)) for sequence in sequences]
    with KernelPool(workers=2, time_limit_seconds=60) as pool:
        return list(pool.map(MAKE, (PartRequest(sequence, seed) for seed, sequence in enumerate(sequences))))


def shares(outcomes: list[Outcome[Part]]) -> tuple[float, float, float]:
    """Built, valid and watertight, of all."""
    parts = [outcome.value for outcome in outcomes if outcome.value is not None]
    count = len(outcomes)
    return len(parts) / count, sum(p.is_valid for p in parts) / count, sum(p.is_watertight for p in parts) / count


def test_a_sample_of_real_files_is_sound(shared_data: Path) -> None:
    files = sorted((shared_data / "text2cad-random100/deepcad_cad_json").glob("*.json"))[::5]
    assert shares(built(files, on_grid=False)) == (1, 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("folder", "on_grid", "expected"),
    [
        ("omni-cad-test-subset/json", False, (1, 0.99, 0.98)),
        ("text2cad-medium/cad_json", False, (1, 0.99, 0.96)),
        ("text2cad-random100/deepcad_cad_json", False, (1, 1, 1)),
        ("omni-cad-test-subset/json", True, (1, 0.99, 0.97)),
        ("text2cad-medium/cad_json", True, (1, 0.98, 0.96)),
        ("text2cad-random100/deepcad_cad_json", True, (1, 0.98, 0.98)),
    ],
)
def test_real_files_are_sound(shared_data: Path, folder: str, on_grid: bool, expected: tuple[float, ...]) -> None:
    outcomes = built(sorted((shared_data / folder).rglob("*.json")), on_grid=on_grid)
    found = shares(outcomes)
    assert all(share >= least for share, least in zip(found, expected, strict=True)), found
