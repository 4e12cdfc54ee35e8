"""Real designs against the project's aims, on a sample; `real_report` does it for all files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadtrain.cad import Extent, read_deepcad_json
from tests.geometry.real_report import Case, Result, cases, examine, summary

pytest.importorskip("cadtrain.geometry.kernel", exc_type=ImportError)

pytestmark = pytest.mark.kernel


def test_a_sample_of_real_designs_reaches_the_aims(shared_data: Path) -> None:
    report = summary(map(examine, cases(shared_data, every=60)))
    for build in ("exact", "quantized"):
        assert report[build]["designs"] >= 7
        assert report[build]["valid_share"] >= 0.99, report[build]["faults"]
        assert report[build]["watertight_share"] >= 0.96, report[build]["faults"]
    # The other boxes are those of the finished parts, of whose features the files record only some.
    assert report["box_error"]["within_1e-06"] >= 0.6


def test_volumes_are_those_of_the_published_solids(shared_data: Path) -> None:
    """To the last digits, where extrusions go to one side: the publisher took half of some symmetric extents (see below)
    and left out the second side of the one that has two."""
    chosen = [case for case in cases(shared_data) if case.step is not None][::4]
    compared = 0
    for case in chosen:
        if any(step.extent is not Extent.ONE_SIDE for step in read_deepcad_json(case.path).steps):
            continue
        assert examine(case).volume_error == pytest.approx(0, abs=1e-9), case.path.stem
        compared += 1
    assert compared >= 10


def test_a_symmetric_extent_is_as_long_as_the_file_says(shared_data: Path) -> None:
    """00010361 is one symmetric extrusion: its own box agrees with ours, its STEP file has half of it."""
    folder = shared_data / "text2cad-medium"
    path = next((folder / "cad_json").rglob("00010361.json"))
    result = examine(Case(path, False, next((folder / "step").rglob("00010361_*.step"))))
    assert result.box_error == pytest.approx(0, abs=1e-6)
    assert result.volume_error == pytest.approx(1.0, rel=1e-6)


def test_a_summary_counts_and_names_what_fails() -> None:
    results = [
        Result("a", "f", False, True, True, True, True, box_error=0.0, volume_error=1e-9),
        Result("b", "f", False, True, True, False, False, fault="not closed", box_error=0.3),
        Result("c", "f", False, False, fault="no JSON"),
        Result("a", "f", True, True, fault="empty: nothing is left"),
    ]
    report = summary(results)
    assert report["unreadable"] == {"c": "no JSON"}
    assert report["exact"]["valid_share"] == 0.5
    assert report["exact"]["faults"] == {"f/b": "not closed"}
    assert report["quantized"]["faults"] == {"f/a": "empty: nothing is left"}
    assert report["box_error"]["off"] == {"f/b": 0.3}
    assert report["volume_error"]["within_1e-06"] == 1.0
