"""Measures a run: a few of its optimizer steps, timed, and nothing saved but the report.

Model, engine, data, packs and the step itself are those of training; only the loop around them is this module's, so that
nothing but steps is in the time: no validation, no checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from cadtrain.checkpoint.layout import write_atomically
from cadtrain.config.load import to_yaml
from cadtrain.config.measure import PROFILE_NAME, REPORT_NAME, SUMMARY_NAME, MeasureRequest
from cadtrain.config.recompute import Recompute
from cadtrain.config.sections import Component, RunConfig
from cadtrain.data.collate import Pack, made_for
from cadtrain.data.feed import PackOrder, StepPlan
from cadtrain.data.loader import ReadAhead
from cadtrain.distributed import Place, all_reduce, barrier
from cadtrain.errors import Interrupted, UsageError
from cadtrain.heartbeat import Heartbeat
from cadtrain.metrics.bench import BenchReport, Communication, MeasuredStep
from cadtrain.metrics.timeline import STEP, read_trace, step_profile
from cadtrain.model.cad_mllm import CadMllm
from cadtrain.model.census import take_census
from cadtrain.model.components import trainable_components
from cadtrain.model.flops import ModelFlops, PackContent, count_flops
from cadtrain.train.profiling import RangedEngine, communication_of, kept_profile, part_range, ranged, watch_parts
from cadtrain.train.run import Assembled, Start, assemble, in_process_group, package_versions
from cadtrain.train.step import StepOutcome, Wishes, step_seed, train_step
from cadtrain.train.watched import WatchedEngine, tell_modules
from cadtrain.train.workload import DataWorkload, TokenWorkload, Workload

WATCHED_STEPS = 2
"""Steps behind the timed ones in which the profiler looks at collectives."""
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "reduce", "broadcast", "all-to-all", "send-recv", "other")


def measure(
    config: RunConfig,
    run_dir: Path,
    request: MeasureRequest,
    *,
    peak_of: Callable[[str], float | None],
    on_failure: Callable[[BaseException], None] = lambda error: None,
    heartbeat: Heartbeat | None = None,
) -> None:
    """Run what `request` asks for and leave `bench.json` (and `profile/`) in `run_dir`. Every rank of the run calls it.

    `peak_of` gives the operations a second of a device by its name, where they are known. Raises as `run` does, and
    `Interrupted` without anything left where a signal asks to stop.
    """
    if request.rows is not None:
        # One pack a rank and step, whatever the configuration says.
        size = request.rows.sequences * Place.from_environment().world_size
        config = config.model_copy(update={"batch": config.batch.model_copy(update={"global_batch_size": size})})

    def work(start: Start) -> None:
        _measure(config, run_dir, request, start, peak_of)

    in_process_group(
        config, work, on_failure=on_failure, heartbeat=heartbeat or Heartbeat(None), needs_data=request.rows is None
    )


def _measure(
    config: RunConfig, run_dir: Path, request: MeasureRequest, start: Start, peak_of: Callable[[str], float | None]
) -> None:
    made = assemble(config, start)
    tell_modules(made.model, start.heartbeat)
    workload = _workload(config, request, made)
    with Steps(config, request, made, workload, start) as steps:
        steps.reset_peak_memory()
        warmup = tuple(steps.take().seconds for _ in range(request.warmup))
        if request.steps:
            timed = [steps.take() for _ in range(request.steps)]
            memory = steps.peak_memory_gib()
            communication = _communication(steps, start)
            start.heartbeat.phase("reporting")
            rows = _over_ranks([[step.seconds, step.data_wait_seconds] for step in timed], start)
            if start.place.is_main:
                measured = tuple(timed), rows, warmup, memory, communication
                report = _report(config, request, made, workload, steps, measured, peak_of)
                write_atomically(run_dir / REPORT_NAME, _json_text(report.to_json()))
        if request.profile_steps:
            _profile(request, made.model, steps, run_dir / PROFILE_NAME, start)
    barrier()
    made.engine.close()


def _communication(steps: Steps, start: Start) -> tuple[Communication | None, str]:
    """When collectives ran in a few more steps, or why that is not known. Collective."""
    if start.place.world_size == 1:
        return None, "one process has nobody to talk to"
    taken, times = communication_of(steps.take_anew, steps=WATCHED_STEPS)
    start.heartbeat.phase("reading a trace")
    seconds = sum(step.seconds for step in taken)
    own = [times.total, times.exposed, *(times.kinds.get(kind, 0.0) for kind in COLLECTIVES)]
    rows = _over_ranks([[float(times.is_device), *(value * 1e-6 / seconds for value in own)]], start)[:, 0]
    if start.device.type == "cuda" and not rows[:, 0].all():
        return None, "the profiler saw no kernels on some rank, or its trace cannot be read: does the container lack CUPTI?"
    shares = rows[:, 1:].mean(dim=0).tolist()
    kinds = {kind: share for kind, share in zip(COLLECTIVES, shares[2:], strict=True) if share}
    return Communication(WATCHED_STEPS, seconds / WATCHED_STEPS, shares[0], shares[1], kinds), ""


def _profile(request: MeasureRequest, model: CadMllm, steps: Steps, folder: Path, start: Start) -> None:
    """Take some more steps, of which this rank may keep a trace, and say where they went. Collective."""
    place, number = start.place, request.profile_steps
    if place.is_main or request.profiles_all_ranks:
        trace = folder / f"rank_{place.rank:02d}.json.gz"
        with steps.watched(model):
            kept_profile(steps.take_anew, trace, steps=number)
        start.heartbeat.phase("reading a trace")
        found = step_profile(read_trace(trace)).to_json()
        write_atomically(folder / f"{place.rank}.part", json.dumps(found))
    else:
        for _ in range(1 + number):
            steps.take()
    barrier()
    if place.is_main:
        parts = sorted(folder.glob("*.part"), key=lambda path: int(path.stem))
        summary = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in parts}
        write_atomically(folder / SUMMARY_NAME, json.dumps({"ranks": summary}, indent=2) + "\n")
        for path in parts:
            path.unlink()


def _workload(config: RunConfig, request: MeasureRequest, made: Assembled) -> Workload:
    if request.rows is not None:
        return TokenWorkload(request.rows, vocab_size=int(made.shapes.language.config.vocab_size), seed=config.seed)
    assert made.feeds is not None
    return DataWorkload(made.feeds.train)


@dataclass(frozen=True, slots=True)
class TakenStep:
    """One optimizer step as this rank saw it."""

    plan: StepPlan
    outcome: StepOutcome
    seconds: float
    data_wait_seconds: float


Measured = tuple[
    tuple[TakenStep, ...], torch.Tensor, tuple[float, ...], tuple[float, float] | None, tuple[Communication | None, str]
]
"""Timed steps; float64[ranks, steps, 2] with seconds and data wait; the warm-up's seconds; memory; communication, or why there is none."""


