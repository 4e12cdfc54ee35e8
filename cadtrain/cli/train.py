"""`cadtrain train`: one rank of a run; alone in a shell, the whole run in one process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cadtrain.cli import bench_options as measuring
from cadtrain.cli.options import (
    ConfigArgument,
    InitFromOption,
    JsonOption,
    ResumeOption,
    RunDirOption,
    SetOption,
    StartStageOption,
    TimeLimitOption,
    as_overrides,
)

if TYPE_CHECKING:
    from cadtrain.config.measure import MeasureRequest
    from cadtrain.config.sections import RunConfig
    from cadtrain.heartbeat import Heartbeat


def train(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    time_limit: TimeLimitOption = None,
    init_from: InitFromOption = None,
    start_stage: StartStageOption = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every effective value and where it came from; train nothing.")
    ] = False,
    bench: measuring.Bench = None,
    bench_warmup: measuring.BenchWarmup = 3,
    bench_stage: measuring.BenchStage = None,
    bench_tokens: measuring.BenchTokens = None,
    profile: measuring.Profile = False,
    profile_steps: measuring.ProfileSteps = 3,
    profile_ranks: measuring.ProfileRanksOption = measuring.ProfileRanks.FIRST,
    as_json: JsonOption = False,
) -> None:
    """Train in this process. Under `cadtrain launch` this is what every rank runs.

    Examples:

      cadtrain train

      cadtrain train configs/demo.yaml --set curriculum.0.duration=20 --run-dir runs/short

      cadtrain train --run-dir runs/short --resume

      cadtrain train configs/demo.yaml --bench 10 --json
    """
    from cadtrain.distributed import Place
    from cadtrain.errors import UsageError

    settings = as_overrides(overrides, time_limit=time_limit, init_from=init_from, start_stage=start_stage)
    if print_config:
        from cadtrain.config.load import load_run_config
        from cadtrain.config.origins import annotated_yaml
        from cadtrain.ui.console import print_text

        print_text(annotated_yaml(load_run_config(config, settings)))
        return
    request = measuring.measure_request(
        bench, bench_warmup, bench_stage, bench_tokens, profile, profile_steps, profile_ranks, resume=resume, as_json=as_json
    )
    place = Place.from_environment()
    if "CADTRAIN_LAUNCH_ID" in os.environ:
        _train_rank(run_dir, place.rank, resume=resume, request=request)
    elif place.world_size > 1:
        raise UsageError(
            "WORLD_SIZE is more than 1, but this is no rank of `cadtrain launch`.",
            hint="Start several ranks with `cadtrain launch --gpus N`.",
        )
    elif request is None:
        _train_alone(config, settings, run_dir, resume=resume)
    else:
        settings = (*settings, *request.overrides())
        with measuring.run_dir_for(run_dir, request) as (folder, stays):
            with _stdout_kept_clean() if as_json else contextlib.nullcontext():
                found = _train_alone(config, settings, folder, resume=False, request=request)
            measuring.show_results(found, request, stays=stays, as_json=as_json)


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """What libraries in this process print goes to stderr, below Python, too: NCCL tells its version on stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _train_rank(run_dir: Path | None, rank: int, *, resume: bool, request: MeasureRequest | None) -> None:
    """A rank that `launch` started: the run folder holds the configuration, and the launcher outlives the rank."""
    from cadtrain.config.load import load_run_config
    from cadtrain.errors import UsageError
    from cadtrain.heartbeat import Heartbeat, heartbeat_path
    from cadtrain.train.failure import write_failure
    from cadtrain.train.interrupt import die_with_parent
    from cadtrain.train.traces import keep_traces

    if run_dir is None:
        raise UsageError("a rank of a launch needs --run-dir.", hint="Start runs with `cadtrain launch`.")
    die_with_parent()
    keep_traces(run_dir, rank)
    heartbeat = Heartbeat(heartbeat_path(run_dir / "logs", rank), rank)
    heartbeat.phase("importing libraries")
    try:
        config = load_run_config(str(run_dir / "config.yaml")).config
        import cadtrain.train.run  # noqa: F401, a library that cannot be loaded must leave a record, too
    except BaseException as error:
        write_failure(run_dir, rank, error)
        _end_rank(error)
    _run(config, run_dir, rank, resume=resume, is_launched=True, heartbeat=heartbeat, request=request)


def _train_alone(
    config: str | None, overrides: tuple[str, ...], run_dir: Path | None, *, resume: bool,
    request: MeasureRequest | None = None,
) -> Path:  # fmt: skip
    """One process that plans for itself, as `launch --gpus 1` would; the run folder."""
    from cadtrain.cli.launch import make_demo_parts
    from cadtrain.config.load import to_yaml
    from cadtrain.launch.environment import environment_record
    from cadtrain.launch.folder import hold, prepare_run_dir
    from cadtrain.launch.planning import LaunchRequest, plan_launch

    plan = plan_launch(LaunchRequest(config=config, gpus=1, overrides=overrides, run_dir=run_dir, resume=resume))
    if request is not None:
        request.stage_index(plan.config)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    with hold(plan.run_dir):
        os.environ.update(plan.environment)
        if request is None or request.rows is None:
            make_demo_parts(plan.config)
        prepare_run_dir(
            plan.run_dir, to_yaml(plan.config), environment_record(plan.devices, plan.argv, plan.environment)
        )
        _run(plan.config, plan.run_dir, 0, resume=resume, is_launched=False, request=request)
    return plan.run_dir


def _run(
    config: RunConfig, run_dir: Path, rank: int, *, resume: bool, is_launched: bool, heartbeat: Heartbeat | None = None,
    request: MeasureRequest | None = None,
) -> None:  # fmt: skip
    """Run or measure, and leave a record where it fails."""
    import logging

    from cadtrain.errors import TrainingError
    from cadtrain.logs import start_logging
    from cadtrain.train.failure import write_failure
    from cadtrain.train.run import run
    from cadtrain.ui.training import TrainingConsole

    log_file = start_logging(run_dir, rank)
    console = TrainingConsole() if rank == 0 else None

    recorded: list[BaseException] = []

    def record(error: BaseException) -> None:
        recorded.append(error)
        write_failure(run_dir, rank, error)
        logging.getLogger(__name__).info("this rank ends here", exc_info=error)

    try:
        if request is None:
            run(config, run_dir, resume=resume, console=console, on_failure=record, heartbeat=heartbeat)
        else:
            from cadtrain.train.bench import measure

            measure(config, run_dir, request, peak_of=measuring.peak_flops, on_failure=record, heartbeat=heartbeat)
    except BaseException as error:
        if not recorded:
            record(error)
        if is_launched:
            _end_rank(error)
        if isinstance(error, (RuntimeError, OSError, MemoryError)):
            raise TrainingError(
                f"{type(error).__name__}: {error}", where=f"rank {rank}", hint=f"The traceback is in {log_file}."
            ) from error
        raise


def _end_rank(error: BaseException) -> NoReturn:
    """End a launched rank at once; the launcher shows the first failing rank's record, and other words would bury it.

    Without the interpreter's clean-up: that would wait for peers which may be waiting for this rank.
    """
    import logging
    import sys

    from cadtrain.errors import CadtrainError

    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, CadtrainError) else 4)
