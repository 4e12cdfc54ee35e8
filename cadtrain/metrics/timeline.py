"""From a profiler's trace to where a step goes: computing by part of the model, communicating, copying, waiting.

A trace is a Chrome trace as `torch.profiler` writes it. On a GPU what counts is the device's own timeline: its kernels, each
given to the part of the model whose range was open where the kernel was launched. Without a GPU the operators on the
threads stand for kernels, and gloo's work on its own threads for collectives. Times in a trace are microseconds.

Ranges are named `cadtrain/...`: `step` holds `data`, `micro_step` (with `forward`, in it the parts, and then `backward`) and
`optimizer`. A part that runs inside `backward` is recomputed.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cadtrain.errors import DataError
from cadtrain.metrics.intervals import Interval, intersect, length, subtract, union

PREFIX = "cadtrain/"
STEP, DATA, MICRO_STEP, FORWARD, BACKWARD, OPTIMIZER = "step", "data", "micro_step", "forward", "backward", "optimizer"
PHASES = (STEP, DATA, MICRO_STEP, FORWARD, BACKWARD, OPTIMIZER)
TOP = "logits and loss"
"""What runs in the forward pass outside of every part: the head and the loss."""

Kind = Literal["compute", "communication", "copy"]
Path_ = tuple[str, ...]

_DEVICE_KINDS: Mapping[str, Kind] = {"kernel": "compute", "gpu_memcpy": "copy", "gpu_memset": "copy"}
_NO_WORK = ("autograd::", "c10d::", "profiler::")
"""Operators that only hold others, or that wait."""
_COLLECTIVES = ("allgather", "reducescatter", "allreduce", "broadcast", "alltoall", "sendrecv", "reduce")
"""In this order: `reduce` is in two others."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that ran."""

    start: float
    end: float
    kind: Kind
    name: str
    thread: Any
    launched: float
    """When and on which thread the host launched it."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """A trace, as far as it is needed."""

    events: tuple[Event, ...]
    ranges: Mapping[Any, Sequence[tuple[float, float, str]]] = field(default_factory=dict)
    """Of each thread: start, end and name without prefix."""
    is_device: bool = False
    """Whether the events are a GPU's own."""

    def times(self, kind: Kind) -> list[Interval]:
        """When something of `kind` ran."""
        return union((event.start, event.end) for event in self.events if event.kind == kind)


def read_trace(path: Path) -> Timeline:
    """The timeline of a trace file, plain or `.gz`. Raises `DataError` where it is no trace."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        try:
            rows = json.load(file)["traceEvents"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"is no Chrome trace: {error}", where=str(path)) from error
    return timeline_of(rows)


def timeline_of(rows: Iterable[Mapping[str, Any]]) -> Timeline:
    """The timeline of a trace's events."""
    complete = [row for row in rows if row.get("ph") == "X"]
    ranges: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
    for row in complete:
        if row.get("cat") == "user_annotation" and row["name"].startswith(PREFIX):
            ranges[row["tid"]].append((row["ts"], row["ts"] + row["dur"], row["name"].removeprefix(PREFIX)))
    has_device = any(row.get("cat") in _DEVICE_KINDS for row in complete)
    events = _device_events(complete) if has_device else _host_events(complete)
    return Timeline(tuple(events), dict(ranges), has_device)


def _device_events(rows: Sequence[Mapping[str, Any]]) -> list[Event]:
    """Kernels and copies, each with the place of its launch."""
    launches = {
        row["args"]["correlation"]: row
        for row in rows
        if row.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in row.get("args", {})
    }
    events = []
    for row in rows:
        kind = _DEVICE_KINDS.get(row.get("cat", ""))
        if kind is None:
            continue
        if kind == "compute" and "nccl" in row["name"].lower():
            kind = "communication"
        launch = launches.get(row.get("args", {}).get("correlation"), row)
        thread = launch["tid"] if launch is not row else None
        events.append(Event(row["ts"], row["ts"] + row["dur"], kind, row["name"], thread, launch["ts"]))
    return events


