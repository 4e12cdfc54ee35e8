"""The root of the command line: registers the commands, turns errors into messages and exit codes.

Command modules import nothing heavy at their top, so `cadtrain --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from cadtrain.cli.convert import convert
from cadtrain.cli.data import app as data_app
from cadtrain.cli.doctor import doctor
from cadtrain.cli.exit_codes import ExitCode
from cadtrain.cli.init_config import init_config
from cadtrain.cli.launch import launch
from cadtrain.cli.options import CliState
from cadtrain.cli.plan import plan
from cadtrain.cli.train import train
from cadtrain.errors import CadtrainError

app = typer.Typer(
    name="cadtrain",
    help="Train models that read texts, point clouds and images of a part and write its CAD command sequence.",
    epilog="Start with `cadtrain doctor`, then `cadtrain launch --gpus 1`: it trains the built-in demo.",
    add_completion=True,
    rich_markup_mode=None,  # Typer's rich help costs as much as everything else together, and help answers in 0.3 s
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


# The short helps fit into one line of 80 columns.
app.command("doctor", short_help="Check this machine: what is wrong and how to mend it.")(doctor)
app.add_typer(data_app, name="data", short_help="Make datasets and look into them.")
app.command("init-config", short_help="Write, explain or lint a DeepSpeed JSON.")(init_config)
app.command("plan", short_help="Predict memory, speed and time of a run.")(plan)
app.command("launch", short_help="Start a run on all GPUs and look after it.")(launch)
app.command("train", short_help="Train in this process; what every rank runs.")(train)
app.command("convert", short_help="Make .bin, .safetensors or a Hugging Face folder.")(convert)


def _print_version(requested: bool) -> None:
    if requested:
        sys.stdout.write(f"{version_line()}\n")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of every error.", envvar="CADTRAIN_DEBUG")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the versions of cadtrain and of what it stands on.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    context.ensure_object(CliState).debug = debug
    if context.invoked_subcommand is None:
        sys.stdout.write(f"{context.get_help()}\n")
        raise typer.Exit()


def version_line() -> str:
    """`cadtrain 0.1.0 (python 3.11.7, torch 2.13.0, …)`, read from package metadata: nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    from cadtrain import __version__

    found = [f"python {python_version()}"]
    for package in ("torch", "deepspeed", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return f"cadtrain {__version__} ({', '.join(found)})"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `cadtrain` and `python -m cadtrain`: ends the process with the right code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--debug" in arguments:  # wherever it stands: people add it to the end of the line that failed
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    state = CliState()
    try:
        result = app(arguments, prog_name="cadtrain", standalone_mode=False, obj=state)
        code = result if isinstance(result, int) else ExitCode.DONE
    except CadtrainError as error:
        code = _report(error, debug=state.debug, as_json="--json" in arguments)
    except typer.TyperException as error:
        if (
            type(error).__name__ == "NoArgsIsHelpError"
        ):  # a group without a command, e.g. `cadtrain data`: private in Typer
            sys.stdout.write(f"{error.format_message()}\n")
            sys.exit(_flushed(ExitCode.DONE))
        code = _report_usage(error, as_json="--json" in arguments)
    except typer.Abort:
        code = ExitCode.INTERRUPTED
    sys.exit(_flushed(code))


def _report(error: CadtrainError, *, debug: bool, as_json: bool) -> int:
    from cadtrain.ui.errors import error_as_json, print_error_json, show_error

    if as_json:
        print_error_json(error_as_json(error))
    if debug or not as_json:
        show_error(error, debug=debug)
    return error.exit_code


def _report_usage(error: typer.TyperException, *, as_json: bool) -> int:
    """Report a command line that Typer refused."""
    from cadtrain.ui.errors import print_error_json, show_usage_error

    context: Any = getattr(error, "ctx", None)
    help_command = f"{context.command_path} --help" if context is not None else "cadtrain --help"
    message = error.format_message()
    if as_json:
        hint = f"Run `{help_command}` for help."
        print_error_json(
            {"kind": "UsageError", "message": message, "where": None, "hint": hint, "exit_code": error.exit_code}
        )
    else:
        usage = context.get_usage() if context is not None else ""
        show_usage_error(message, usage=usage, help_command=help_command)
    return error.exit_code


def _flushed(code: int) -> int:
    """Flush stdout; a reader that has gone away (`| head`) ends the command quietly."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered goes nowhere, or the interpreter would complain while shutting down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or ExitCode.UNEXPECTED
    return code
