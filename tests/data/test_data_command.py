"""`cadtrain data`: what it prints where, and what it does not import."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cadtrain.cli.app import app as root
from cadtrain.cli.data import app
from cadtrain.data.manifest import MANIFEST_NAME, Manifest
from cadtrain.errors import DataError, Interrupted, UsageError

runner = CliRunner()


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = "import sys, cadtrain.cli.data; print([n for n in ('torch', 'datasets', 'numpy', 'OCP', 'pyarrow', 'PIL') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_data_package_does_without_torch_and_reading_without_the_kernel() -> None:
    code = (
        "import sys, cadtrain.data.shards, cadtrain.data.prepare.parts, cadtrain.data.synth.make, cadtrain.data.inspect, datasets; "
        "print([n for n in ('torch', 'OCP', 'typer', 'rich') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_inspect_shows_a_table_or_json(synthetic: Path) -> None:
    shown = runner.invoke(app, ["inspect", str(synthetic)])
    assert shown.exit_code == 0, shown.exception
    assert "from synth" in shown.stdout
    assert "train" in shown.stdout
    as_json = runner.invoke(app, ["inspect", str(synthetic), "--json"])
    report = json.loads(as_json.stdout)
    assert sum(split["samples"] for split in report["splits"].values()) == 16
    assert report["splits"]["train"]["with_points"] == report["splits"]["train"]["samples"]
    histogram = report["splits"]["train"]["sequence_lengths"]["histogram"]
    assert sum(found["count"] for found in histogram) == report["splits"]["train"]["samples"]
    assert report["leaks"] == {"validation": 0, "test": 0}


def test_inspect_of_a_raw_folder_writes_a_page(synthetic: Path, tmp_path: Path) -> None:
    (tmp_path / "design.json").write_text('{"entities": {}}')
    page = tmp_path / "page.html"
    arguments = ["inspect", str(tmp_path / "design.json"), "--tokenizer", "byte", "--html", str(page), "--json"]
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 2, "nothing could be read"
    report = json.loads(shown.stdout)
    assert (report["kind"], report["readable"], report["refused"]) == ("raw", 0, 1)
    assert report["refusals"][0]["place"] == "$"
    assert "is missing" in page.read_text(encoding="utf-8")
    shown = runner.invoke(app, ["inspect", str(synthetic), "--html", str(page), "--thumbnails", "3"])
    assert shown.exit_code == 0, shown.exception
    assert page.read_text(encoding="utf-8").count("<img ") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "nowhere"], "no such folder"),
        (["--codec", "compact"], "no tokenizer"),
        (["--codec", "unknown", "--tokenizer", "byte"], "no codec named"),
        (["--budget", "12,x"], "no number of tokens"),
        (["--html", "nowhere/page.html"], "folder that does not exist"),
    ],
)
def test_inspect_refuses_options_before_it_reads(arguments: list[str], message: str, tmp_path: Path) -> None:
    found = runner.invoke(app, ["inspect", str(tmp_path / "not even there"), *arguments])
    assert isinstance(found.exception, UsageError)
    assert message in str(found.exception)


def test_inspect_of_another_folder_is_an_error(tmp_path: Path) -> None:
    found = runner.invoke(app, ["inspect", str(tmp_path)])
    assert isinstance(found.exception, DataError)


@pytest.mark.kernel
def test_synth_reports_and_does_not_do_it_twice(tmp_path: Path) -> None:
    arguments = [
        "synth",
        "--out",
        str(tmp_path / "parts"),
        "--count",
        "8",
        "--num-points",
        "32",
        "--views",
        "0",
        "--workers",
        "1",
    ]
    first = runner.invoke(app, [*arguments, "--json"])
    assert first.exit_code == 0, first.exception
    summary = json.loads(first.stdout)
    assert sum(summary["manifest"]["counts"].values()) == 8
    assert min(summary["manifest"]["counts"].values()) >= 1
    again = runner.invoke(app, arguments)
    assert "there already" in again.stdout
    other = runner.invoke(app, [*arguments, "--seed", "1"])
    assert isinstance(other.exception, UsageError)


def test_prepare_of_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    found = runner.invoke(app, ["prepare", "--root", str(tmp_path), "--out", str(tmp_path / "out")])
    assert isinstance(found.exception, DataError)
    assert "json/<shard>" in str(found.exception)


def test_a_shard_that_is_none_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    found = runner.invoke(app, ["prepare", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--shard", "4/4"])
    assert isinstance(found.exception, UsageError)
    assert "count from 0" in str(found.exception)


COMMANDS = ["synth", "prepare", "merge", "inspect", "export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_into_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = runner.invoke(root, ["data", command, "--help"]).stdout
    function = next(found.callback for found in app.registered_commands if found.name == command)
    examples = [line.strip() for line in str(function.__doc__).partition("Examples:")[2].splitlines() if line.strip()]
    assert examples
    assert set(examples) <= {line.strip() for line in shown.splitlines()}, "an example is broken"
    assert not re.search(r"<(int|float|path|str|list)\b|[{]\w+[}]|FILES", shown)


def test_the_list_of_commands_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = runner.invoke(root, ["data", "--help"]).stdout
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    assert "..." not in shown.partition("Commands:")[2]


@pytest.mark.parametrize(
    ("command", "option", "value", "known"),
    [
        *((command, "--image-size", "13", "equal to 14") for command in ("synth", "prepare", "export")),
        *((command, "--time-limit", "0.05", "equal to 0.1") for command in ("synth", "prepare", "inspect", "export")),
    ],
)
def test_the_least_values_are_the_same_everywhere(command: str, option: str, value: str, known: str) -> None:
    needed = {"synth": ["--out", "x"], "prepare": ["--root", "x", "--out", "y"], "inspect": ["x"], "export": ["x"]}
    found = runner.invoke(root, ["data", command, *needed[command], option, value])
    assert found.exit_code == 2
    assert known in found.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": "1"}', '{"format_version": 1}'])
def test_a_damaged_manifest_is_called_so(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(DataError, match="The manifest is damaged: copy the dataset again whole"):
        Manifest.read(tmp_path)


def test_a_dataset_that_lost_its_manifest_is_not_taken_for_designs(synthetic: Path, tmp_path: Path) -> None:
    shutil.copytree(synthetic, tmp_path / "lost")
    (tmp_path / "lost" / MANIFEST_NAME).unlink()
    found = runner.invoke(app, ["inspect", str(tmp_path / "lost")])
    assert isinstance(found.exception, DataError)
    assert "a prepared dataset without its manifest.json: incomplete or damaged" in str(found.exception)


def test_a_merge_that_is_stopped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("cadtrain.data.writing.merge.merge", stop)
    found = runner.invoke(app, ["merge", str(tmp_path / "out")])
    assert isinstance(found.exception, Interrupted)
    assert found.exception.exit_code == 143
