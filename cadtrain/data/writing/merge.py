"""The shards of an array job into one dataset.

All shards write their blocks into one folder, under the names that one process would have given them, so that merging encodes
and copies nothing but the few files that hold duplicates; the result is the same, byte for byte, as that of one process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cadtrain import __version__
from cadtrain.data.manifest import MANIFEST_NAME, Manifest
from cadtrain.data.writing.costs import summarize_costs
from cadtrain.data.writing.pipeline import Summary, writing
from cadtrain.data.writing.target import leftovers, resolve_target, work_folders
from cadtrain.data.writing.writer import PLAN_NAME, DatasetWriter, Plan, chunks_per_block
from cadtrain.errors import DataError

_MOST_NAMED = 8


def merge(out: Path, *, overwrite: bool = False) -> Summary:
    """Make the dataset `out` from the blocks that the shards of its preparation have written.

    A dataset that is there already, with no complete work beside it, is left as it is. Raises `DataError` where blocks are missing (it
    names the shards that lack them), where shards were made with different options or inputs (it names those) or by another version,
    and `UsageError` where a process is still writing or `out` is taken.
    """
    target = resolve_target(out)
    folders = work_folders(target)
    if (target / MANIFEST_NAME).is_file() and not (folders if overwrite else any(map(_is_complete, folders))):
        manifest = Manifest.read(target)
        return Summary(
            out,
            manifest,
            inputs=sum(manifest.counts.values()),
            is_reused=True,
            was_compared=False,
            leftovers=leftovers(target),
        )
    folder, raw = _the_one(out, folders)
    plan = Plan.from_json(raw)
    if plan.fingerprint != raw["fingerprint"]:
        raise DataError(
            f"written by another version than this cadtrain ({__version__})",
            where=str(folder),
            hint="Merge with the version that wrote the shards, or prepare them again with this one.",
        )
    start = time.monotonic()
    with writing(target), DatasetWriter(target, plan, raw["num_chunks"], overwrite=overwrite) as writer:
        if not writer.is_finished and (missing := writer.missing_blocks):
            raise _incomplete(folder, missing, writer.num_blocks)
        inputs = raw["num_inputs"]
        manifest = writer.finish()
    return Summary(
        out,
        manifest,
        time.monotonic() - start,
        inputs,
        inputs,
        costs=summarize_costs(target),
        leftovers=leftovers(target),
    )


def _is_complete(folder: Path) -> bool:
    """Whether all chunks of the work there are in blocks."""
    if (folder / MANIFEST_NAME).is_file():
        return True
    if not (folder / PLAN_NAME).is_file():
        return False
    num_chunks = json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))["num_chunks"]
    return len(list((folder / "journal").glob("*.json"))) >= -(-num_chunks // chunks_per_block(num_chunks))


def _the_one(out: Path, folders: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The work folder of `out` and its plan."""
    plans = {}
    for folder in folders:
        if (folder / PLAN_NAME).is_file():
            plans[folder] = json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))
    if not plans:
        raise DataError(
            "nothing to merge: no shard of this dataset has been prepared",
            where=str(out),
            hint=f"Prepare them first, each with the same options: `cadtrain data prepare … --out {out} --shard 0/4`.",
        )
    if len(plans) > 1:
        raise DataError(
            f"shards were prepared with different options or inputs, in {len(plans)} folders:\n" + _differences(plans),
            where=str(out),
            hint="Remove the folders that are not wanted, and prepare the shards that were in them again.",
        )
    return next(iter(plans.items()))


def _differences(plans: dict[Path, dict[str, Any]]) -> str:
    """One line a folder: its shards, and the settings that are not the same in all."""
    flat = {
        folder: {**plan["settings"], **{key: value for key, value in plan.items() if key != "settings"}}
        for folder, plan in plans.items()
    }
    names = sorted({name for values in flat.values() for name in values} - {"fingerprint"})
    differing = [name for name in names if len({json.dumps(values.get(name)) for values in flat.values()}) > 1]
    lines = []
    for folder, values in flat.items():
        settings = ", ".join(f"{name} {values.get(name)}" for name in differing) or "another version of cadtrain"
        lines.append(f"  {folder.name}: shards {', '.join(_shards_begun(folder)) or 'none'}; {settings}")
    return "\n".join(lines)


def _shards_begun(folder: Path) -> list[str]:
    """Names (`3/16`) of the shards that some process has begun; each left its lock file."""
    pairs = sorted(tuple(map(int, path.stem.split("-of-"))) for path in (folder / "locks").glob("*-of-*.lock"))
    return [f"{index}/{count}" for index, count in pairs if count > 1]


def _incomplete(folder: Path, missing: Sequence[int], num_blocks: int) -> DataError:
    begun = _shards_begun(folder)
    counts = sorted({int(name.split("/")[1]) for name in begun}, reverse=True)
    hint = "Start the same `cadtrain data prepare` command again without `--shard`: it does what is left, and finishes."
    if not counts:
        return DataError(f"{len(missing)} of {num_blocks} blocks are missing", where=str(folder), hint=hint)
    count = counts[0]
    lacking = {index: sum(block % count == index for block in missing) for index in range(count)}
    lines = [
        f"shard {index}/{count} lacks {number} of {len(range(index, num_blocks, count))} blocks"
        + ("" if f"{index}/{count}" in begun else " (never begun)")
        for index, number in lacking.items()
        if number
    ]
    named = "; ".join(lines[:_MOST_NAMED]) + (
        f"; and {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
    )
    return DataError(
        f"{len(missing)} of {num_blocks} blocks are missing: {named}",
        where=str(folder),
        hint="Prepare these shards (each goes on where it stopped), then merge again; or start the command once without `--shard`.",
    )
