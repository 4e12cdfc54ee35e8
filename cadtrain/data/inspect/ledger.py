"""The faults in a dataset's `failures.jsonl`, by kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadtrain.data.inspect.tally import FaultTally
from cadtrain.errors import DataError


@dataclass(frozen=True, slots=True)
class LedgerFault:
    """Faults of one kind in `failures.jsonl`: `dropped` inputs were left out, others used all the same."""

    kind: str
    dropped: bool
    count: int
    examples: tuple[tuple[str, str], ...]
    """The first of them, as (file, reason)."""


def read_ledger(path: Path) -> tuple[LedgerFault, ...]:
    """The faults in a `failures.jsonl` by kind, those that cost a part first; nothing where there is no file.

    Raises `DataError` with the line that is none of a ledger.
    """
    tallies = {True: FaultTally(), False: FaultTally()}
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    entry: dict[str, Any] = json.loads(line)
                    tallies[bool(entry["dropped"])].add(entry["kind"], "", entry["file"], entry["reason"])
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise DataError(
                        f"no entry of a ledger ({type(error).__name__}: {error})",
                        where=f"{path}:{number}",
                        hint="The file was changed after it was made. Prepare the dataset again with `--overwrite`.",
                    ) from error
    return tuple(
        LedgerFault(fault.kind, dropped, fault.count, fault.examples)
        for dropped, tally in tallies.items()
        for fault in tally.faults()
    )
