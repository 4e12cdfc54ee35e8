"""A rank's sign of life: written cheaply, read by the launcher, harmless where the disk refuses it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cadtrain.heartbeat import RECORD_BYTES, WARM_UP_STEPS, Heartbeat, heartbeat_path, module_label, read_beat


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = heartbeat_path(tmp_path / "logs", 3)
    heartbeat = Heartbeat(path, 3)
    assert read_beat(path) is None
    heartbeat.phase("loading the model")
    beat = read_beat(path)
    assert beat is not None
    assert (beat.rank, beat.marks, beat.where()) == (3, 1, "loading the model")
    heartbeat.begin_micro_step(12, 2)
    heartbeat.enter(module_label("language.layers.7"))
    beat = read_beat(path)
    assert beat is not None
    assert (beat.marks, beat.where()) == (2, "training, step 12, micro-step 2, last in language.layers.7")
    heartbeat.enter(module_label("head"))
    assert read_beat(path).module == "head"  # type: ignore[union-attr]
    heartbeat.phase("saving")
    assert read_beat(path).where() == "saving"  # type: ignore[union-attr]
    heartbeat.close()


def test_the_longest_step_leaves_the_warm_up_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path = tmp_path / "beat"
    heartbeat = Heartbeat(path)
    longest = []
    for step, seconds in enumerate([100.0, 50.0, 2.0, 3.0, 1.0], start=1):
        heartbeat.begin_micro_step(step, 1)
        heartbeat.begin_micro_step(step, 2)
        now[0] += seconds
        heartbeat.end_step()
        longest.append(read_beat(path).longest_step_seconds)  # type: ignore[union-attr]
    assert WARM_UP_STEPS == 2
    assert longest == [0.0, 0.0, 2.0, 3.0, 3.0]


def test_a_long_phase_and_a_long_module_name_fit(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "beat")
    heartbeat.begin_micro_step(10**12, 10**6)
    heartbeat.enter(module_label("a." * 200 + "end"))
    beat = read_beat(tmp_path / "beat")
    assert beat is not None
    assert beat.module.endswith(".end")
    assert (tmp_path / "beat").stat().st_size <= RECORD_BYTES + 128


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"rank": 0}', b"\0" * 400])
def test_what_is_no_beat_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "beat").write_bytes(content)
    assert read_beat(tmp_path / "beat") is None
    assert read_beat(tmp_path / "nothing") is None


def test_a_disk_that_refuses_ends_the_signs_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    heartbeat = Heartbeat(tmp_path / "file" / "beat")
    heartbeat.phase("training")
    full = Heartbeat(Path("/dev/full")) if Path("/dev/full").exists() else Heartbeat(None)
    full.phase("training")
    full.enter(module_label("x"))
