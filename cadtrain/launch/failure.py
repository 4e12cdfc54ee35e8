"""Why a launch failed: the first rank that did, in its own words."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cadtrain.heartbeat import heartbeat_path, read_beat

LOG_TAIL_LINES = 20
_ERROR_NAME = re.compile(r"rank_(\d+)\.error\.json")


@dataclass(frozen=True, slots=True)
class RankExit:
    """How a rank's process ended: `status` is its exit code, minus the signal that killed it, or None where it was missed.

    `time` is when it was seen, in epoch seconds.
    """

    rank: int
    status: int | None
    time: float


@dataclass(frozen=True, slots=True)
class RankFailure:
    """The failure to show. `type` is the exception's name, or the signal's; `exit_code` is what `launch` exits with."""

    rank: int
    type: str
    message: str
    exit_code: int
    traceback: str = ""
    log_tail: str = ""
    log_path: Path | None = None
    is_expected: bool = False
    """Whether cadtrain raised it on purpose: its message says what to do, and a traceback would say no more."""
    native_tail: str = ""
    """The end of what native libraries wrote."""
    stood_at: str = ""
    """Where the rank stood when it last gave a sign of life."""

    @property
    def is_interrupt(self) -> bool:
        """Whether the rank left on request, after saving."""
        return self.type == "Interrupted"


@dataclass(frozen=True, slots=True)
class _Written:
    time: float
    failure: RankFailure


def read_failures(logs: Path) -> list[_Written]:
    """The error files that the ranks wrote, earliest first; a torn or foreign file is passed over."""
    found = []
    for path in logs.glob("rank_*.error.json"):
        match = _ERROR_NAME.fullmatch(path.name)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            written = _epoch(record["time"])
            failure = RankFailure(
                rank=int(record.get("rank", match[1] if match else -1)),
                type=str(record["type"]),
                message=str(record["message"]),
                exit_code=int(record["exit_code"]),
                traceback=str(record.get("traceback") or ""),
                is_expected=bool(record.get("is_expected", False)),
            )
            failure = _with_surroundings(logs, failure)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        found.append(_Written(written, failure))
    return sorted(found, key=lambda item: (item.time, item.failure.rank))


def _epoch(value: object) -> float:
    if isinstance(value, int | float):
        return float(value)
    return datetime.datetime.fromisoformat(str(value)).timestamp()


def first_failure(logs: Path, exits: Sequence[RankExit], launcher_status: int) -> RankFailure | None:
    """The failure that came first, or None where nothing failed.

    A rank that was killed by a signal writes nothing, and its peers then write of broken connections: a kill that was
    seen no later than a second after the earliest error file counts as first. `exits` is in order of observation.
    """
    written = read_failures(logs)
    # The launcher passes on the status of the failure that it saw first; it folds a signal n into 256 - n.
    folded = launcher_status - 256 if launcher_status > 256 - 65 else launcher_status
    known = [RankExit(item.rank, folded if item.status is None else item.status, item.time) for item in exits]
    failed = [item for item in known if item.status]
    if failed and failed[0].status is not None and failed[0].status < 0 and _is_first(failed[0], written):
        own = [item.failure for item in written if item.failure.rank == failed[0].rank]
        return own[0] if own else _from_exit(logs, failed[0].rank, failed[0].status)
    if written:
        return written[0].failure
    if failed and failed[0].status is not None:
        return _from_exit(logs, failed[0].rank, failed[0].status)
    return _from_exit(logs, -1, folded) if folded else None


def _is_first(kill: RankExit, written: Sequence[_Written]) -> bool:
    return not written or kill.time <= written[0].time + 1.0


def _from_exit(logs: Path, rank: int, status: int) -> RankFailure:
    if status >= 0:
        # 1 is Python's code for an uncaught exception; here that is a failed training.
        failure = RankFailure(
            rank, "exit", f"ended with exit code {status} and no message.", 4 if status == 1 else status
        )
        return _with_surroundings(logs, failure, tail=True)
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    message = {
        "SIGKILL": "was killed (SIGKILL).",
        "SIGBUS": "was killed (SIGBUS): memory mapped from a file could not be had.",
        "SIGSEGV": "crashed (SIGSEGV) in native code.",
        "SIGABRT": "aborted (SIGABRT) in native code; a NCCL time limit ends this way too.",
    }.get(name, f"was ended by {name}.")
    return _with_surroundings(logs, RankFailure(rank, name, message, 128 - status), tail=True)


def launcher_killed(number: int) -> RankFailure:
    """The failure of a launch whose DeepSpeed launcher was ended by the signal `number` from outside."""
    name = signal.Signals(number).name
    return RankFailure(
        -1, name, f"DeepSpeed's launcher was killed ({name}); its ranks were ended with it.", 128 + number
    )


def with_place(logs: Path, failure: RankFailure) -> RankFailure:
    """`failure` with where its rank stood when it last gave a sign of life."""
    beat = read_beat(heartbeat_path(logs, failure.rank)) if failure.rank >= 0 else None
    return failure if beat is None else dataclasses.replace(failure, stood_at=beat.where())


def with_log(logs: Path, failure: RankFailure) -> RankFailure:
    """`failure` with its rank's log, where there is one."""
    return dataclasses.replace(failure, log_path=_log_path(logs, failure.rank)) if failure.rank >= 0 else failure


def _with_surroundings(logs: Path, failure: RankFailure, *, tail: bool = False) -> RankFailure:
    """`failure` with its rank's log, what native libraries wrote, and where it stood."""
    if failure.rank < 0:
        return failure
    path = _log_path(logs, failure.rank)
    return dataclasses.replace(
        with_place(logs, failure),
        log_path=path,
        log_tail=_tail(path) if tail else "",
        native_tail=_tail(logs / f"rank_{failure.rank:02d}.native.txt"),
    )


def _log_path(logs: Path, rank: int) -> Path | None:
    path = logs / f"rank_{rank:02d}.log"
    return path if path.is_file() else None


def _tail(path: Path | None, limit: int = 64 * 1024) -> str:
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
