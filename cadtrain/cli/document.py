"""Write `docs/config.md` and `docs/cli.md` anew: `python -m cadtrain.cli.document [FOLDER]`.

Both are generated, so that they say what the program does; a test compares them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer

COMMAND = "python -m cadtrain.cli.document"

NOTICE = f"<!-- Generated: do not edit. Regenerate with `{COMMAND}`. -->\n\n"

INTRODUCTION = """\
# Command line

Results go to stdout, everything else to stderr. Commands that report take `--json` and then write exactly one JSON
document to stdout: the result, or `{"error": {"kind", "message", "where", "hint", "exit_code"}}` (a configuration's
faults stand in `"faults"`).

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a fault of cadtrain itself, with its traceback; or the reader of a pipe went away |
| 2 | wrong usage, configuration or input data |
| 3 | the machine lacks something |
| 4 | the work failed |
| 130, 143 | interrupted by Ctrl-C or SIGTERM; a training run has saved its state |
"""

MARKUP = re.compile(r"\[/?(?:bold|dim|cyan|red|green|yellow|italic)\]")


def cli_document() -> str:
    """The text of `docs/cli.md`."""
    from cadtrain.cli.app import app

    root = typer.main.get_command(app)
    return NOTICE + INTRODUCTION + "\n" + "\n".join(_command(root, "cadtrain", level=2)) + "\n"


def _command(command: Any, path: str, *, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{path}`\n"
    yield f"{_help(command)}\n"
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [
        parameter for parameter in command.params if parameter.param_type_name == "option" and not parameter.hidden
    ]
    children = getattr(command, "commands", {})
    if children:
        yield "| command | does |"
        yield "|---|---|"
        for name, child in children.items():
            if not child.hidden:
                yield f"| [`{path} {name}`](#{_anchor(f'{path} {name}')}) | {_cell(_help(child).split(chr(10))[0])} |"
        yield ""
    if arguments or options:
        yield "| argument or option | default | what it does |"
        yield "|---|---|---|"
        for parameter in [*arguments, *options]:
            yield f"| {_name(parameter)} | {_default(parameter)} | {_cell(getattr(parameter, 'help', None) or '')} |"
        yield ""
    for name, child in children.items():
        if not child.hidden:
            yield from _command(child, f"{path} {name}", level=level + 1)


def _help(command: Any) -> str:
    """The help text; worked examples become a code block."""
    text = MARKUP.sub("", command.help or "").strip()
    before, marker, examples = text.partition("Examples:")
    if not marker:
        return text
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    return before.rstrip() + "\n\n```\n" + "\n".join(lines) + "\n```"


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    value = "" if _annotation(parameter) is bool or getattr(parameter, "is_flag", False) else f" {_metavar(parameter)}"
    return "`" + ", ".join([*parameter.opts, *parameter.secondary_opts]) + value.replace("|", "\\|") + "`"


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    annotation = _annotation(parameter)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "|".join(str(member.value) for member in annotation)
    return str(parameter.name).upper()


def _annotation(parameter: Any) -> Any:
    """The Python type of a parameter's value."""
    return getattr(getattr(parameter, "type_descriptor", None), "annotation", None)


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or value is False or value == () or callable(value):
        return "required" if parameter.required else ""
    return f"`{getattr(value, 'value', value)}`"


def _cell(text: str) -> str:
    return " ".join(MARKUP.sub("", text).replace("|", "\\|").split())


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def documents() -> dict[str, str]:
    """File name and text of every generated document."""
    from cadtrain.config.document import config_document

    return {"config.md": NOTICE + config_document(), "cli.md": cli_document()}


def main(folder: Path) -> None:
    """Write the documents into `folder`."""
    for name, text in documents().items():
        (folder / name).write_text(text, encoding="utf-8")
        sys.stderr.write(f"wrote {folder / name}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
