"""The two consoles: `out()` for results (stdout), `err()` for talk (stderr).

Both look at `sys.stdout` / `sys.stderr` when they print, so redirections and tests see what they expect. Colours
follow the terminal and NO_COLOR. Rich is imported on first use: `cadtrain --help` must not wait for more than it shows.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 120
"""Columns of tables and panels that go to a file or a pipe, unless COLUMNS says otherwise."""


@cache
def out() -> Console:
    """The console for results."""
    return _console(stderr=False)


@cache
def err() -> Console:
    """The console for everything that is not a result."""
    return _console(stderr=True)


def print_text(text: str) -> None:
    """Write `text` and a newline to stdout as it is: no wrapping, no markup, no colour."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def print_json(value: Any) -> None:
    """Write one JSON document to stdout, indented on a terminal, on one line otherwise."""
    indent = 2 if sys.stdout.isatty() else None
    print_text(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False))


def as_text(shown: Iterable[Any]) -> str:
    """What `out()` would write into a file."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH_WITHOUT_TERMINAL, highlight=False, no_color=True)
    for item in shown:
        console.print(item)
    return stream.getvalue()


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream: TextIO = sys.stderr if stderr else sys.stdout
    is_terminal = stream.isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else WIDTH_WITHOUT_TERMINAL
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)
