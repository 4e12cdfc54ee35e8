"""What the launcher sees of a rank: signs of life from an engine, and traces where Python cannot speak."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadtrain.heartbeat import Beat, Heartbeat, read_beat
from cadtrain.train.engine import StepResult
from cadtrain.train.watched import WatchedEngine, tell_modules


class RecordingEngine:
    """An engine that notes the sign of life that is there whenever it is called."""

    def __init__(self, path: Path) -> None:
        self.device = torch.device("cpu")
        self.path = path
        self.seen: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            beat = read_beat(self.path)
            self.seen.append((name, beat.where() if isinstance(beat, Beat) else ""))
            return {"step": StepResult(1.0, True), "saved_bytes": 7}.get(name)

        return call


def test_signs_of_life_come_before_the_work(tmp_path: Path) -> None:
    inner = RecordingEngine(tmp_path / "beat")
    engine = WatchedEngine(inner, Heartbeat(inner.path))  # type: ignore[arg-type]
    pack: Any = None
    for step in (5, 6):
        engine.at_step(step)
        engine.micro_step(pack, num_targets=1, is_last=False)
        engine.micro_step(pack, num_targets=1, is_last=True)
        assert engine.step() == StepResult(1.0, True)
    engine.save(tmp_path, lambda path, content: None)
    after_save = read_beat(inner.path)
    engine.evaluate(pack)
    assert engine.saved_bytes() == 7
    assert [words for name, words in inner.seen if name in ("micro_step", "save", "evaluate")] == [
        "training, step 6, micro-step 1", "training, step 6, micro-step 2", "training, step 7, micro-step 1",
        "training, step 7, micro-step 2", "saving a checkpoint", "validating",
    ]  # fmt: skip
    assert after_save is not None
    assert after_save.phase == "finishing a checkpoint", "its files are hashed and flushed after the engine has written them"


def test_blocks_and_parts_tell_their_names(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
            self.head = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, upto: int) -> torch.Tensor:
            for layer in self.layers[:upto]:
                x = layer(x)
            return x if upto < 3 else self.head(x)

    model, path = Model(), tmp_path / "beat"
    heartbeat = Heartbeat(path)
    heartbeat.begin_micro_step(1, 1)
    tell_modules(model, heartbeat)
    for upto, name in ((1, "layers.0.0"), (2, "layers.1.0"), (3, "head")):
        model(torch.zeros(1, 2), upto)
        beat = read_beat(path)
        assert beat is not None
        assert beat.module == name


def run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    head = f"from pathlib import Path\nfrom cadtrain.train.traces import keep_traces\nkeep_traces(Path({str(tmp_path)!r}), 3)\nimport os, signal, sys\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60, check=False)


def test_stacks_are_written_when_asked_for(tmp_path: Path) -> None:
    result = run("def busy():\n    os.kill(os.getpid(), signal.SIGUSR2)\nbusy()\nprint('goes on')", tmp_path)
    assert (result.returncode, result.stdout) == (0, "goes on\n")
    text = (tmp_path / "logs" / "rank_03.stacks.txt").read_text()
    assert "Current thread" in text
    assert "in busy" in text


def test_a_crash_leaves_its_stack(tmp_path: Path) -> None:
    result = run("def crash():\n    import ctypes\n    ctypes.string_at(0)\ncrash()", tmp_path)
    assert result.returncode == -signal.SIGSEGV
    text = (tmp_path / "logs" / "rank_03.stacks.txt").read_text()
    assert "Segmentation fault" in text
    assert "in crash" in text


def test_native_words_go_to_a_file_and_pythons_stay(tmp_path: Path) -> None:
    result = run("os.write(2, b'native\\n'); print('python', file=sys.stderr)", tmp_path)
    assert result.stderr == "python\n"
    assert (tmp_path / "logs" / "rank_03.native.txt").read_text() == "native\n"