def _host_events(rows: Sequence[Mapping[str, Any]]) -> list[Event]:
    """Operators that work, and gloo's collectives on their threads."""
    events = []
    for row in rows:
        name, is_operator = row["name"], row.get("cat") == "cpu_op"
        if is_operator and "::" in name and not name.startswith(_NO_WORK):
            events.append(Event(row["ts"], row["ts"] + row["dur"], "compute", name, row["tid"], row["ts"]))
        elif not is_operator and name.startswith("gloo:"):
            events.append(Event(row["ts"], row["ts"] + row["dur"], "communication", name, row["tid"], row["ts"]))
    return events


def collective_of(name: str) -> str:
    """The kind of collective that a kernel's or gloo's name means: `all-gather`, …"""
    plain = name.lower().replace("_", "").replace(" ", "")
    found = next((word for word in _COLLECTIVES if word in plain), "other")
    for prefix in ("all", "reduce", "send"):
        if found.startswith(prefix) and found != prefix:
            return f"{prefix}-{found.removeprefix(prefix).replace('toall', 'to-all')}"
    return found


@dataclass(frozen=True, slots=True)
class CommunicationTimes:
    """Collectives of some steps, in microseconds."""

    total: float
    exposed: float
    """While nothing computed."""
    kinds: Mapping[str, float]
    is_device: bool
    """Whether a GPU's own timeline was read."""


def communication_times(timeline: Timeline) -> CommunicationTimes:
    """When collectives ran, and when they alone did."""
    ran = timeline.times("communication")
    kinds: dict[str, list[Interval]] = defaultdict(list)
    for event in timeline.events:
        if event.kind == "communication":
            kinds[collective_of(event.name)].append((event.start, event.end))
    return CommunicationTimes(
        length(ran),
        length(subtract(ran, timeline.times("compute"))),
        {name: length(union(times)) for name, times in sorted(kinds.items())},
        timeline.is_device,
    )


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Where a step goes, in milliseconds of a step; `parts`, `communication`, `copies`, `data_wait` and `gaps` add up to `step`."""

    is_device: bool
    """Whether a GPU's own timeline was read; without one, operators on the host stand for kernels."""
    steps: int
    step: float
    parts: Mapping[str, float]
    """Computing, by part of the forward pass, `backward`, `recompute`, `optimizer`, `other`."""
    communication: float
    """Collectives while nothing computes."""
    overlapped_communication: float
    """Collectives beside computing; it is in the time of the parts."""
    copies: float
    """Copies between host and device while nothing else runs there."""
    data_wait: float
    """The device has nothing to do and the host waits for a pack."""
    gaps: Mapping[str, float]
    """The device has nothing to do for another reason, by what the host was at: `forward`, `backward`, `optimizer`, `other`."""
    collectives: Mapping[str, float]
    kernels: tuple[tuple[str, float, float], ...]
    """The longest: name, milliseconds and calls a step."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "is_device": self.is_device, "steps": self.steps, "step_ms": self.step, "parts_ms": dict(self.parts), "exposed_communication_ms": self.communication,
            "overlapped_communication_ms": self.overlapped_communication, "exposed_copies_ms": self.copies,
            "data_wait_ms": self.data_wait, "gaps_ms": dict(self.gaps), "collectives_ms": dict(self.collectives),
            "kernels": [{"name": name, "ms": ms, "calls": calls} for name, ms, calls in self.kernels],
        }  # fmt: skip


def step_profile(timeline: Timeline, *, num_kernels: int = 20) -> StepProfile:
    """Divide the time of the trace's steps. Raises `ValueError` for a trace without `cadtrain/step` ranges."""
    main = next((thread for thread, rows in timeline.ranges.items() if any(name == STEP for *_, name in rows)), None)
    if main is None:
        raise ValueError(f"the trace has no {PREFIX}{STEP} ranges")
    phases = {name: union((s, e) for s, e, found in timeline.ranges[main] if found == name) for name in PHASES}
    window, steps = phases[STEP], sum(name == STEP for *_, name in timeline.ranges[main])
    compute, ran = (intersect(timeline.times(kind), window) for kind in ("compute", "communication"))
    copies = intersect(timeline.times("copy"), window)
    idle = subtract(window, union([*compute, *ran, *copies]))
    gaps = subtract(idle, phases[DATA])
    by_phase = {name: length(intersect(gaps, phases[name])) for name in (FORWARD, BACKWARD, OPTIMIZER)}
    exposed = length(subtract(ran, compute))
    to_ms = 1e-3 / steps

    def scaled(values: Mapping[str, float]) -> dict[str, float]:
        return {name: value * to_ms for name, value in values.items()}

    return StepProfile(
        is_device=timeline.is_device,
        steps=steps,
        step=length(window) * to_ms,
        parts=scaled(_computing(timeline, main, window)),
        communication=exposed * to_ms,
        overlapped_communication=(length(ran) - exposed) * to_ms,
        copies=length(subtract(copies, union([*compute, *ran]))) * to_ms,
        data_wait=length(intersect(idle, phases[DATA])) * to_ms,
        gaps=scaled({**by_phase, "other": length(gaps) - sum(by_phase.values())}),
        collectives=scaled(communication_times(timeline).kinds),
        kernels=_longest(timeline, steps, num_kernels),
    )


