"""The worker's side of `sandbox`: a process that takes items from a pipe until the pipe ends."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from cadtrain.errors import DataError, EnvironmentFault, GeometryError, GrammarError, SchemaError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_PR_SET_PDEATHSIG = 1

# From the special to the general: the first that fits names the failure.
_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (SchemaError, "schema"),
    (GrammarError, "grammar"),
    (DataError, "data"),
    (GeometryError, "geometry"),
    (EnvironmentFault, "environment"),
)


@dataclass(frozen=True, slots=True)
class Ready:
    """Sent once, after the preloaded modules are there, or with the reason why they are not."""

    error: EnvironmentFault | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """Sent once, when the first item and its function have been read, which may take the import of a module or many."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What an item came to; `kind` is None for a value.

    `peak_mib` is the process's largest resident memory while it worked on the item, `rss_mib` what it holds afterwards; None
    where the system does not say.
    """

    value: Any = None
    kind: str | None = None
    reason: str = ""
    detail: str = ""
    error: Exception | None = None
    seconds: float = 0.0
    peak_mib: float | None = None
    rss_mib: float | None = None


def serve(connection: Connection, parent_id: int, preload: tuple[str, ...]) -> None:
    """Answer each `(function, item)` from the pipe with a `Reply`; the body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    _die_with(parent_id)
    for name in _THREAD_VARIABLES:
        os.environ[name] = "1"
    try:
        try:
            for module in preload:
                importlib.import_module(module)
        except EnvironmentFault as error:
            connection.send(Ready(error))
            return
        except ImportError as error:
            connection.send(Ready(EnvironmentFault(f"a kernel worker cannot load {error.name}: {error}.")))
            return
        connection.send(Ready())
        has_begun = False
        while True:
            function, item = connection.recv()
            if not has_begun:
                connection.send(Begun())
                has_begun = True
            connection.send_bytes(_answer(function, item))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has closed the pipe: there is no more work


def _answer(function: Callable[[Any], Any], item: Any) -> bytes:
    reset_peak_memory()
    start = time.perf_counter()
    try:
        return _pickled(Reply(value=function(item)), start)
    except Exception as error:  # the boundary of the process: whatever the function raises is told to the parent
        kind = next((name for cls, name in _KINDS if isinstance(error, cls)), "error")
        reason = f"{type(error).__name__}: {error}"
        known = error if kind != "error" else None
        detail = "" if known else traceback.format_exc()
        return _pickled(Reply(kind=kind, reason=reason, detail=detail, error=known), start)


def _pickled(reply: Reply, start: float) -> bytes:
    peak, now = memory_mib()
    measured = replace(reply, seconds=time.perf_counter() - start, peak_mib=peak, rss_mib=now)
    return bytes(ForkingPickler.dumps(measured))


def reset_peak_memory() -> None:
    """Let the peak of `memory_mib` count from now; does nothing where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # not Linux, or a container that forbids it: the peak is then that of the process's whole life


def memory_mib(process_id: int | str = "self") -> tuple[float | None, float | None]:
    """Peak and present resident memory of a process in MiB; None, None where the system does not say."""
    try:
        with Path(f"/proc/{process_id}/status").open(encoding="ascii", errors="replace") as lines:
            found = dict(line.split(":", 1) for line in lines if line.startswith(("VmHWM:", "VmRSS:")))
    except OSError:
        return None, None
    peak, now = (found.get(key, "").split() for key in ("VmHWM", "VmRSS"))
    return (int(peak[0]) / 1024 if peak else None), (int(now[0]) / 1024 if now else None)


def _die_with(parent_id: int) -> None:
    """End this process when the parent ends, however it ends and whatever this process is doing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_id:  # it ended before the line above
        os._exit(1)

    def watch() -> None:
        # Where the kernel cannot be asked for the signal, this ends the process at its next Python instruction.
        while os.getppid() == parent_id:
            time.sleep(1.0)
        os._exit(1)

    if sys.platform != "linux":
        threading.Thread(target=watch, daemon=True).start()
