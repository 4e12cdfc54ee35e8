"""The loop over a fake engine: stages, checkpoints, interruptions, bad steps, and going on where it stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cadtrain.checkpoint import shard_writer
from cadtrain.checkpoint.layout import list_steps
from cadtrain.checkpoint.retention import Retention
from cadtrain.checkpoint.shard_writer import ShardSink
from cadtrain.checkpoint.store import CheckpointStore, verify
from cadtrain.config.batch_plan import plan_batches
from cadtrain.config.load import to_yaml
from cadtrain.config.sections import COMPONENTS, Component, RunConfig
from cadtrain.data.collate import Pack
from cadtrain.data.feed import Feed
from cadtrain.distributed import Place
from cadtrain.errors import CheckpointError, Interrupted, TrainingError
from cadtrain.metrics.record import NullSink, StepRecord, ValidationRecord
from cadtrain.train import trainer as trainer_module
from cadtrain.train.begin import first_state, resume_state, take_weights
from cadtrain.train.engine import StepResult
from cadtrain.train.leave import LeaveWatch
from cadtrain.train.recover import train_to_the_end
from cadtrain.train.schedule import CurriculumSchedule
from cadtrain.train.state import TrainState
from cadtrain.train.trainer import MAX_BAD_STEPS, Trainer, TrainerParts
from tests.train.tiny import make_feed, model_config

FACTS = {"zero_stage": 0, "precision": "fp32", "versions": {}}
LAYOUT = {"world_size": 1, "zero_stage": 0}
STAGES = (
    {"name": "text", "duration": 4, "modalities": {"text": 1}, "learning_rate": 1e-3},
    {"name": "all", "duration": 5, "modalities": {"text": 0.4, "text+point": 0.3, "text+point+image": 0.3}, "learning_rate": 1e-3},
)


class FakeEngine:
    """Gives every target token the loss 0.5 and remembers what it was asked; its state is the samples that it has seen."""

    shard = "mp_rank_00_model_states.pt"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.calls: list[tuple[str, Any]] = []
        self.recomputed: list[tuple[int, int]] = []
        self.seen: list[list[str]] = []
        self.rates: list[dict[str, float]] = []
        self.num_targets: list[int] = []
        self.is_last: list[bool] = []
        self.random_numbers: list[float] = []
        self.bad_steps: dict[int, StepResult] = {}
        self.loss = 0.5
        self.num_steps = 0
        self._samples: list[str] = []

    def set_learning(self, components: Iterable[Component]) -> None:
        self.calls.append((f"learning before step {len(self.seen)}", list(components)))

    def set_recompute(self, num_layers: int) -> None:
        self.recomputed.append((len(self.seen), num_layers))

    def start_components(self, components: Iterable[Component]) -> None:
        self.calls.append((f"start before step {len(self.seen)}", list(components)))

    def set_rates(self, rates: Mapping[Component, float]) -> None:
        self.rates.append(dict(rates))
        self.random_numbers.append(-1.0)

    def micro_step(self, pack: Pack, *, num_targets: int, is_last: bool) -> torch.Tensor:
        self._samples += pack.sample_ids
        self.num_targets.append(num_targets)
        self.is_last.append(is_last)
        self.random_numbers[-1] = float(torch.rand(()))
        return torch.tensor(pack.num_targets * self.loss)

    def step(self) -> StepResult:
        self.seen.append(self._samples)
        self._samples = []
        self.num_steps += 1
        return self.bad_steps.get(self.num_steps - 1, StepResult(0.7, True))

    def evaluate(self, pack: Pack) -> torch.Tensor:
        return torch.tensor(pack.num_targets * 0.25)

    def frozen_names(self) -> frozenset[str]:
        return frozenset()

    def saved_bytes(self, *, with_frozen: bool = True) -> int:
        return 100

    def save(self, folder: Path, sink: ShardSink) -> None:
        sink(folder / self.shard, {"seen": self.seen})

    def load(self, folder: Path) -> None:
        self.seen = torch.load(folder / self.shard, weights_only=True)["seen"]

    def load_resharded(self, folder: Path) -> None:
        self.calls.append(("laid out anew", folder.parent.name))
        self.load(folder)

    def load_weights(self, folder: Path) -> None:
        self.calls.append(("weights", folder.parent.name))

    def close(self) -> None: ...


class RecordingSink(NullSink):
    def __init__(self) -> None:
        self.rewound: list[int] = []
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []
        self.notes: list[str] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def validation(self, record: ValidationRecord) -> None:
        self.validations.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def rewind(self, step: int) -> None:
        self.rewound.append(step)


@dataclass
class Run:
    """One process's part of a run in `run_dir`."""

    run_dir: Path
    checkpoint: dict[str, Any] = field(default_factory=lambda: {"every": "3 steps", "keep_last": 10})
    optim: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    logging: dict[str, Any] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = STAGES
    num_workers: int = 1
    place: Place = field(default_factory=Place)
    has_validation: bool = False
    stop_signal: Callable[[FakeEngine], int] = lambda engine: 0
    leave: LeaveWatch = field(default_factory=LeaveWatch)
    recompute: tuple[int, ...] = (0, 0)

    def __post_init__(self) -> None:
        model = model_config()
        self.feed: Feed = make_feed(model)
        self.config = RunConfig.model_validate(
            {
                "model": model.model_dump(), "curriculum": self.stages, "checkpoint": self.checkpoint, "logging": self.logging,
                "data": {"max_sample_tokens": 160, "num_workers": self.num_workers, "validation_samples": 10, **self.data},
                "optim": self.optim,
                "batch": {"global_batch_size": 8, "micro_batch_tokens": 160},
            }
        )  # fmt: skip
        self.engine, self.sink = FakeEngine(), RecordingSink()
        plan = plan_batches(self.config, world_size=self.place.world_size, num_samples=self.feed.num_samples)
        self.schedule = CurriculumSchedule(self.config.curriculum, plan)
        self.store = CheckpointStore(
            self.run_dir, place=self.place, retention=Retention(self.config.checkpoint.keep_last), facts=FACTS
        )

    def parts(self) -> TrainerParts:
        validation = make_feed(model_config(), count=12) if self.has_validation else None
        return TrainerParts(
            config=self.config, config_text=to_yaml(self.config), place=self.place, engine=self.engine, schedule=self.schedule,
            feed=self.feed, validation_feed=validation, store=self.store, sink=self.sink, stop_signal=lambda: self.stop_signal(self.engine),
            recompute=self.recompute, leave=self.leave,
        )  # fmt: skip

    def trainer(self, state: TrainState | None = None) -> Trainer:
        return Trainer(self.parts(), state or TrainState())

    def to_the_end(self) -> TrainState:
        """With roll-backs."""
        return train_to_the_end(self.parts(), TrainState(), facts=LAYOUT, codec="compact 1")

    def resume(self) -> TrainState:
        """Go on from the newest checkpoint to the end."""
        state = resume_state(self.store, self.engine, facts={"world_size": self.place.world_size, "zero_stage": 0}, codec="compact 1")
        assert state is not None
        return self.trainer(state[0]).fit()


