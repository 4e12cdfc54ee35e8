"""Kill a launch's processes when the process that looked after them is gone.

Run as a script by path, with the standard library alone so that it starts in milliseconds:
`guard.py MARK`. It reads the launcher's process group from stdin and then waits for end of file.
A supervisor that ends in order writes `done` first; one that was killed cannot, and the guard then kills the process group
and every process whose environment carries the mark (ranks that made a session of their own, say).
"""

import contextlib
import os
import signal
import sys
import time

MARK_VARIABLE = "CADTRAIN_LAUNCH_ID"


def processes_with_mark(mark: str) -> list[int]:
    """Ids of the live processes of this user whose environment holds `MARK_VARIABLE=mark`; empty without /proc."""
    needle = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if needle in file.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue
    return found


def kill_marked(group: int | None, mark: str, *, attempts: int = 20) -> None:
    """Kill the process group and every process with the mark, until two looks in a row find none.

    A process shows no environment while it loads a new program, so one look alone may miss a child just started.
    """
    was_empty = False
    for _ in range(attempts):
        if group is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        left = processes_with_mark(mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not left and was_empty:
            return
        was_empty = not left
        time.sleep(0.05)


def main() -> None:
    """Wait for the supervisor to say `done` or to vanish."""
    mark = sys.argv[1]
    text = sys.stdin.read()
    if text.endswith("done\n"):
        return
    head = text.split("\n", 1)[0]
    kill_marked(int(head) if head.isdecimal() else None, mark)
    with contextlib.suppress(OSError):
        sys.stderr.write("cadtrain launch was killed; its ranks were killed as well.\n")


if __name__ == "__main__":
    main()