class Steps:
    """Optimizer steps of one stage, one after another. Every method is collective."""

    def __init__(
        self, config: RunConfig, request: MeasureRequest, made: Assembled, workload: Workload, start: Start
    ) -> None:
        self._config, self._workload, self._place = config, workload, start.place
        self._schedule, self._stop = made.schedule, start.stop
        self.engine = WatchedEngine(made.engine, start.heartbeat)
        number = request.stage_index(config)
        self.stage, self._span = config.curriculum[number], made.plan.stages[number]
        used = [name for name in trainable_components(made.shapes) if request.rows is None or name == "language"]
        self.learning = [component for component in used if made.schedule.learns(number, component)]
        self.recompute = made.recompute[number]
        """Decoder layers that are recomputed."""
        self._step = self._span.first_step
        self._plans: list[StepPlan] = []
        self._packs = ReadAhead(made_for(made.engine.device, workload.make_pack), self._orders(), num_workers=config.data.num_workers)
        self._ended_at = 0.0
        self._ranges: ExitStack | None = None

    def __enter__(self) -> Steps:
        self.engine.set_learning(self.learning)
        self.engine.set_recompute(self.recompute)
        self._synchronize()
        self._ended_at = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._packs.close()

    def take(self) -> TakenStep:
        """The next step; its time runs from the end of the one before to when the device has nothing left to do.

        Raises `Interrupted` where a signal asked to stop.
        """
        waited = self._packs.waited_seconds
        with part_range(STEP) if self._ranges is not None else nullcontext():
            outcome = self._train_step()
            self._synchronize()
        began, self._ended_at = self._ended_at, time.perf_counter()
        self._step += 1
        if outcome.stop_signal:
            raise Interrupted(f"stopped by signal {outcome.stop_signal}", signal_number=outcome.stop_signal)
        return TakenStep(
            self._plans.pop(0), outcome, self._ended_at - began, self._packs.waited_seconds - waited
        )

    def take_anew(self) -> TakenStep:
        """As `take`, but its time runs from now: a profiler works between steps."""
        self._ended_at = time.perf_counter()
        return self.take()

    def _train_step(self) -> StepOutcome:
        self.engine.at_step(self._step)
        self.engine.set_rates(self._schedule.rates(min(self._step, self._span.last_step - 1)))
        if not self._plans:
            self._packs.prime()
        engine: Any = self.engine
        packs: Iterator[Pack] = self._packs
        if self._ranges is not None:
            engine, packs = RangedEngine(engine, self._ranges), ranged(packs)
        seed = step_seed(self._config.seed, self._step, self._place.rank)
        return train_step(engine, self._plans[0], packs, seed=seed, wishes=lambda: Wishes(self._stop.signal_number))

    @contextmanager
    def watched(self, model: CadMllm) -> Iterator[None]:
        """While open, steps say in a profiler's trace which part of `model` is at work."""
        with watch_parts(model) as self._ranges:
            yield
        self._ranges = None

    def reset_peak_memory(self) -> None:
        """Forget what building the engine needed."""
        if self.engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_memory_gib(self) -> tuple[float, float] | None:
        """What was allocated and what was reserved at most, of the rank that needed most; None on the CPU. Collective."""
        if self.engine.device.type != "cuda":
            return None
        peaks = [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30]
        most = all_reduce(torch.tensor(peaks, dtype=torch.float64, device=self.engine.device), op="max").tolist()
        return float(most[0]), float(most[1])

    def _orders(self) -> Iterator[PackOrder]:
        """This rank's packs, without end: the stage goes on behind its last step, as long as steps are asked for."""
        step, probabilities = self._span.first_step, self.stage.probabilities()
        while True:
            plan = self._workload.plan_step(step, probabilities, world_size=self._place.world_size)
            self._plans.append(plan)
            yield from plan.for_rank(self._place.rank)
            step += 1

    def _synchronize(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)