def test_it_runs_every_step_of_every_stage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    state = run.trainer().fit()
    assert state.step == len(run.engine.seen) == run.schedule.total_steps == 9
    assert state.samples == 9 * 8, "24 samples make three full steps an epoch"
    assert [record.step for record in run.sink.steps] == list(range(1, 10))
    assert [record.stage for record in run.sink.steps] == ["text"] * 4 + ["all"] * 5
    assert [record.epoch for record in run.sink.steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for epoch in range(3):
        assert sorted(sum(run.engine.seen[3 * epoch : 3 * epoch + 3], [])) == sorted(f"part-{n}" for n in range(24))  # noqa: RUF017
    assert run.engine.rates == [run.schedule.rates(step) for step in range(9)]


def test_a_stage_sets_what_learns_and_starts_what_is_new_once_and_in_that_order(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer().fit()
    others = [component for component in COMPONENTS if component != "language"]
    assert run.engine.calls == [
        ("learning before step 0", ["language"]),
        ("start before step 0", ["language"]),
        ("learning before step 4", list(COMPONENTS)),
        ("start before step 4", others),
    ]
    begins = [note for note in run.sink.notes if "begins" in note]
    assert begins == [
        "stage text begins at step 1: text 100%", "stage all begins at step 5: text 40%, text+point 30%, text+point+image 30%",
    ]  # fmt: skip


def test_a_stage_has_its_own_number_of_recomputed_layers(tmp_path: Path) -> None:
    """Set before its first step, and again where a run is resumed inside it."""
    run = Run(tmp_path, recompute=(2, 1))
    run.trainer().fit()
    assert run.engine.recomputed == [(0, 2), (4, 1)]
    stopped = Run(tmp_path / "stopped", recompute=(2, 1), stop_signal=lambda engine: 15 if len(engine.seen) == 6 else 0)
    with pytest.raises(Interrupted):
        stopped.trainer().fit()
    resumed = Run(tmp_path / "stopped", recompute=(2, 1))
    resumed.resume()
    assert resumed.engine.recomputed == [(6, 1)]


def test_a_step_is_one_loss_over_all_its_packs(tmp_path: Path) -> None:
    """Every micro-step is told the step's whole count, the last one is marked, and the loss is the mean over targets."""
    run = Run(tmp_path)
    run.trainer().fit()
    plans = [
        run.feed.plan_step(step, run.config.curriculum[run.schedule.stage_index(step)].probabilities(), world_size=1) for step in range(9)
    ]
    assert run.engine.num_targets == [plan.num_targets for plan in plans for _ in plan.packs]
    assert run.engine.is_last == [number == len(plan.packs) - 1 for plan in plans for number in range(len(plan.packs))]
    assert any(len(plan.packs) > 1 for plan in plans)
    for record, plan in zip(run.sink.steps, plans, strict=True):
        assert record.loss == pytest.approx(0.5)
        assert (record.samples, record.tokens, record.target_tokens, record.micro_steps) == (
            plan.num_samples, plan.num_tokens, plan.num_targets, len(plan.packs),
        )  # fmt: skip


def test_metrics_are_complete(tmp_path: Path) -> None:
    run = Run(tmp_path)
    state = run.trainer().fit()
    for number, record in enumerate(run.sink.steps):
        assert record.lr == record.rates["language"] == run.schedule.rate(number, "language")
        assert set(record.rates) == set(COMPONENTS)
        assert record.grad_norm == 0.7
        assert record.seconds > 0
        assert record.tokens_per_second == pytest.approx(record.tokens / record.seconds)
        assert 0 <= record.data_wait_seconds <= record.seconds
        assert record.memory_gib is record.memory_reserved_gib is None
        assert record.skipped_steps == 0
    last = run.sink.steps[-1]
    assert last.elapsed_seconds == pytest.approx(sum(record.seconds for record in run.sink.steps)) == pytest.approx(state.elapsed_seconds)
    assert state.tokens == sum(record.tokens for record in run.sink.steps)
    assert state.target_tokens == sum(record.target_tokens for record in run.sink.steps)


def test_fewer_lines_where_asked_and_always_at_a_stages_end(tmp_path: Path) -> None:
    run = Run(tmp_path, logging={"every": 3})
    run.trainer().fit()
    assert [record.step for record in run.sink.steps] == [3, 4, 6, 9]


def test_another_rank_trains_its_own_packs_and_stays_quiet(tmp_path: Path) -> None:
    """Rank 1 of 2, whose clock decides nothing: it saves at the stages' ends, into the folder that rank 0 makes."""
    run = Run(tmp_path, place=Place(rank=1, local_rank=1, world_size=2), checkpoint={"every": "1 step"})
    for step in (4, 9):
        (run.store.root / f"step-{step:08d}.tmp" / "engine").mkdir(parents=True)
    run.trainer().fit()
    plans = [
        run.feed.plan_step(step, run.config.curriculum[run.schedule.stage_index(step)].probabilities(), world_size=2) for step in range(9)
    ]
    ids = run.feed.dataset.column("id")
    assert run.engine.seen == [[ids[draw.index] for order in plan.for_rank(1) for draw in order.draws] for plan in plans]
    assert run.engine.num_targets == [plan.num_targets for plan in plans for _ in plan.packs]
    assert run.sink.steps == []
    assert list_steps(run.store.root) == [], "the manifest and the renaming are rank 0's"
    assert sorted(path.name for path in run.store.root.glob("*/files-*")) == ["files-00001.json"] * 2


@pytest.mark.parametrize(
    ("every", "expected"), [("3 steps", [3, 4, 6, 9]), ("100 steps", [4, 9]), ("1 epoch", [3, 4, 6, 9]), ("1 step", list(range(1, 10)))]
)
def test_checkpoints_come_when_configured_and_at_every_stages_end(tmp_path: Path, every: str, expected: list[int]) -> None:
    run = Run(tmp_path, checkpoint={"every": every, "keep_last": 20})
    run.trainer().fit()
    assert list_steps(run.store.root) == expected
    assert all(verify(run.store.root / f"step-{step:08d}") == [] for step in expected)
    saved = [note.split()[1] for note in run.sink.notes if note.startswith("checkpoint")]
    assert saved == [f"step-{step:08d}" for step in expected], "each once"


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step a minute, a checkpoint every three minutes; the one at the stage's end starts the count anew."""
    run = Run(tmp_path, checkpoint={"every": "3 minutes", "keep_last": 20})
    clock = SimpleNamespace(monotonic=lambda: 60.0 * len(run.engine.seen), perf_counter=trainer_module.time.perf_counter)
    monkeypatch.setattr(trainer_module, "time", clock)
    run.trainer().fit()
    assert list_steps(run.store.root) == [3, 4, 7, 9]


def test_a_checkpoint_holds_the_state_after_its_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer().fit()
    state = TrainState.read(run.store.root / "step-00000006")
    assert (state.step, state.samples) == (6, 48)
    assert state.tokens == sum(record.tokens for record in run.sink.steps[:6])
    assert (run.store.root / "step-00000006" / "config.yaml").read_text() == to_yaml(run.config)


def test_a_stop_file_saves_and_leaves_once(tmp_path: Path) -> None:
    def touch(engine: FakeEngine) -> int:
        if len(engine.seen) == 5:
            (tmp_path / "STOP").touch()
        return 0

    stopped = Run(tmp_path, checkpoint={"every": 100}, stop_signal=touch, leave=LeaveWatch(tmp_path))
    with pytest.raises(Interrupted, match="stopped by the file STOP in the run folder after step 5; the state is saved") as caught:
        stopped.trainer().fit()
    assert caught.value.exit_code == 143
    assert not (tmp_path / "STOP").exists()
    assert list_steps(stopped.store.root) == [4, 5]
    assert Run(tmp_path, leave=LeaveWatch(tmp_path)).resume().step == 9


@pytest.mark.parametrize(("number", "code"), [(15, 143), (2, 130), (10, 138)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stop_signal_saves_and_the_resumed_run_goes_on_with_the_same_samples(
    tmp_path: Path, number: int, code: int, num_workers: int
) -> None:
    whole = Run(tmp_path / "whole", num_workers=num_workers)
    whole.trainer().fit()
    stopped = Run(
        tmp_path / "stopped", checkpoint={"every": 100}, num_workers=num_workers,
        stop_signal=lambda engine: number if len(engine.seen) == 5 else 0,
    )  # fmt: skip
    with pytest.raises(Interrupted, match="after step 5; the state is saved") as caught:
        stopped.trainer().fit()
    assert caught.value.exit_code == code
    assert caught.value.hint == "Go on with --resume."
    assert len(stopped.engine.seen) == 5
    resumed = Run(tmp_path / "stopped", num_workers=num_workers)
    state = resumed.resume()
    assert resumed.engine.seen == whole.engine.seen
    assert stopped.engine.rates + resumed.engine.rates == whole.engine.rates
    assert stopped.engine.random_numbers + resumed.engine.random_numbers == whole.engine.random_numbers, "dropout draws the same"
    assert [record.step for record in resumed.sink.steps] == [6, 7, 8, 9]
    assert (state.step, state.samples, state.tokens) == (9, 72, sum(record.tokens for record in whole.sink.steps))
    assert state.elapsed_seconds > sum(record.seconds for record in resumed.sink.steps)
    assert resumed.engine.calls == [("learning before step 5", list(COMPONENTS))], "inside a stage nothing starts anew"


def test_resuming_at_a_stages_border_starts_the_next_stage(tmp_path: Path) -> None:
    stopped = Run(tmp_path, stop_signal=lambda engine: 15 if len(engine.seen) == 4 else 0)
    with pytest.raises(Interrupted):
        stopped.trainer().fit()
    resumed = Run(tmp_path)
    resumed.resume()
    assert [call for call, _ in resumed.engine.calls] == ["learning before step 4", "start before step 4"]


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, stop_signal=lambda engine: 15 if len(engine.seen) == 9 else 0)
    assert run.trainer().fit().step == 9


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    Run(tmp_path).trainer().fit()
    again = Run(tmp_path)
    assert again.resume().step == 9
    assert again.sink.steps == []
    assert again.engine.calls == []


def test_a_run_without_checkpoints_has_nothing_to_resume(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert resume_state(run.store, run.engine, facts={"world_size": 1}, codec="compact 1") is None


def test_a_step_without_a_finite_gradient_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    run.engine.bad_steps = {1: StepResult(math.inf, False), 6: StepResult(math.nan, False)}
    state = run.trainer().fit()
    assert (state.step, state.skipped_steps) == (9, 2)
    assert [record.skipped_steps for record in run.sink.steps] == [0, 1, 1, 1, 1, 1, 2, 2, 2]
    warnings = [record.getMessage() for record in caplog.records if "gradient norm" in record.getMessage()]
    assert [text.split(":")[0] for text in warnings] == ["step 2", "step 7"]
    for sample in run.engine.seen[1]:
        assert sample in warnings[0]
    assert TrainState.read(run.store.root / "step-00000009").skipped_steps == 2


def long_run(tmp_path: Path) -> Run:
    return Run(tmp_path, stages=({**STAGES[0], "duration": 40},), checkpoint={"every": 5, "keep_last": 1})


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = long_run(tmp_path)
    run.engine.bad_steps = dict.fromkeys(range(7, 40), StepResult(math.inf, False))
    with pytest.raises(TrainingError, match=f"{MAX_BAD_STEPS} steps in a row had no finite gradient, the last at step 17") as caught:
        run.trainer().fit()
    assert caught.value.where == str(tmp_path)
    assert len(run.engine.seen) == 7 + MAX_BAD_STEPS


def test_bad_steps_with_good_ones_between_do_not(tmp_path: Path) -> None:
    run = long_run(tmp_path)
    run.engine.bad_steps = {step: StepResult(math.inf, False) for step in range(40) if step % MAX_BAD_STEPS}
    assert run.trainer().fit().skipped_steps == 36


def test_a_loss_that_is_nan_with_weights_updated_ends_the_run_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.engine.loss = math.nan
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*no longer finite"):
        run.trainer().fit()
    assert list_steps(run.store.root) == [], "nothing of it is saved"


def poison(run: Run, step: int) -> None:
    """0-based `step` makes every weight nan, whenever it is trained; a step is known by its rates."""
    healthy = run.engine.micro_step

    def micro_step(pack: Pack, *, num_targets: int, is_last: bool) -> torch.Tensor:
        loss = healthy(pack, num_targets=num_targets, is_last=is_last)
        return loss * math.nan if run.engine.rates[-1] == run.schedule.rates(step) else loss

    run.engine.micro_step = micro_step  # type: ignore[method-assign]


def test_a_run_goes_back_and_passes_over_the_samples_that_broke_it(tmp_path: Path) -> None:
    """Step 6 breaks the weights; the checkpoint of step 4 is the last before it, step 5 is done again, step 6 is left out for good."""
    whole = Run(tmp_path / "whole")
    whole.trainer().fit()
    run = Run(tmp_path / "run", optim={"bad_steps": "rollback"}, checkpoint={"every": "100 steps", "keep_last": 10})
    poison(run, 5)
    state = run.to_the_end()
    assert (state.step, state.passed_over, state.rollbacks) == (9, [5], 1)
    assert run.sink.rewound == [4]
    assert [record.step for record in run.sink.steps] == [1, 2, 3, 4, 5, 5, 7, 8, 9]
    assert run.engine.seen == whole.engine.seen[:5] + whole.engine.seen[6:]
    assert any("no longer finite; back to step 4, passing over the samples of step 6" in note for note in run.sink.notes)
    assert TrainState.read(run.store.root / "step-00000009").passed_over == [5], "a resumed run passes over them, too"


def test_going_back_has_a_bound(tmp_path: Path) -> None:
    run = Run(tmp_path, optim={"bad_steps": "rollback", "max_rollbacks": 2}, checkpoint={"every": 1, "keep_last": 10})
    healthy = run.engine.micro_step

    def micro_step(pack: Pack, *, num_targets: int, is_last: bool) -> torch.Tensor:
        loss = healthy(pack, num_targets=num_targets, is_last=is_last)
        return loss * math.nan if len(run.engine.seen) == 2 else loss

    run.engine.micro_step = micro_step  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="no longer finite"):
        run.to_the_end()
    assert run.sink.rewound == [2, 3]


def test_without_a_checkpoint_before_it_a_broken_run_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, optim={"bad_steps": "rollback"})
    run.engine.loss = math.nan
    with pytest.raises(TrainingError, match="no longer finite"):
        run.to_the_end()


def test_ten_steps_without_a_gradient_are_passed_over_together(tmp_path: Path) -> None:
    run = Run(tmp_path, stages=({**STAGES[0], "duration": 40},), checkpoint={"every": 5, "keep_last": 9}, optim={"bad_steps": "rollback"})
    run.engine.bad_steps = dict.fromkeys(range(7, 17), StepResult(math.inf, False))
    state = run.to_the_end()
    assert (state.step, state.passed_over, run.sink.rewound) == (40, list(range(7, 17)), [5])


def test_saves_behind_the_training_are_those_of_saves_at_once(tmp_path: Path) -> None:
    """One at a time, whole at the run's end, and each holds the state of its own step, whatever was trained meanwhile."""
    rules = {"every": "1 step", "keep_last": 10, "asynchronous": True}
    at_once, behind = Run(tmp_path / "a", checkpoint={**rules, "asynchronous": False}), Run(tmp_path / "b", checkpoint=rules)
    at_once.trainer().fit()
    behind.trainer().fit()
    assert list_steps(behind.store.root) == list_steps(at_once.store.root) == list(range(1, 10))
    for step in range(1, 10):
        folder = behind.store.root / f"step-{step:08d}"
        assert verify(folder) == []
        assert TrainState.read(folder).step == step
        behind.engine.load(folder / "engine")
        assert behind.engine.seen == at_once.engine.seen[:step]
    assert sum("training waited" in note for note in behind.sink.notes) == 8, "the last one is saved at once"


def test_without_room_for_a_copy_saves_are_made_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cadtrain.checkpoint.store.available_memory", lambda: 1 << 30)
    run = Run(tmp_path, checkpoint={"every": "1 step", "keep_last": 10, "asynchronous": True})
    run.trainer().fit()
    assert list_steps(run.store.root) == list(range(1, 10))
    assert not any("training waited" in note for note in run.sink.notes)
    assert sum("no room for a copy of the state, rank 0: 2.0 GiB needed, 1.0 GiB free" in text for text in caplog.messages) == 1


def test_a_save_behind_that_fails_is_told_at_the_next_meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    run = Run(tmp_path, checkpoint={"every": "3 steps", "keep_last": 10, "asynchronous": True})
    monkeypatch.setattr("cadtrain.checkpoint.shard_writer.write_shard", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*while writing its shards behind the training"):
        run.trainer().fit()
    assert list_steps(run.store.root) == []


def test_a_run_that_leaves_is_saved_even_where_the_save_behind_had_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save of step 3 fails behind the training; a signal in that step's successor saves at once, and that one works."""
    run = Run(
        tmp_path, stop_signal=lambda engine: 15 if len(engine.seen) == 4 else 0, stages=({**STAGES[0], "duration": 9},),
        checkpoint={"every": "3 steps", "keep_last": 10, "asynchronous": True},
    )  # fmt: skip
    real, fails = shard_writer.write_shard, [True]

    def once_full(path: Path, content: Any) -> Any:
        if fails:
            fails.pop()
            time.sleep(0.2)  # so that the step after finds it still under way
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(shard_writer, "write_shard", once_full)
    monkeypatch.setattr(CheckpointStore, "is_writing", True)
    with pytest.raises(Interrupted):
        run.trainer().fit()
    assert list_steps(run.store.root) == [4]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_does_not_end_a_run_that_may_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    run = Run(tmp_path, checkpoint={"every": "3 steps", "keep_last": 10, "asynchronous": asynchronous, "on_failure": "continue"})
    real, fails = shard_writer.write_shard, [True]

    def once_full(path: Path, content: Any) -> Any:
        if fails:
            fails.pop()
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(shard_writer, "write_shard", once_full)
    run.trainer().fit()
    assert list_steps(run.store.root) == [4, 6, 9]
    assert sum("the run goes on" in note for note in run.sink.notes) == 1
    assert not list(run.store.root.glob("*.tmp")), "what was begun gives its room back"


def test_the_last_checkpoint_of_a_run_must_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, checkpoint={"every": "100 steps", "on_failure": "continue"}, stages=STAGES[:1])

    def full(path: Path, content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_shard", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.trainer().fit()


def test_validation_inside_a_stage_and_the_best_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, has_validation=True, data={"validate_every": "2 steps"})
    run.trainer().fit()
    assert [record.step for record in run.sink.validations] == [2, 4, 6, 8, 9]
    assert run.store.scores.read() == {step: pytest.approx(0.25) for step in (2, 4, 6, 8, 9)}


def test_a_run_stopped_between_save_and_validation_validates_when_it_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"has_validation": True, "data": {"validate_every": "2 steps"}}
    with pytest.raises(Interrupted):
        Run(tmp_path, stop_signal=lambda engine: 15 if len(engine.seen) == 6 else 0, **options).trainer().fit()
    resumed = Run(tmp_path, **options)
    resumed.resume()
    assert [record.step for record in resumed.sink.validations] == [6, 8, 9]


def test_validation_at_every_stages_end_with_each_set_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, has_validation=True)
    run.trainer().fit()
    assert [(record.step, record.stage) for record in run.sink.validations] == [(4, "text"), (9, "all")]
    assert run.sink.validations[0].losses == {"text": pytest.approx(0.25)}
    assert run.sink.validations[1].losses == {key: pytest.approx(0.25) for key in ("text", "text+point", "text+point+image")}
    assert run.sink.validations[1].samples == {"text": 10, "text+point": 10, "text+point+image": 10}


