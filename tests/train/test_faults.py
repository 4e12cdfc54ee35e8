"""Real ranks killed at every point of a save, disks that fill up, files that rot: what is left, and how the run goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cadtrain.checkpoint.layout import list_steps
from tests.train.forked import Ended, Fault, ForkServer
from tests.train.small_runs import NUM_STEPS, final_weights, losses, output, whole_steps, write_config


class Uninterrupted:
    """The run that nothing happens to, for each configuration; what it ends with is what every other one must end with."""

    def __init__(self, server: ForkServer, folder: Path, parts: Path) -> None:
        self._server, self._folder, self._parts = server, folder, parts
        self._known: dict[str, tuple[Path, Ended, dict[str, str]]] = {}

    def __call__(self, *, stage: int, **checkpoint: Any) -> tuple[Path, Ended, dict[str, str]]:
        """Its configuration file, how it ended, and its final weights."""
        key = json.dumps({"stage": stage, **checkpoint}, sort_keys=True)
        if key not in self._known:
            name = f"whole{len(self._known)}"
            config = write_config(self._folder / f"{name}.yaml", self._parts, stage=stage, **checkpoint)
            ended = self._server.run(self._folder / name, config)
            assert ended.is_done, output(self._folder / name)
            assert whole_steps(self._folder / name)[-1] == NUM_STEPS
            self._known[key] = config, ended, final_weights(self._folder / name)
        return self._known[key]

    def losses(self) -> list[tuple[int, float]]:
        return losses(self._folder / "whole0")


@pytest.fixture(scope="module")
def uninterrupted(server: ForkServer, sixteen_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    return Uninterrupted(server, tmp_path_factory.mktemp("whole"), sixteen_parts)


def go_on(server: ForkServer, run_dir: Path, config: Path, expected: dict[str, str]) -> None:
    """Resume to the end: the final weights are those of the run that was not interrupted, bit for bit."""
    ended = server.run(run_dir, config, resume=True)
    assert ended.is_done, output(run_dir)
    assert whole_steps(run_dir)[-1] == NUM_STEPS
    assert final_weights(run_dir) == expected
    assert not [entry.name for entry in (run_dir / "checkpoints").iterdir() if entry.name.endswith(".tmp")]


POINTS = {
    "before a save": Fault(at=2, only=r"os.mkdir step-\d+\.tmp$"),
    "in the middle of a shard": Fault(at=3, only="write to step-00000002"),
    "between two shards": Fault(at=2, only=r"open .*optim_states\.pt"),
    "before the manifest": Fault(at=2, only=r"open .*manifest\.json"),
    "before the renaming": Fault(at=2, only=r"os.rename step-\d+\.tmp$"),
    "before `latest` is replaced": Fault(at=2, only=r"os.rename \.latest"),
    "while frozen weights are written": Fault(at=1, only="open frozen-"),
    "while an older one is removed": Fault(at=1, only="os.remove"),
}


def mostly_slow(names: Iterable[str], *quick: str) -> list[Any]:
    """Every case in the slow run, and those in `quick` in each."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("point", mostly_slow(POINTS, "in the middle of a shard", "before the renaming"))
