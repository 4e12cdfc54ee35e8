"""The loop: stages, steps, checkpoints, and the ways a run can end."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from cadtrain.checkpoint.store import CheckpointStore, SaveReport
from cadtrain.config.sections import COMPONENTS, RunConfig
from cadtrain.data.collate import made_for
from cadtrain.data.feed import Feed, PackOrder, StepPlan
from cadtrain.data.loader import ReadAhead
from cadtrain.distributed import Place
from cadtrain.errors import CheckpointError, Interrupted, TrainingError
from cadtrain.metrics.record import MetricSink, StepRecord
from cadtrain.train.engine import Engine
from cadtrain.train.leave import LeaveWatch
from cadtrain.train.schedule import CurriculumSchedule
from cadtrain.train.state import TrainState
from cadtrain.train.step import StepOutcome, Wishes, pass_over, step_seed, train_step
from cadtrain.train.validate import validate

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 10
"""Steps in a row without a finite loss or gradient before the run gives up."""


class RollBack(Exception):
    """Asks to go back to a checkpoint before the first of `bad_steps` (0-based) and to pass these over. Raised on all ranks alike."""

    def __init__(self, bad_steps: list[int], why: TrainingError) -> None:
        super().__init__(str(why))
        self.bad_steps = bad_steps
        self.why = why


@dataclass(frozen=True, slots=True)
class TrainerParts:
    """What the loop is made of."""

    config: RunConfig
    config_text: str
    place: Place
    engine: Engine
    schedule: CurriculumSchedule
    feed: Feed
    validation_feed: Feed | None
    store: CheckpointStore
    sink: MetricSink
    stop_signal: Callable[[], int]
    recompute: tuple[int, ...]
    """Decoder layers computed again in the backward pass, by stage."""
    leave: LeaveWatch = field(default_factory=LeaveWatch)
    on_step: Callable[[int], None] = lambda step: None
    """Told of each 0-based step before it begins."""
    on_wait: Callable[[str], None] = lambda what: None
    """Told what the run waits for outside its steps."""


class Trainer:
    """Runs a curriculum from `state` to its end. Every method is collective."""

    def __init__(self, parts: TrainerParts, state: TrainState) -> None:
        self.parts = parts
        self.state = state
        self._plans: deque[StepPlan] = deque()
        self._stage = -1
        self._saved_step = state.step if state.step else -1
        self._saved_at = time.monotonic()
        self._bad_steps: list[int] = []
        self._passed_over = 0
        self._why = ""

    def fit(self) -> TrainState:
        """Train to the end. Raises `Interrupted` after saving when asked to stop, `TrainingError` when it cannot go on, and
        `RollBack` where the configuration says to go back instead."""
        parts = self.parts
        if self.state.step and (parts.schedule.is_stage_end(self.state.step) or self._is_validation_due()):
            # A step is saved before it is validated; the run may have been stopped in between.
            self._stage = parts.schedule.stage_index(self.state.step - 1)
            self._validate()
        make_pack = made_for(parts.engine.device, parts.feed.make_pack)
        with ReadAhead(make_pack, self._orders(), num_workers=parts.config.data.num_workers) as packs:
            for step in range(self.state.step, parts.schedule.total_steps):
                self._enter_stage(step)
                waited, started = packs.waited_seconds, time.perf_counter()
                outcome = self._train_step(step, packs)
                self._count(step, outcome, time.perf_counter() - started, packs.waited_seconds - waited)
                self._plans.popleft()
                self._after_step(outcome)
        self._complete_save()
        return self.state

    def _orders(self) -> Iterator[PackOrder]:
        """This rank's packs from here to the end; plans are kept until their step is done."""
        parts = self.parts
        for step in range(self.state.step, parts.schedule.total_steps):
            stage = parts.schedule.stages[parts.schedule.stage_index(step)]
            plan = parts.feed.plan_step(step, stage.probabilities(), world_size=parts.place.world_size)
            self._plans.append(plan)
            yield from plan.for_rank(parts.place.rank)

    def _enter_stage(self, step: int) -> None:
        schedule, engine = self.parts.schedule, self.parts.engine
        number = schedule.stage_index(step)
        if number != self._stage:
            self._stage = number
            learning = [component for component in COMPONENTS if schedule.learns(number, component)]
            engine.set_learning(learning)
            engine.set_recompute(self.parts.recompute[number])
            stage = schedule.stages[number]
            shares = ", ".join(f"{key} {share:.0%}" for key, share in stage.probabilities().items())
            verb = "begins" if step == schedule.plan.stages[number].first_step else "goes on"
            self.parts.sink.note(f"stage {stage.name} {verb} at step {step + 1}: {shares}")
            self._passed_over = 0
            log.info(
                "stage %s: learning %s, drawing %s, recomputing %d layers",
                stage.name, learning, shares, self.parts.recompute[number],
            )  # fmt: skip
        starting = schedule.starting_components(step)
        if starting:
            engine.start_components(starting)

    def _train_step(self, step: int, packs: ReadAhead) -> StepOutcome:
        parts = self.parts
        parts.on_step(step)
        parts.engine.set_rates(parts.schedule.rates(step))
        if not self._plans:
            packs.prime()
        if step in self.state.passed_over:
            parts.sink.note(f"step {step + 1} is passed over: the run went back because of it")
            return pass_over(self._plans[0], packs, wishes=self._wishes, engine=parts.engine)
        seed = step_seed(parts.config.seed, step, parts.place.rank)
        return train_step(parts.engine, self._plans[0], packs, seed=seed, wishes=self._wishes)

    def _wishes(self) -> Wishes:
        return Wishes(self._wish_to_stop(), self._is_save_due(), self.parts.store.is_writing)

    def _wish_to_stop(self) -> int:
        """A signal that this rank was sent, or SIGTERM where rank 0 has another reason to leave; 0 if none."""
        number = self.parts.stop_signal()
        self._why = f"signal {number}" if number else self.parts.leave.reason()
        return number or (signal.SIGTERM if self._why else 0)

    def _count(self, step: int, outcome: StepOutcome, seconds: float, waited: float) -> None:
        """Add the step to the state and tell the sinks; raises `TrainingError` or `RollBack` after too many bad steps."""
        plan, state, parts = self._plans[0], self.state, self.parts
        state.step = step + 1
        if step in state.passed_over:
            return
        state.samples += plan.num_samples
        state.tokens += plan.num_tokens
        state.target_tokens += plan.num_targets
        self._passed_over += plan.num_without_modality
        state.elapsed_seconds += seconds
        is_bad = not outcome.result.was_applied or not math.isfinite(outcome.loss)
        self._bad_steps = [*self._bad_steps, step] if is_bad else []
        if is_bad:
            self._report_bad_step(outcome, plan)
        if parts.place.is_main and (
            state.step % parts.config.logging.every == 0 or is_bad or parts.schedule.is_stage_end(state.step)
        ):
            parts.sink.step(self._record(outcome, plan, seconds, waited))

    def _report_bad_step(self, outcome: StepOutcome, plan: StepPlan) -> None:
        """Name the samples of a step whose loss or gradient is no finite number, and stop when there is no sense in going on."""
        all_ids = self.parts.feed.dataset.column("id")
        ids = [all_ids[draw.index] for row in plan.packs for order in row for draw in order.draws]
        what = f"step {self.state.step}: loss {outcome.loss}, gradient norm {outcome.result.grad_norm}"
        log.warning("%s; samples: %s", what, ", ".join(map(str, ids)))
        if outcome.result.was_applied:
            self._give_up(
                TrainingError(
                    f"{what}: the weights of this run are no longer finite",
                    where=str(self.parts.store.root.parent),
                    hint="Resume from the last checkpoint with a lower learning rate; the step's samples are in the log.",
                )
            )
        self.state.skipped_steps += 1
        self.parts.sink.note(f"{what}; the weights were left alone ({self.state.skipped_steps} steps so far)")
        if len(self._bad_steps) >= MAX_BAD_STEPS:
            self._give_up(
                TrainingError(
                    f"{len(self._bad_steps)} steps in a row had no finite gradient, the last at {what}",
                    where=str(self.parts.store.root.parent),
                    hint="Lower the learning rate or look at the samples named in the log, then resume.",
                )
            )

    def _give_up(self, error: TrainingError) -> NoReturn:
        """End the run with `error`, or ask to go back where the configuration allows it once more."""
        optim = self.parts.config.optim
        try:
            self._complete_save()
        except CheckpointError as lost:
            log.warning("%s", lost)  # what ended the steps is the greater fault
        if optim.bad_steps == "rollback" and self.state.rollbacks < optim.max_rollbacks:
            raise RollBack(self._bad_steps, error)
        raise error

    def _record(self, outcome: StepOutcome, plan: StepPlan, seconds: float, waited: float) -> StepRecord:
        state, parts = self.state, self.parts
        rates = parts.schedule.rates(state.step - 1)
        memory = reserved = None
        if parts.engine.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
            reserved = torch.cuda.max_memory_reserved() / 2**30
            torch.cuda.reset_peak_memory_stats()
        return StepRecord(
            step=state.step,
            stage=parts.schedule.stages[self._stage].name,
            epoch=plan.epoch,
            loss=outcome.loss,
            lr=rates["language"],
            rates={str(component): rate for component, rate in rates.items()},
            grad_norm=outcome.result.grad_norm,
            samples=plan.num_samples,
            tokens=plan.num_tokens,
            target_tokens=plan.num_targets,
            tokens_per_second=plan.num_tokens / seconds,
            seconds=seconds,
            elapsed_seconds=state.elapsed_seconds,
            data_wait_seconds=waited,
            micro_steps=len(plan.packs),
            memory_gib=memory,
            memory_reserved_gib=reserved,
            skipped_steps=state.skipped_steps,
        )

    def _after_step(self, outcome: StepOutcome) -> None:
        schedule, state = self.parts.schedule, self.state
        is_stage_end = schedule.is_stage_end(state.step)
        if is_stage_end and self._passed_over:
            self.parts.sink.note(
                f"{self._passed_over} samples were passed over: they have none of the stage's modality sets"
            )
        if self.parts.store.has_pending and not outcome.is_writing:
            self._complete_save()
        is_last = state.step == schedule.total_steps
        is_leaving = bool(outcome.stop_signal) and not is_last
        if is_stage_end or outcome.is_due or outcome.stop_signal:
            self._save(is_final=is_last or is_leaving)
        if not is_leaving and (is_stage_end or self._is_validation_due()):
            self._validate()
        if is_leaving:
            self.parts.leave.clear()
            why = self._why or f"signal {outcome.stop_signal}"
            self.parts.sink.note(f"leaving after step {state.step}: {why}")
            raise Interrupted(
                f"stopped by {why} after step {state.step}; the state is saved",
                signal_number=outcome.stop_signal,
                where=str(self.parts.store.root.parent),
                hint="Go on with --resume.",
            )

    def _validate(self) -> None:
        parts = self.parts
        if parts.validation_feed is None:
            return
        stage = parts.schedule.stages[self._stage]
        record = validate(
            parts.engine,
            parts.validation_feed,
            stage,
            step=self.state.step,
            place=parts.place,
            max_samples=parts.config.data.validation_samples,
        )
        if parts.place.is_main:
            parts.sink.validation(record)
            if record.losses:
                parts.store.scores.note(record.step, sum(record.losses.values()) / len(record.losses))

    def _is_validation_due(self) -> bool:
        every = self.parts.config.data.validate_every
        if every is None:
            return False
        return self.state.step % max(1, every.in_steps(self.parts.schedule.plan.steps_per_epoch)) == 0

    def _is_save_due(self) -> bool:
        """Whether a checkpoint is due after the step under way; rank 0's answer counts, since clocks differ."""
        every = self.parts.config.checkpoint.every
        if not self.parts.place.is_main:
            return False
        if every.unit == "minutes":
            return time.monotonic() - self._saved_at >= every.value * 60
        steps = max(1, every.in_steps(self.parts.schedule.plan.steps_per_epoch))
        return (self.state.step + 1) % steps == 0

    def _save(self, *, is_final: bool) -> None:
        """Save at once where the run ends or leaves, else behind the training if the configuration says so."""
        parts, state = self.parts, self.state
        self._complete_save(is_followed=is_final)
        if self._saved_step == state.step:
            return
        is_behind = parts.config.checkpoint.asynchronous and not is_final
        is_behind = is_behind and parts.store.has_host_room(parts.engine.saved_bytes(with_frozen=False))
        save: Callable[..., SaveReport | None] = parts.store.save_behind if is_behind else parts.store.save
        started = time.perf_counter()
        try:
            report = save(
                state.step, state.to_json(), config_text=parts.config_text, write_engine=parts.engine.save,
                expected_bytes=parts.engine.saved_bytes(with_frozen=not parts.store.has_frozen),
            )  # fmt: skip
        except CheckpointError as error:
            self._save_failed(error, is_final=is_final)
            return
        if report is not None:
            self._note_saved(report)
        else:
            log.info("state of step %d copied in %.2f s", state.step, time.perf_counter() - started)
        self._saved_step, self._saved_at = state.step, time.monotonic()

    def _complete_save(self, *, is_followed: bool = False) -> None:
        """Wait for the save behind the training, if there is one, and make it a checkpoint. Where a final save follows, that one counts."""
        if not self.parts.store.has_pending:
            return
        self.parts.on_wait("finishing a checkpoint")
        try:
            self._note_saved(self.parts.store.complete())
        except CheckpointError as error:
            self._saved_step = -1
            if is_followed:
                log.warning("%s", error)
            else:
                self._save_failed(error, is_final=False)

    def _note_saved(self, report: SaveReport) -> None:
        self.parts.leave.note_save(report.seconds)
        behind = f", training waited {report.stall_seconds:.1f} s" if report.stall_seconds < report.seconds else ""
        self.parts.sink.note(f"checkpoint {report.path.name} saved in {report.seconds:.1f} s{behind}")

    def _save_failed(self, error: CheckpointError, *, is_final: bool) -> None:
        """End the run, or say so and go on where the configuration allows it and there will be another save."""
        if is_final or self.parts.config.checkpoint.on_failure == "stop":
            raise error
        log.warning("%s", error)
        self.parts.sink.note(f"{error.message}; the run goes on, the last checkpoint is what it was")
