"""How an error looks: what, where, what to do. One place for all commands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cadtrain.errors import CadtrainError, ConfigError, Fault
from cadtrain.ui.console import err, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

TITLES = {2: "Cannot start", 3: "This machine", 4: "Failed", 130: "Interrupted", 143: "Interrupted"}
"""Title of the panel by exit code."""


def show_error(error: CadtrainError, *, debug: bool = False) -> None:
    """A panel on stderr; with `debug` the traceback stands above it."""
    from rich.panel import Panel
    from rich.text import Text
    from rich.traceback import Traceback

    console = err()
    if debug:
        console.print(Traceback.from_exception(type(error), error, error.__traceback__))
    interrupted = error.exit_code >= 128
    title = Text(TITLES.get(error.exit_code, "Failed"), style="bold")
    console.print(Panel(_body(error), title=title, title_align="left", border_style="yellow" if interrupted else "red"))


def show_usage_error(message: str, *, usage: str = "", help_command: str = "") -> None:
    """A wrong command line: the usage line above, the message in a panel, where to read more."""
    from rich.panel import Panel
    from rich.text import Text

    parts = [Text(message)]
    if help_command:
        parts.append(Text(f"Run `{help_command}` for help.", style="cyan"))
    if usage:
        err().print(Text(usage))
    err().print(
        Panel(Text("\n").join(parts), title=Text("Cannot start", style="bold"), title_align="left", border_style="red")
    )


def error_as_json(error: CadtrainError) -> dict[str, Any]:
    """An error as plain values: kind, message, where, hint, exit code, and each fault of a configuration."""
    values: dict[str, Any] = {
        "kind": type(error).__name__,
        "message": error.message,
        "where": error.where,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    if isinstance(error, ConfigError):
        values["message"] = error.message.partition("\n")[0]
        values["faults"] = [{"where": f.where, "message": f.message, "hint": f.hint or None} for f in error.faults]
    return values


def print_error_json(values: dict[str, Any]) -> None:
    """The one JSON document on stdout that stands in place of a result."""
    print_json({"error": json.loads(json.dumps(values, default=str))})


def _body(error: CadtrainError) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if error.where:
        parts.append(Text(error.where, style="bold"))
    if isinstance(error, ConfigError):
        parts.append(Text(error.message.partition("\n")[0] + "."))
        parts += [_fault(fault) for fault in error.faults]
    else:
        parts.append(Text(error.message))
    if error.hint:
        parts.append(Text(f"→ {error.hint}", style="cyan"))
    return Group(*parts)


def _fault(fault: Fault) -> RenderableType:
    from rich.padding import Padding
    from rich.text import Text

    message, *shown = fault.message.split("\n")
    text = Text.assemble((fault.where, "bold"), "\n", message)
    for line in shown:
        text.append(f"\n{line}", style="dim")
    if fault.hint:
        text.append("\n")
        text.append(f"→ {fault.hint}", style="cyan")
    return Padding(text, (1, 0, 0, 0))