def test_a_kill_at_each_point_of_a_save_costs_nothing_saved(
    server: ForkServer, uninterrupted: Uninterrupted, tmp_path: Path, point: str
) -> None:
    """Rank 0, whose part has every point, dies; its peer is left alone with a broken connection."""
    config, _, expected = uninterrupted(stage=2)
    fault = POINTS[point]
    ended = server.run(tmp_path, config, fault=Fault(fault.at, (0,), only=fault.only))
    assert ended.codes[0] == -9, (point, output(tmp_path))
    whole_steps(tmp_path)
    go_on(server, tmp_path, config, expected)
    assert losses(tmp_path) == uninterrupted.losses()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills_at_random(server: ForkServer, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """One rank or all, at any act on checkpoints, at once and behind, ZeRO 1 to 3, resumed runs killed again: what was saved stays."""
    draws, kills, runs = random.Random(20), 0, 0
    while kills < 200:
        stage, behind = draws.choice((1, 2, 3)), draws.random() < 0.5
        config, whole, expected = uninterrupted(stage=stage, asynchronous=behind)
        run_dir, newest = tmp_path / f"run{runs}", 0
        runs += 1
        for attempt in range(8):
            ranks = draws.choice(((), (0,), (1,)))
            fault = Fault(draws.randint(1, len(whole.acts) if attempt == 0 else 40), ranks)
            ended = server.run(run_dir, config, resume=attempt > 0, fault=fault)
            kills += not ended.is_done
            steps = whole_steps(run_dir) if (run_dir / "checkpoints").is_dir() else []
            assert (steps or [0])[-1] >= newest, f"step {newest} was saved before {fault} in {run_dir.name}"
            newest = (steps or [0])[-1]
            if ended.is_done:
                break
            assert -9 in ended.codes, output(run_dir)
        go_on(server, run_dir, config, expected)
    print(f"{kills} kills in {runs} runs")


@pytest.mark.parametrize("behind", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_full_disk_on_one_rank_fails_the_save_on_all(
    server: ForkServer, uninterrupted: Uninterrupted, tmp_path: Path, behind: bool
) -> None:
    """The run ends with the rank and the reason, older checkpoints stay, and it goes on when there is room again."""
    config, _, expected = uninterrupted(stage=2, asynchronous=behind)
    ended = server.run(tmp_path, config, fault=Fault(at=1, ranks=(1,), kind="full", only="write to step-00000004"))
    assert ended.codes == (4, 4), output(tmp_path)
    assert "the checkpoint was not saved, rank 1: " in output(tmp_path)
    assert "[Errno 28] No space left on device (while writing its shards" in output(tmp_path)
    assert whole_steps(tmp_path)
    go_on(server, tmp_path, config, expected)


@pytest.mark.slow
def test_a_run_that_may_go_on_without_a_checkpoint_does(
    server: ForkServer, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    config, _, expected = uninterrupted(stage=2, on_failure="continue")
    ended = server.run(tmp_path, config, fault=Fault(at=1, ranks=(1,), kind="full", only="write to step-00000004"))
    assert ended.is_done, output(tmp_path)
    assert "No space left on device" in output(tmp_path)
    assert final_weights(tmp_path) == expected


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit in a shard": lambda step: _flip(step / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    "a flipped bit in a frozen weight": lambda step: _flip(next(step.parent.glob("frozen-*/*.pt"))),
    "a truncated shard": lambda step: (step / "engine" / "mp_rank_00_model_states.pt").write_bytes(b"PK"),
    "a missing file": lambda step: (step / "state.json").unlink(),
    "`latest` naming nothing": lambda step: (step.parent / "latest").write_text("step-99999999\n"),
    "an empty `latest`": lambda step: (step.parent / "latest").write_text(""),
}


@pytest.mark.parametrize("damage", mostly_slow(DAMAGES, "a flipped bit in a shard"))
def test_damage_is_named_and_the_run_goes_on_from_what_is_whole(
    server: ForkServer, uninterrupted: Uninterrupted, tmp_path: Path, damage: str
) -> None:
    config, _, expected = uninterrupted(stage=2)
    ended = server.run(tmp_path, config, fault=Fault(at=5, only=r"os.rename step-\d+\.tmp$"))
    assert -9 in ended.codes
    steps = list_steps(tmp_path / "checkpoints")
    DAMAGES[damage](tmp_path / "checkpoints" / f"step-{steps[-1]:08d}")
    if "frozen" in damage:
        ended = server.run(tmp_path, config, resume=True)
        assert set(ended.codes) == {4}
        assert "content differs from what was saved" in output(tmp_path)
        return
    ended = server.run(tmp_path, config, resume=True)
    assert ended.is_done, output(tmp_path)
    assert ("checkpoint passed over" in output(tmp_path)) == ("latest" not in damage)
    assert final_weights(tmp_path) == expected
