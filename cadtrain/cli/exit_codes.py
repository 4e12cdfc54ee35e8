"""Exit codes by kind of end; the errors of `cadtrain.errors` carry the same numbers."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a shell or a scheduler sees."""

    DONE = 0
    UNEXPECTED = 1
    """A fault of cadtrain itself, shown with its traceback; or a reader that closed the pipe."""
    USAGE = 2
    """Wrong usage, configuration or input data."""
    ENVIRONMENT = 3
    """The machine lacks something."""
    TRAINING = 4
    """The work itself failed."""
    INTERRUPTED = 130
    """Ctrl-C; a training run has saved its state."""
    TERMINATED = 143
    """SIGTERM; a training run has saved its state."""
