"""Which share of a preparation a process does, for array jobs."""

from __future__ import annotations

from dataclasses import dataclass

from cadtrain.errors import UsageError


@dataclass(frozen=True, slots=True)
class Shard:
    """One share of `count`, counted from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`3/16` -> the fourth of sixteen; raises `UsageError`."""
        index, _, count = text.partition("/")
        hint = "Write i/n with i from 0 to n-1, as in an array job `--array=0-15`: --shard $SLURM_ARRAY_TASK_ID/16."
        if not (index.isdecimal() and count.isdecimal()):
            raise UsageError(f"{text!r} is no shard.", where="--shard", hint=hint)
        if not int(index) < int(count):
            raise UsageError(f"there is no shard {index} of {count}: shards count from 0.", where="--shard", hint=hint)
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(0, 1)