def _over_ranks(rows: list[list[float]], start: Start) -> torch.Tensor:
    """float64[ranks, steps, columns]: this rank's `rows` beside all others'. Collective."""
    every = torch.zeros(start.place.world_size, len(rows), len(rows[0]), dtype=torch.float64, device=start.device)
    every[start.place.rank] = torch.tensor(rows, dtype=torch.float64)
    return all_reduce(every).cpu()


def _report(
    config: RunConfig, request: MeasureRequest, made: Assembled, workload: Workload, steps: Steps, measured: Measured,
    peak_of: Callable[[str], float | None],
) -> BenchReport:  # fmt: skip
    timed, rows, warmup, memory, communication = measured
    flops, no_flops = _flops(config, made, steps.learning)
    device = steps.engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return BenchReport(
        facts=_facts(config, request, made, workload, steps, name),
        num_ranks=made.plan.world_size,
        steps=tuple(_measured(step, workload, flops, rows[:, number]) for number, step in enumerate(timed)),
        warmup_seconds=warmup,
        micro_batch_tokens=workload.micro_batch_tokens,
        peak_flops=peak_of(name) if made.precision == "bf16" else None,
        no_flops=no_flops,
        memory_allocated_gib=memory[0] if memory else None,
        memory_reserved_gib=memory[1] if memory else None,
        losses=(timed[0].outcome.loss, timed[-1].outcome.loss),
        communication=communication[0],
        no_communication=communication[1],
    )


def _flops(config: RunConfig, made: Assembled, learning: list[Component]) -> tuple[ModelFlops | None, str]:
    try:
        stored = config.data.features is not None
        return count_flops(made.shapes, learning, num_points=config.data.num_points, stored=stored), ""
    except UsageError as error:
        return None, str(error)


def _measured(step: TakenStep, workload: Workload, flops: ModelFlops | None, rows: torch.Tensor) -> MeasuredStep:
    """`rows` float64[ranks, 2]: seconds and data wait of every rank."""
    contents = [[workload.content(order) for order in micro] for micro in step.plan.packs]
    total = sum((content for micro in contents for content in micro), PackContent())
    return MeasuredStep(
        seconds=float(rows[:, 0].max()),
        samples=step.plan.num_samples,
        tokens=total.tokens,
        target_tokens=total.targets,
        rank_tokens=tuple(tuple(content.tokens for content in micro) for micro in contents),
        flops=flops.of(total).total if flops else 0.0,
        data_wait_seconds=tuple(rows[:, 1].tolist()),
    )


def _facts(
    config: RunConfig, request: MeasureRequest, made: Assembled, workload: Workload, steps: Steps, device_name: str
) -> dict[str, Any]:
    text = to_yaml(config)
    lora = config.model.language.lora
    census = take_census(made.shapes)
    return {
        "run": config.name,
        "workload": {
            "kind": "data" if request.rows is None else "tokens",
            "text": workload.describe(),
            "rows": None if request.rows is None else str(request.rows),
            "stage": steps.stage.name,
            "modalities": dict(steps.stage.probabilities()) if request.rows is None else {"text": 1.0},
            "learning": list(steps.learning),
        },
        "hardware": {"device": device_name, **_device_facts(steps.engine.device)},
        "versions": {**package_versions(), **_cuda_versions()},
        "config_digest": blake2b(text.encode(), digest_size=16).hexdigest(),
        "precision": made.precision,
        "zero_stage": config.zero.stage,
        "offload_optimizer": config.zero.offload_optimizer,
        "offload_parameters": config.zero.offload_parameters,
        "recompute": Recompute((steps.recompute,), census.num_layers).short(),
        "lora_rank": None if lora is None else lora.rank,
        "parameters": census.total,
        "micro_batch_tokens": workload.micro_batch_tokens,
        "global_batch_size": config.batch.global_batch_size,
    }


def _device_facts(device: torch.device) -> Mapping[str, Any]:
    if device.type != "cuda":
        return {"memory_gib": None, "threads": torch.get_num_threads()}
    return {"memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30}


def _cuda_versions() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    return {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def _json_text(report: dict[str, Any]) -> str:
    losses = report["loss"]
    report = {**report, "loss": {key: loss if math.isfinite(loss) else None for key, loss in losses.items()}}
    return json.dumps(report, indent=2, allow_nan=False) + "\n"
