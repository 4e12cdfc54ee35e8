"""What a run tells people on stderr."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import pytest
from rich.console import Console

from cadtrain.metrics.record import RunFacts, ValidationRecord
from cadtrain.ui import console, training
from cadtrain.ui.training import TrainingConsole
from tests.metrics.records import run_facts, step_record


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Consoles that look at this test's streams, and a clock to turn by hand."""
    now = [1000.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    console.err.cache_clear()
    yield now
    console.err.cache_clear()


def started(facts: RunFacts | None = None) -> TrainingConsole:
    shown = TrainingConsole()
    shown.start(facts or run_facts())
    return shown


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == "", "talk goes to stderr"
    return captured.err.splitlines()


def test_the_banner_shows_the_facts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    started()
    assert [line.split() for line in lines_of(capsys)] == [["model", "2", "[M]", "parameters"]]


def test_a_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    shown = started()
    lines_of(capsys)
    shown.step(step_record(1, memory_gib=3.25, skipped_steps=2))
    assert lines_of(capsys) == ["step 1/10  text  loss 2.5000  lr 1.00e-03  800 tok/s  3.2 GiB  2 skipped  4 s left"]


def test_lines_are_few_where_no_terminal_listens(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    """The first of a stage, the last of a stage, and otherwise one in five seconds."""
    shown = started(run_facts(total_steps=30))
    lines_of(capsys)
    written = []
    for step in range(1, 31):
        clock[0] += 1
        shown.step(step_record(step, stage="text" if step <= 4 else "all"))
        written += [step] * len(lines_of(capsys))
    assert written == [1, 4, 5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize(("loss", "word"), [(math.nan, "loss nan"), (math.inf, "loss inf")])
def test_a_loss_that_is_no_number_is_shown(capsys: pytest.CaptureFixture[str], loss: float, word: str) -> None:
    shown = started()
    shown.step(step_record(1, loss=loss, grad_norm=loss))
    shown.validation(ValidationRecord(1, "text", {"text": loss}, {"text": 8}, 0.1))
    shown.close()
    lines = lines_of(capsys)
    assert word in lines[1]
    assert str(loss) in lines[2]


def test_validation_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    shown = started()
    lines_of(capsys)
    shown.validation(ValidationRecord(4, "text", {"text": 1.25, "text+point": 1.0}, {"text": 8, "text+point": 8}, 3.2))
    shown.validation(ValidationRecord(4, "text", {}, {}, 0.0))
    shown.note("stage [b]all[/b] begins at step 5: " + "text+point " * 20)
    shown.close()
    lines = lines_of(capsys)
    assert lines[:2] == ["validation at step 4 (text): text 1.2500, text+point 1.0000 (3 s)", "validation at step 4 (text): no sample fits (0 s)"]
    assert lines[2].startswith("stage [b]all[/b] begins at step 5")
    assert len(lines) == 3, "long lines are not broken in a log"


def test_closing_before_the_start_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    TrainingConsole().close()
    assert lines_of(capsys) == []


def test_on_a_terminal_a_bar_moves_and_notes_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=140, color_system=None)
    monkeypatch.setattr(training, "err", lambda: terminal)
    shown = started(run_facts(first_step=4))
    shown.note("resumed after step 4")
    shown.step(step_record(5, loss=math.nan))
    shown.step(step_record(6, loss=1.5))
    shown.close()
    text = stream.getvalue()
    assert "resumed after step 4" in text
    assert "\x1b[?25h" in text, "the cursor is shown again"
    assert "6/10" in text
    assert "loss 1.5000" in text
