"""How errors look, and that consoles keep results and talk apart."""

from __future__ import annotations

import io
import json

import pytest

from cadtrain.errors import CheckpointError, ConfigError, DataError, EnvironmentFault, Fault, UsageError
from cadtrain.ui import console
from cadtrain.ui.errors import error_as_json, print_error_json, show_error, show_usage_error


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_a_panel_says_what_where_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(DataError("ends after 3 of 20 lines", where="parts/00/a.json", hint="Fetch it again."))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert all(len(line) == 80 for line in lines)
    assert [line.strip("│╭╰─╮╯ ") for line in lines] == [
        "Cannot start",
        "parts/00/a.json",
        "ends after 3 of 20 lines",
        "→ Fetch it again.",
        "",
    ]


def test_every_fault_of_a_configuration_is_shown_with_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    faults = [
        Fault("a.yaml:3 batch.size", "found [bold]3[/bold].", "Write 4."),
        Fault("a.yaml:7", "not YAML.\n    7 | x: [\n        ^"),
    ]
    show_error(ConfigError(faults))
    text = capsys.readouterr().err
    for words in (
        "2 faults in the configuration.",
        "a.yaml:3 batch.size",
        "found [bold]3[/bold].",
        "→ Write 4.",
        "7 | x: [",
    ):
        assert words in text
    lines = text.splitlines()
    (caret,) = [line for line in lines if line.strip("│ ") == "^"]
    shown = lines[lines.index(caret) - 1]
    assert shown[: caret.index("^")].strip("│ ").startswith("7 |")  # the pointer stands below the line it points into


@pytest.mark.parametrize(
    ("error", "title"),
    [(UsageError("x"), "Cannot start"), (EnvironmentFault("x"), "This machine"), (CheckpointError("x"), "Failed")],
)
def test_the_title_tells_the_kind(error: UsageError, title: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_error(error)
    assert capsys.readouterr().err.splitlines()[0].startswith(f"╭─ {title} ")


def test_usage_errors_do_not_read_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show_usage_error("No such option: --[x]", usage="Usage: cadtrain [OPTIONS]", help_command="cadtrain --help")
    text = capsys.readouterr().err
    assert "--[x]" in text
    assert "Usage: cadtrain [OPTIONS]" in text


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_error_json(error_as_json(EnvironmentFault("no GPU", where="rank 0", hint="Get one.")))
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "kind": "EnvironmentFault",
            "message": "no GPU",
            "where": "rank 0",
            "hint": "Get one.",
            "exit_code": 3,
        }
    }


def test_results_are_not_wrapped_and_follow_redirections(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    console.print_text("word " * 100)
    console.print_json({"a": "ü" * 100})
    console.out().print("[red]result[/red]")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[1]) == {"a": "ü" * 100}
    assert lines[2] == "result"


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        console.print_json({"loss": float("nan")})


@pytest.mark.parametrize(("columns", "width"), [(None, console.WIDTH_WITHOUT_TERMINAL), ("60", 60)])
def test_width_without_a_terminal(columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS")
    else:
        monkeypatch.setenv("COLUMNS", columns)
    assert console.err().width == width
