"""The loop: stages, steps, checkpoints, and the ways a run can end."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from cadtrain.checkpoint.store import CheckpointStore
from cadtrain.config.sections import COMPONENTS, RunConfig
from cadtrain.data.feed import Feed, PackOrder, StepPlan
from cadtrain.data.loader import ReadAhead
from cadtrain.distributed import Place
from cadtrain.errors import Interrupted, TrainingError
from cadtrain.metrics.record import MetricSink, StepRecord
from cadtrain.train.engine import Engine
from cadtrain.train.leave import LeaveWatch
from cadtrain.train.schedule import CurriculumSchedule
from cadtrain.train.state import TrainState
from cadtrain.train.step import StepOutcome, step_seed, train_step
from cadtrain.train.validate import validate

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 10
"""Steps in a row without a finite loss or gradient before the run gives up."""


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
    leave: LeaveWatch = field(default_factory=LeaveWatch)


class Trainer:
    """Runs a curriculum from `state` to its end. Every method is collective."""

    def __init__(self, parts: TrainerParts, state: TrainState) -> None:
        self.parts = parts
        self.state = state
        self._plans: deque[StepPlan] = deque()
        self._stage = -1
        self._saved_step = state.step if state.step else -1
        self._saved_at = time.monotonic()
        self._bad_steps = 0
        self._passed_over = 0
        self._why = ""

    def fit(self) -> TrainState:
        """Train to the end. Raises `Interrupted` after saving when asked to stop, `TrainingError` when it cannot go on."""
        parts = self.parts
        if self.state.step and parts.schedule.is_stage_end(self.state.step):
            # A stage's end is saved before it is validated; the run may have been stopped in between.
            self._stage = parts.schedule.stage_index(self.state.step - 1)
            self._validate()
        with ReadAhead(parts.feed.make_pack, self._orders(), num_workers=parts.config.data.num_workers) as packs:
            for step in range(self.state.step, parts.schedule.total_steps):
                self._enter_stage(step)
                waited, started = packs.waited_seconds, time.perf_counter()
                outcome = self._train_step(step, packs)
                self._count(step, outcome, time.perf_counter() - started, packs.waited_seconds - waited)
                self._plans.popleft()
                self._after_step(outcome)
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
            stage = schedule.stages[number]
            shares = ", ".join(f"{key} {share:.0%}" for key, share in stage.probabilities().items())
            verb = "begins" if step == schedule.plan.stages[number].first_step else "goes on"
            self.parts.sink.note(f"stage {stage.name} {verb} at step {step + 1}: {shares}")
            self._passed_over = 0
            log.info("stage %s: learning %s, drawing %s", stage.name, learning, shares)
        starting = schedule.starting_components(step)
        if starting:
            engine.start_components(starting)

    def _train_step(self, step: int, packs: ReadAhead) -> StepOutcome:
        parts = self.parts
        parts.engine.set_rates(parts.schedule.rates(step))
        if not self._plans:
            packs.prime()
        return train_step(
            parts.engine,
            self._plans[0],
            packs,
            seed=step_seed(parts.config.seed, step, parts.place.rank),
            stop_signal=self._wish_to_stop,
            is_due=self._is_save_due,
        )

    def _wish_to_stop(self) -> int:
        """A signal that this rank was sent, or SIGTERM where rank 0 has another reason to leave; 0 if none."""
        number = self.parts.stop_signal()
        self._why = f"signal {number}" if number else self.parts.leave.reason()
        return number or (signal.SIGTERM if self._why else 0)

    def _count(self, step: int, outcome: StepOutcome, seconds: float, waited: float) -> None:
        """Add the step to the state and tell the sinks; raises `TrainingError` after too many bad steps."""
        plan, state, parts = self._plans[0], self.state, self.parts
        state.step = step + 1
        state.samples += plan.num_samples
        state.tokens += plan.num_tokens
        state.target_tokens += plan.num_targets
        self._passed_over += plan.num_without_modality
        state.elapsed_seconds += seconds
        is_bad = not outcome.result.was_applied or not math.isfinite(outcome.loss)
        self._bad_steps = self._bad_steps + 1 if is_bad else 0
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
            raise TrainingError(
                f"{what}: the weights of this run are no longer finite",
                where=str(self.parts.store.root.parent),
                hint="Resume from the last checkpoint with a lower learning rate; the step's samples are in the log.",
            )
        self.state.skipped_steps += 1
        self.parts.sink.note(f"{what}; the weights were left alone ({self.state.skipped_steps} steps so far)")
        if self._bad_steps >= MAX_BAD_STEPS:
            raise TrainingError(
                f"{self._bad_steps} steps in a row had no finite gradient, the last at {what}",
                where=str(self.parts.store.root.parent),
                hint="Lower the learning rate or look at the samples named in the log, then resume.",
            )

    def _record(self, outcome: StepOutcome, plan: StepPlan, seconds: float, waited: float) -> StepRecord:
        state, parts = self.state, self.parts
        rates = parts.schedule.rates(state.step - 1)
        memory = None
        if parts.engine.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**30
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
            skipped_steps=state.skipped_steps,
        )

    def _after_step(self, outcome: StepOutcome) -> None:
        schedule, state = self.parts.schedule, self.state
        is_stage_end = schedule.is_stage_end(state.step)
        if is_stage_end and self._passed_over:
            self.parts.sink.note(
                f"{self._passed_over} samples were passed over: they have none of the stage's modality sets"
            )
        if is_stage_end or outcome.is_due or outcome.stop_signal:
            self._save()
        is_leaving = bool(outcome.stop_signal) and state.step < schedule.total_steps
        if is_stage_end and not is_leaving:
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

    def _is_save_due(self) -> bool:
        """Whether a checkpoint is due after the step under way; rank 0's answer counts, since clocks differ."""
        every = self.parts.config.checkpoint.every
        if not self.parts.place.is_main:
            return False
        if every.unit == "minutes":
            return time.monotonic() - self._saved_at >= every.value * 60
        steps = max(1, every.in_steps(self.parts.schedule.plan.steps_per_epoch))
        return (self.state.step + 1) % steps == 0

    def _save(self) -> None:
        parts, state = self.parts, self.state
        if self._saved_step == state.step:
            return
        started = time.perf_counter()
        path = parts.store.save(
            state.step, state.to_json(), config_text=parts.config_text, write_engine=parts.engine.save,
            expected_bytes=parts.engine.saved_bytes(),
        )  # fmt: skip
        self._saved_step, self._saved_at = state.step, time.monotonic()
        seconds = time.perf_counter() - started
        parts.leave.note_save(seconds)
        parts.sink.note(f"checkpoint {path.name} saved in {seconds:.1f} s")
