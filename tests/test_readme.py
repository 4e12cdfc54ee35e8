"""What the documents promise: commands that parse, links that lead somewhere, configurations that load."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from cadtrain.cli.app import app
from cadtrain.config.load import load_run_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL_WORDS = {"&&", "||", "|", ";", ">", ">>", "<", "2>", "&"}


def fenced_lines(path: Path) -> list[tuple[int, str]]:
    """Lines of code blocks that people may type, with their numbers; a line that ends in `\\` is joined with the next."""
    found: list[tuple[int, str]] = []
    language: str | None = None
    start, joined = 0, ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            language = line.strip().strip("`") if language is None else None
        elif language in ("", "bash", "sh", "shell", "console"):
            start = start or number
            joined += line.strip().removeprefix("$ ")
            if joined.endswith("\\"):
                joined = joined[:-1]
                continue
            found.append((start, joined))
            start, joined = 0, ""
    return found


def cadtrain_commands() -> list[tuple[str, list[str]]]:
    """Place and arguments of every `cadtrain …` in a document's code block, wherever in a shell line it stands."""
    commands = []
    for path in DOCUMENTS:
        for number, line in fenced_lines(path):
            if "cadtrain" not in line:
                continue
            lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
            lexer.whitespace_split = True
            parts: list[list[str]] = [[]]
            for word in lexer:
                if word in SHELL_WORDS:
                    parts.append([])
                else:
                    parts[-1].append(word)
            for words in parts:
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words[:1] == ["srun"] and "cadtrain" in words:
                    words = words[words.index("cadtrain") :]
                if words[:1] == ["cadtrain"]:
                    commands.append((f"{path.relative_to(ROOT)}:{number}", words[1:]))
    return commands


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Take a command line apart as `cadtrain` does and run nothing; raises what it would raise."""
    command: Any = typer.main.get_command(app)
    context, name = command.make_context("cadtrain", list(arguments)), ""
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return name, context.params


COMMANDS = cadtrain_commands()


@pytest.mark.parametrize(("place", "arguments"), COMMANDS, ids=[f"{place} {' '.join(words)}" for place, words in COMMANDS])
def test_a_command_in_the_documents_parses(place: str, arguments: list[str]) -> None:
    """Unknown commands and options, wrong types and values, unknown presets and settings."""
    try:
        name, values = parse(arguments)
    except typer.TyperException as error:
        pytest.fail(f"{place}: {error.format_message()}")
    except (typer.Exit, SystemExit):
        return  # --help or --version
    if name in ("launch", "train") and not values.get("resume"):
        config = values["config"]
        if config is not None and config.endswith(".yaml"):
            is_readers_own = not (ROOT / config).exists() and not config.startswith("configs/")
            config = None if is_readers_own else str(ROOT / config)
        load_run_config(config, values["overrides"] or ())


def test_the_commands_were_found() -> None:
    """Else the test above would pass over an empty list."""
    places = {place.split(":")[0] for place, _ in COMMANDS}
    assert {"README.md", "docs/cli.md"} <= places
    assert ["launch", "--gpus", "4", "--zero", "3"] in [words for _, words in COMMANDS]
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("arguments", [["launch", "--gpu", "4"], ["launch", "--zero", "4"], ["lunch"], ["convert", "a"], ["data", "show"]])
def test_a_wrong_command_would_be_found(arguments: list[str]) -> None:
    with pytest.raises(typer.TyperException):
        parse(arguments)


def set_up_commands() -> list[str]:
    """What `.ci/run` takes from the README, by its own program."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    program = re.search(r"awk '([^']+)' README\.md", script)
    assert program is not None, ".ci/run no longer reads the README with awk"
    process = subprocess.run(["awk", program[1], "README.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return process.stdout.splitlines()


def test_the_two_set_up_commands_are_found_as_ci_finds_them() -> None:
    assert set_up_commands() == ["pip install -e . && cadtrain launch", 'pip install -e ".[test]" && pytest']


def test_links_inside_the_repository_lead_somewhere() -> None:
    missing = []
    for path in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target = link.partition("#")[0]
            if target and not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
                missing.append(f"{path.relative_to(ROOT)}: {link}")
    assert missing == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda path: path.name)
def test_a_configuration_loads(path: Path) -> None:
    assert load_run_config(str(path)).config.name


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_a_deepspeed_file_is_json_without_auto(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert json.loads(text)["zero_optimization"]["stage"] in (2, 3)
    assert '"auto"' not in text
