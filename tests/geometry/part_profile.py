"""Where the time of making a part goes: CPU milliseconds by stage, one process, 2048 points and 2 views of 224 pixels.

    python -m tests.geometry.part_profile synth --count 200
    python -m tests.geometry.part_profile real ../shared/data/omni-cad-test-subset --skip 00010215_00015

Stages do not overlap: what building a solid spends on checking it counts as building. `other` is drawing or reading a design,
quantizing, its text, box, volume and area.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cadtrain.data.prepare.inputs import PartTask, PrepareOptions
from cadtrain.data.prepare.parts import build_part
from cadtrain.data.synth.make import SynthTask, build_synthetic
from cadtrain.geometry import kernel, part

NUM_POINTS, NUM_VIEWS, IMAGE_SIZE = 2048, 2, 224
STAGES: tuple[tuple[Any, str, str], ...] = (
    (kernel, "build_solid", "build"),
    (kernel, "is_valid", "check"),
    (kernel, "tessellate", "mesh"),
    (part, "render_views", "render"),
    (part, "encode_png", "PNG"),
    (part, "sample_surface", "sample"),
)


class Clock:
    """CPU seconds by stage of the part under way."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Count what `owner.name` takes from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.spent[stage] += time.process_time() - start

        setattr(owner, name, timed)


def synthetic(count: int) -> Iterator[Callable[[], Any]]:
    for index in range(count):
        task = SynthTask(0, index, NUM_POINTS, NUM_VIEWS, IMAGE_SIZE)
        yield lambda task=task: build_synthetic(task)


def real(root: Path, skip: list[str]) -> Iterator[Callable[[], Any]]:
    options = PrepareOptions(num_points=NUM_POINTS, num_views=NUM_VIEWS, image_size=IMAGE_SIZE)
    for path in sorted(root.rglob("*.json")):
        if path.stem not in skip:
            task = PartTask(
                id=path.stem, document=path.stem, file=path.name, design=path, caption=None, clouds=None, pictures=None, options=options
            )
            yield lambda task=task: build_part(task)


def main() -> None:
    """Make the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=["synth", "real"])
    parser.add_argument("root", type=Path, nargs="?", help="folder of DeepCAD JSON files, for `real`")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--skip", action="append", default=[], help="stem of a file to leave out")
    arguments = parser.parse_args()
    clock, rows = Clock(), []
    works = synthetic(arguments.count) if arguments.source == "synth" else real(arguments.root, arguments.skip)
    next(iter(synthetic(1)))()  # imports and the kernel's first touch are no part's
    for owner, name, stage in STAGES:
        clock.wrap(owner, name, stage)
    for work in works:
        clock.spent.clear()
        start = time.process_time()
        work()
        rows.append({"total": time.process_time() - start, **clock.spent})
    print(f"{len(rows)} parts, {len(rows) / sum(row['total'] for row in rows):.1f} a second of one core")
    print(f"{'CPU ms':8}{'mean':>9}{'median':>9}{'p99':>9}")
    for row in rows:
        row["other"] = 2 * row["total"] - sum(row.values())
    for stage in ["total", *(stage for _, _, stage in STAGES), "other"]:
        values = np.array([row.get(stage, 0.0) for row in rows]) * 1000
        print(f"{stage:8}{values.mean():9.1f}{np.median(values):9.1f}{np.quantile(values, 0.99):9.1f}")


if __name__ == "__main__":
    main()
