"""Notice that no rank moves any more, and say which one lags and where it stands."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from cadtrain.heartbeat import STEPPING, Beat, heartbeat_path, read_beat
from cadtrain.units import format_seconds

LEAST_STEP_LIMIT = 300.0
STEPS_OF_PATIENCE = 10
SLOW_PHASE_LIMIT = 2 * 3600.0
"""For phases of unknown length (loading, saving, validating, the first steps): weights may be downloaded meanwhile, and ranks
that wait for each other there are ended after 30 minutes by the collectives' own limit."""
SECONDS_BETWEEN_LOOKS = 1.0
ABSENCE_SECONDS = 30.0
"""A gap between two looks from which the launcher itself was stopped (Ctrl-Z, a frozen container): its ranks were, too."""
STACK_SECONDS = 5.0
OTHER_HOSTS_SECONDS = 10.0
"""How long the stacks of other hosts' ranks are waited for: their launchers look at their own time."""

_COLLECTIVE_FILES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/", "deepspeed/runtime/zero/partition")
_FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)')


@dataclass(frozen=True, slots=True)
class HangLimit:
    """How long no rank may move. `seconds` holds for every phase; None follows the steps; 0 switches the watch off."""

    seconds: float | None = None

    def of(self, beats: Iterable[Beat | None]) -> float:
        """The limit in seconds where the ranks stand at `beats`; None is a rank that has given no sign yet."""
        if self.seconds is not None:
            return self.seconds or float("inf")
        known = list(beats)
        longest = max((beat.longest_step_seconds for beat in known if beat is not None), default=0.0)
        if longest and all(beat is not None and beat.phase == STEPPING for beat in known):
            return max(LEAST_STEP_LIMIT, STEPS_OF_PATIENCE * longest)
        return SLOW_PHASE_LIMIT


class HangWatch:
    """Compares the ranks' signs of life from look to look. Clocks of other hosts play no part."""

    def __init__(self, logs: Path, limit: HangLimit) -> None:
        self._logs, self._limit = logs, limit
        self._seen: dict[int, Beat | None] = {}
        self._moved_at = self._looked_at = time.monotonic()

    @property
    def still_seconds(self) -> float:
        """Time since a rank last moved."""
        return self._looked_at - self._moved_at

    def is_hung(self, ranks: Iterable[int], *, now: float | None = None) -> bool:
        """Look at the ranks; whether none has moved for longer than the limit. Cheap to call often."""
        now = time.monotonic() if now is None else now
        gap = now - self._looked_at
        if gap < SECONDS_BETWEEN_LOOKS:
            return False
        self._looked_at = now
        if gap > ABSENCE_SECONDS:
            self._moved_at += gap
        beats = {rank: read_beat(heartbeat_path(self._logs, rank)) for rank in ranks}
        if beats != self._seen:
            self._seen, self._moved_at = beats, now
        return self.still_seconds > self._limit.of(beats.values())

    def describe(self) -> tuple[int, str]:
        """The rank to look at first, and what is known, in one line a rank; call after the stacks were written.

        Ranks of other hosts, whose launchers notice the same, are told of as well: the folder is shared.
        """
        if not self._seen:
            return -1, f"no rank has started in {format_seconds(self.still_seconds)}: DeepSpeed's launcher hangs."
        self._wait_for_other_hosts()
        beats = {**{rank: read_beat(heartbeat_path(self._logs, rank)) for rank in self._others()}, **self._seen}
        places = {rank: read_place(stacks_path(self._logs, rank)) for rank in beats}
        suspects = lagging(beats, places)
        lines = [f"no rank has moved for {format_seconds(self.still_seconds)}."]
        for rank, beat in sorted(beats.items()):
            where = beat.where() if beat is not None else "gave no sign yet"
            is_silent = not places[rank].is_known and any(place.is_known for place in places.values())
            stack = "; gave no stack: stopped, or stuck in a driver" if is_silent else places[rank].describe()
            lines.append(f"rank {rank}: {where}{stack}{'  <- lags' if rank in suspects else ''}")
        return min(suspects, default=-1), "\n".join(lines)

    def _others(self) -> list[int]:
        """Ranks with a heartbeat that are not this host's."""
        found = [int(path.stem.removeprefix("rank_")) for path in self._logs.glob("rank_*.heartbeat")]
        return sorted(set(found) - set(self._seen))

    def _wait_for_other_hosts(self) -> None:
        end = time.monotonic() + OTHER_HOSTS_SECONDS
        while time.monotonic() < end and any(
            not (path := stacks_path(self._logs, rank)).exists() or not path.stat().st_size for rank in self._others()
        ):
            time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank's main thread stood: the collective it waits in, and the line of cadtrain that called it."""

    collective: str = ""
    caller: str = ""
    top: str = ""
    is_known: bool = False

    def describe(self) -> str:
        """`; waits in all_reduce, called at cadtrain/train/step.py:53`, or nothing."""
        if not self.is_known:
            return ""
        text = f"; waits in {self.collective}" if self.collective else f"; at {self.top}"
        return f"{text}, from {self.caller}" if self.caller and self.caller != self.top else text


def lagging(beats: Mapping[int, Beat | None], places: Mapping[int, Place]) -> set[int]:
    """Ranks that keep the others waiting: those that are in no collective, or gave no stacks (stopped, stuck in a driver),
    while others are in one; else those with fewer signs."""
    waiting = {rank for rank, place in places.items() if place.collective}
    if waiting and len(waiting) < len(places):
        return set(places) - waiting
    marks = {rank: beat.marks if beat is not None else 0 for rank, beat in beats.items()}
    most = max(marks.values(), default=0)
    return {rank for rank, count in marks.items() if count < most}


def ask_for_stacks(logs: Path, ranks: Mapping[int, psutil.Process], *, seconds: float = STACK_SECONDS) -> None:
    """Let every rank write its stacks, and wait until all have or `seconds` are over."""
    waiting: dict[Path, int] = {}
    for rank, process in ranks.items():
        path = stacks_path(logs, rank)
        # A rank without the file has not taken the signal yet and would die of it before its stacks are known.
        if path.exists():
            waiting[path] = path.stat().st_size
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGUSR2)
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(path.stat().st_size == size for path, size in waiting.items()):
        time.sleep(0.05)


def stacks_path(logs: Path, rank: int) -> Path:
    """`logs/rank_00.stacks.txt`."""
    return logs / f"rank_{rank:02d}.stacks.txt"


def read_place(path: Path) -> Place:
    """Where the main thread stood in the last dump in `path`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Place()
    # The thread that took the signal is called the current one: the main thread, unless that one cannot be reached.
    _, found, rest = text.rpartition("Current thread ")
    frames = []
    for line in rest.splitlines()[1:] if found else ():
        match = _FRAME.match(line)
        if match is None:
            break
        frames.append(match)
    if not frames:
        return Place()
    inner = [frame["function"] for frame in frames if any(name in frame["file"] for name in _COLLECTIVE_FILES)]
    own = next((frame for frame in frames if "/cadtrain/" in frame["file"]), None)
    return Place(
        collective=inner[0] if inner else "",
        caller=_short(own) if own is not None else "",
        top=_short(frames[0]),
        is_known=True,
    )


def _short(frame: re.Match[str]) -> str:
    parts = Path(frame["file"]).parts
    if "cadtrain" in parts:
        last = len(parts) - 1 - parts[::-1].index("cadtrain")
        name = "/".join(parts[last:])
    else:
        name = "/".join(parts[-2:])
    return f"{name}:{frame['line']} {frame['function']}"