def test_a_sample_that_cannot_be_read_ends_the_run_with_its_error(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.feed.dataset.caption = lambda index: 1 / 0  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        run.trainer().fit()


def test_a_checkpoint_of_other_ranks_is_laid_out_anew(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer().fit()
    assert resume_state(run.store, run.engine, facts={"world_size": 1, "zero_stage": 0}, codec="compact 1") is not None
    assert ("laid out anew", "step-00000009") not in run.engine.calls
    resumed = resume_state(run.store, run.engine, facts={"world_size": 2, "zero_stage": 3, "precision": "fp32"}, codec="compact 1")
    assert resumed is not None
    assert resumed[1] == "resumed after step 9, laid out anew (world size 1 -> 2, zero stage 0 -> 3)"
    assert run.engine.calls[-1] == ("laid out anew", "step-00000009")


@pytest.mark.parametrize(
    ("codec", "hint"), [("tokens 1", "Set data.codec to compact, or start a new run."), ("compact 2", "Use the cadtrain that has codec compact 1.")]
)
def test_a_checkpoint_of_another_codec_is_refused_before_anything_is_loaded(tmp_path: Path, codec: str, hint: str) -> None:
    run = Run(tmp_path)
    run.trainer().fit()
    run.engine.load = lambda folder: pytest.fail("the engine was loaded")  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=f"writes codec compact 1, but this run is set to codec {codec}") as caught:
        resume_state(run.store, run.engine, facts={}, codec=codec)
    assert caught.value.hint == hint


def test_a_new_run_takes_the_weights_of_another_and_begins_at_a_stage(tmp_path: Path) -> None:
    before = Run(tmp_path / "before")
    before.trainer().fit()
    run = Run(tmp_path / "new")
    how = take_weights(tmp_path / "before", run.engine, place=run.place)
    assert how == f"weights of {before.store.root / 'step-00000009'}; the optimizer is new"
    state = first_state(run.schedule.plan, "all", codec="compact 1")
    assert state.step == 4
    assert run.trainer(state).fit().step == 9
    assert run.engine.seen == before.engine.seen[4:], "the samples of the stage are those of a run from the start"
    assert run.engine.calls[0] == ("weights", "step-00000009")
    assert first_state(run.schedule.plan, None, codec="compact 1").step == 0


def test_weights_that_do_not_verify_are_refused(tmp_path: Path) -> None:
    before = Run(tmp_path / "before")
    before.trainer().fit()
    (before.store.root / "step-00000009" / "engine" / "mp_rank_00_model_states.pt").write_text("[]")
    run = Run(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"does not verify: rank 0: engine/mp_rank_00_model_states\.pt"):
        take_weights(tmp_path / "before", run.engine, place=run.place)
    assert not run.engine.calls
