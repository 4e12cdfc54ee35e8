"""The root of the command line, as a shell sees it: output, errors, exit codes, and what it costs to ask for help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cadtrain.cli import app as app_module
from cadtrain.cli.app import app, main
from cadtrain.errors import ConfigError, EnvironmentFault, Fault, Interrupted, TrainingError, UsageError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "numpy",
    "deepspeed",
    "transformers",
    "datasets",
    "OCP",
    "ruamel",
    "scipy",
    "trimesh",
    "pyarrow",
    "PIL",
)
"""What no help may wait for. Pydantic is not in it: Typer itself reads values with it."""


def run(*arguments: str, code: int = 0, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`cadtrain` in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", "cadtrain", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", **(environment or {})},
    )  # fmt: skip
    assert process.returncode == code, process.stderr
    return process


@pytest.fixture
def command_that_raises() -> Iterator[list[BaseException]]:
    """Register `cadtrain fail`, which raises what the test puts into the list."""
    errors: list[BaseException] = []
    before = list(app.registered_commands)

    @app.command("fail")
    def fail(as_json: bool = typer.Option(False, "--json")) -> None:
        raise errors[0]

    yield errors
    app.registered_commands[:] = before


def end_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_no_argument_and_help_show_the_same() -> None:
    assert run().stdout.strip() == run("--help").stdout.strip() == run("-h").stdout.strip()


def test_help_fits_into_80_columns_and_cuts_nothing_off() -> None:
    lines = run("--help", environment={"COLUMNS": "80"}).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("...") for line in lines[1:])


def test_a_group_without_a_command_shows_its_help() -> None:
    process = run("data")
    assert process.stdout.startswith("Usage: cadtrain data")
    assert process.stderr == ""


def test_the_commands_are_these() -> None:
    """The surface is guarded: a command that comes or goes is a decision."""
    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert names == {"doctor", "data", "init-config", "plan", "launch", "train", "convert"}


def test_version_names_what_it_stands_on() -> None:
    out = run("--version").stdout
    assert re.fullmatch(
        r"cadtrain \d+\.\d+\.\d+ \(python 3\.\d+\.\d+, torch \S+, deepspeed \S+, transformers \S+\)\n", out
    )


def test_a_misspelt_command_is_met_with_the_right_one() -> None:
    process = run("trian", code=2)
    assert process.stdout == ""
    assert "No such command 'trian'" in process.stderr
    assert "Did you mean 'train'?" in process.stderr


def test_a_wrong_option_shows_usage_and_where_to_read() -> None:
    process = run("init-config", "--zer", "3", code=2)
    assert "Usage: cadtrain init-config" in process.stderr
    assert "--zer" in process.stderr
    assert "cadtrain init-config --help" in process.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("no such thing", where="run.yaml", hint="Look elsewhere."), 2),
        (ConfigError([Fault("a.yaml:3 x.y", "found 3.", "Write 4.")]), 2),
        (EnvironmentFault("no GPU", hint="Get one."), 3),
        (TrainingError("loss is not finite"), 4),
        (Interrupted("stopped", signal_number=2), 130),
        (Interrupted("stopped", signal_number=15), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_end_with_their_code_and_without_traceback(
    error: BaseException, code: int, command_that_raises: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    command_that_raises.append(error)
    assert end_of(["fail"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    for attribute in ("where", "hint"):
        assert (getattr(error, attribute, None) or "") in captured.err


def test_debug_shows_the_traceback(
    command_that_raises: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    command_that_raises.append(UsageError("no such thing"))
    assert end_of(["--debug", "fail"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_with_json_stdout_holds_the_error(
    command_that_raises: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    command_that_raises.append(ConfigError([Fault("a.yaml:3 x.y", "found 3.", "Write 4."), Fault("b", "c")]))
    assert end_of(["fail", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    error = json.loads(captured.out)["error"]
    assert (error["kind"], error["exit_code"]) == ("ConfigError", 2)
    assert error["faults"] == [
        {"where": "a.yaml:3 x.y", "message": "found 3.", "hint": "Write 4."},
        {"where": "b", "message": "c", "hint": None},
    ]


def test_with_json_a_wrong_command_line_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of(["init-config", "--zero", "9", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out)["error"]["kind"] == "UsageError"


def test_an_unexpected_fault_is_not_hidden(command_that_raises: list[BaseException]) -> None:
    command_that_raises.append(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


def test_a_closed_pipe_ends_quietly() -> None:
    script = f"{sys.executable} -m cadtrain init-config --explain | head -n 1"
    process = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.stderr == ""
    assert len(process.stdout.splitlines()) == 1


def test_no_colour_codes_outside_a_terminal() -> None:
    process = run("init-config", "--zero", "0", "--offload", code=2)
    assert "\x1b" not in process.stderr


# What help costs.


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["trian"]], ids=str)
def test_the_root_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(arguments) == []


@pytest.mark.parametrize(
    "name",
    sorted(
        {command.name or "" for command in app.registered_commands}
        | {group.name or "" for group in app.registered_groups}
    ),
)
def test_the_help_of_a_command_loads_nothing_heavy(name: str) -> None:
    assert loaded_by([name, "--help"]) == []


def test_init_config_needs_no_torch() -> None:
    assert loaded_by(["init-config"]) == ["ruamel"]


def loaded_by(arguments: list[str]) -> list[str]:
    """Which of the heavy packages a command line has imported by its end."""
    script = f"""
import sys
from cadtrain.cli.app import main
try:
    main({arguments!r})
except SystemExit:
    pass
print("LOADED", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return process.stdout.rpartition("LOADED")[2].split()


def test_help_costs_little_more_than_the_libraries_it_is_made_with() -> None:
    """0.3 s on a machine at rest; measured against its own libraries, because a test machine rarely rests."""
    libraries = cpu_seconds("import typer")
    ours = cpu_seconds("from cadtrain.cli.app import main; main(['--help'])")
    assert ours < 2 * libraries + 0.05, f"{ours:.2f} s, of which libraries {libraries:.2f} s"


def cpu_seconds(script: str) -> float:
    """Least CPU time of a child process over a few runs."""
    measure = "import os, atexit; atexit.register(lambda: os.write(2, repr(sum(os.times()[:2])).encode()));"
    runs = [
        subprocess.run([sys.executable, "-c", measure + script], cwd=ROOT, capture_output=True, timeout=120)
        for _ in range(4)
    ]
    return min(float(process.stderr.rpartition(b"\n")[2]) for process in runs)


def test_the_app_can_be_run_by_typers_own_runner() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, app_module.version_line())
