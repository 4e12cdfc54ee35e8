"""What becomes of real designs: a report over all files of the real data, for people.

    python -m tests.geometry.real_report --out report.json [--workers 1] [--every 1]

Every readable design is built twice, exactly and quantized. The report has the shares that are valid and closed, the
list of those that are not with reasons, the distance of the built boxes from the files' own, and the distance of volumes
from the published STEP files. `test_real_report.py` holds a sample of it to the project's aims.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cadtrain.cad import dequantize, quantize, read_deepcad_json
from cadtrain.cad.sequence import BoundingBox
from cadtrain.errors import DataError, GeometryError
from cadtrain.geometry import KernelPool
from tests.conftest import SHARED_DATA

FOLDERS = (
    "omni-cad-test-subset/json", "text2cad-medium/cad_json", "text2cad-random100/deepcad_cad_json",
    "cad-mllm-model-outputs",
)  # fmt: skip
STEP_FOLDER = "text2cad-medium/step"


@dataclass(frozen=True, slots=True)
class Case:
    """One file to build, exactly or quantized, and the STEP file of the same design if there is one."""

    path: Path
    is_quantized: bool
    step: Path | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a case came to; `fault` says why there is no solid, or what is wrong with it."""

    name: str
    folder: str
    is_quantized: bool
    is_read: bool
    is_built: bool = False
    is_valid: bool = False
    is_watertight: bool = False
    fault: str = ""
    seconds: float = 0.0
    box_error: float | None = None
    """Largest difference of a side's end from the file's own box, of the file's longest side; exact builds only."""
    volume_error: float | None = None
    """Relative difference of volume / longest side^3 from the STEP file's."""
    step_is_valid: bool | None = None


def cases(data: Path = SHARED_DATA, *, every: int = 1) -> list[Case]:
    """Both builds of every `every`-th file of each folder."""
    steps = {path.name.split("_")[0]: path for path in (data / STEP_FOLDER).rglob("*.step")}
    found = []
    for folder in FOLDERS:
        for path in sorted((data / folder).rglob("*.json"))[::every]:
            step = steps.get(path.stem) if folder.startswith("text2cad-medium") else None
            found += [Case(path, False, step), Case(path, True)]
    return found


def examine(case: Case) -> Result:
    """Read, build, mesh and compare one case; runs in a worker."""
    from cadtrain.geometry import kernel

    start = time.process_time()
    folder = next((f for f in FOLDERS if f in case.path.as_posix()), case.path.parent.name)
    about: dict[str, Any] = {"name": case.path.stem, "folder": folder, "is_quantized": case.is_quantized}
    try:
        stated = sequence = read_deepcad_json(case.path)
    except DataError as error:
        return Result(**about, is_read=False, fault=str(error))
    try:
        if case.is_quantized:
            sequence = dequantize(quantize(sequence))
        solid = kernel.build_solid(sequence)
        mesh = kernel.tessellate(solid)
    except GeometryError as error:
        return Result(**about, is_read=True, fault=str(error))
    box = kernel.bounding_box(solid)
    is_valid, is_watertight = kernel.is_valid(solid), mesh.is_watertight
    faults = [word for word, good in (("BRepCheck finds faults", is_valid), ("not closed", is_watertight)) if not good]
    compared: dict[str, Any] = {}
    if not case.is_quantized and stated.bounding_box is not None:
        compared["box_error"] = _box_error(box, stated.bounding_box)
    if case.step is not None:
        theirs = kernel.read_step(case.step)
        ratios = [kernel.volume(s) / max(kernel.bounding_box(s).size) ** 3 for s in (solid, theirs)]
        compared |= {"volume_error": ratios[0] / ratios[1] - 1, "step_is_valid": kernel.is_valid(theirs)}
    return Result(
        **about,
        is_read=True,
        is_built=True,
        is_valid=is_valid,
        is_watertight=is_watertight,
        fault=", ".join(faults),
        seconds=time.process_time() - start,
        **compared,
    )


def _box_error(built: BoundingBox, stated: BoundingBox) -> float:
    ends = zip((*built.low, *built.high), (*stated.low, *stated.high), strict=True)
    return max(abs(ours - theirs) for ours, theirs in ends) / max(stated.size)


def examine_all(wanted: Sequence[Case], *, workers: int = 1, time_limit_seconds: float = 300.0) -> list[Result]:
    """`examine` for all, in killable workers."""
    results = []
    with KernelPool(workers, time_limit_seconds) as pool:
        for case, outcome in zip(wanted, pool.map(examine, wanted), strict=True):
            if outcome.value is not None:
                results.append(outcome.value)
            else:
                assert outcome.failure is not None
                fault = f"{outcome.failure.kind}: {outcome.failure.reason}"
                results.append(Result(case.path.stem, case.path.parent.name, case.is_quantized, True, fault=fault))
    return results


def summary(results: Iterable[Result]) -> dict[str, Any]:
    """Shares of the readable designs, faults by name, and distributions of the errors."""
    everything = list(results)
    report: dict[str, Any] = {
        "unreadable": {r.name: r.fault for r in everything if not r.is_read and not r.is_quantized}
    }
    for label, on_grid in (("exact", False), ("quantized", True)):
        chosen = [r for r in everything if r.is_read and r.is_quantized == on_grid]
        seconds = [r.seconds for r in chosen]
        report[label] = {
            "designs": len(chosen),
            **{key: sum(getattr(r, key) for r in chosen) for key in ("is_built", "is_valid", "is_watertight")},
            "valid_share": sum(r.is_valid for r in chosen) / max(1, len(chosen)),
            "watertight_share": sum(r.is_watertight for r in chosen) / max(1, len(chosen)),
            "seconds": {"median": float(np.median(seconds)), "mean": float(np.mean(seconds)), "max": max(seconds)},
            "faults": {f"{r.folder}/{r.name}": r.fault for r in chosen if r.fault},
        }
    report["box_error"] = _distribution([r for r in everything if r.box_error is not None], "box_error")
    report["volume_error"] = _distribution([r for r in everything if r.volume_error is not None], "volume_error")
    return report


def _distribution(results: list[Result], key: str) -> dict[str, Any]:
    """Quantiles of the absolute error, shares within bounds, and the designs that are off by more than 2 %."""
    if not results:
        return {"count": 0}
    errors = np.abs([getattr(result, key) for result in results])
    return {
        "count": len(errors),
        **{f"p{q}": float(np.percentile(errors, q)) for q in (50, 75, 90, 95, 99, 100)},
        **{f"within_{bound:g}": float((errors <= bound).mean()) for bound in (1e-6, 1e-4, 1e-3, 1e-2, 2e-2)},
        "off": {f"{r.folder}/{r.name}": getattr(r, key) for r, e in zip(results, errors, strict=True) if e > 0.02},
    }


def main() -> None:
    """Print the summary and write all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED_DATA)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="only every n-th file of each folder")
    arguments = parser.parse_args()
    results = examine_all(cases(arguments.data, every=arguments.every), workers=arguments.workers)
    report = summary(results)
    arguments.out.write_text(json.dumps({"summary": report, "results": [asdict(r) for r in results]}, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