def _computing(timeline: Timeline, main: Any, window: Sequence[Interval]) -> dict[str, float]:
    """Time by part; where kernels run at once, it is the first one's."""
    places = {thread: _Places(rows) for thread, rows in timeline.ranges.items()}
    found: dict[str, float] = defaultdict(float)
    done = window[0][0]
    for event in sorted((e for e in timeline.events if e.kind == "compute"), key=lambda e: (e.start, -e.end)):
        start = max(event.start, done)
        if event.end <= start:
            continue
        done = event.end
        own = places[event.thread].at(event.launched) if event.thread in places else ()
        found[_part(own, places[main].at(event.launched))] += length(intersect([(start, event.end)], window))
    return {name: time for name, time in found.items() if time}


def _part(own: Path_, main: Path_) -> str:
    """What a launch belongs to: `own` are the ranges open on its thread, `main` those on the main thread, outermost first."""
    inner = (own or main or ("",))[-1]
    if BACKWARD in main:
        return BACKWARD if inner in PHASES else "recompute"
    if OPTIMIZER in main:
        return OPTIMIZER
    if FORWARD in main:
        return TOP if inner == FORWARD else inner
    return "other"


class _Places:
    """Which ranges of a thread are open at a time."""

    def __init__(self, ranges: Sequence[tuple[float, float, str]]) -> None:
        self._times: list[float] = [float("-inf")]
        self._paths: list[Path_] = [()]
        stack: list[tuple[float, str]] = []
        for start, end, name in sorted(ranges, key=lambda row: (row[0], -row[1])):
            self._close(stack, start)
            stack.append((end, name))
            self._mark(start, stack)
        self._close(stack, float("inf"))

    def at(self, time: float) -> Path_:
        """Names, outermost first."""
        return self._paths[bisect_right(self._times, time) - 1]

    def _close(self, stack: list[tuple[float, str]], until: float) -> None:
        while stack and stack[-1][0] <= until:
            end, _ = stack.pop()
            self._mark(end, stack)

    def _mark(self, time: float, stack: Sequence[tuple[float, str]]) -> None:
        self._times.append(time)
        self._paths.append(tuple(name for _, name in stack))


def _longest(timeline: Timeline, steps: int, count: int) -> tuple[tuple[str, float, float], ...]:
    times: dict[str, float] = defaultdict(float)
    for event in timeline.events:
        times[event.name] += event.end - event.start
    calls = Counter(event.name for event in timeline.events)
    longest = sorted(times.items(), key=lambda row: -row[1])[:count]
    return tuple((name, time * 1e-3 / steps, calls[name] / steps) for name, time in longest)
