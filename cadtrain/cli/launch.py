"""`cadtrain launch`: start a run on all GPUs and look after it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from cadtrain.cli import bench_options as measuring
from cadtrain.cli import launch_options as options
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
    from cadtrain.launch.hang import HangLimit
    from cadtrain.launch.planning import LaunchPlan, LaunchRequest
    from cadtrain.launch.restart import RestartPolicy
    from cadtrain.launch.supervise import LaunchOutcome


def launch(
    config: ConfigArgument = None,
    gpus: options.Gpus = None,
    zero: options.Zero = None,
    offload: options.Offload = False,
    gpu_memory: options.GpuMemory = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    time_limit: TimeLimitOption = None,
    init_from: InitFromOption = None,
    start_stage: StartStageOption = None,
    max_restarts: options.MaxRestarts = 0,
    hang_timeout: options.HangTimeout = None,
    hostfile: options.Hostfile = None,
    nodes: options.Nodes = None,
    ssh_command: options.SshCommand = None,
    port: options.Port = None,
    sbatch: options.Sbatch = False,
    preflight: options.Preflight = True,
    dry_run: options.DryRun = False,
    bench: measuring.Bench = None,
    bench_warmup: measuring.BenchWarmup = 3,
    bench_stage: measuring.BenchStage = None,
    bench_tokens: measuring.BenchTokens = None,
    profile: measuring.Profile = False,
    profile_steps: measuring.ProfileSteps = 3,
    profile_ranks: measuring.ProfileRanksOption = measuring.ProfileRanks.FIRST,
    as_json: JsonOption = False,
) -> None:
    """Plan a run, start its ranks through the DeepSpeed launcher, and look after them.

    Without a GPU the ranks run on the CPU over gloo. Ctrl-C (or SIGTERM) lets them save and leave; a second one kills them.
    Several hosts need the run folder under the same path.

    Examples:

      cadtrain launch --gpus 4 --zero 3

      cadtrain launch configs/demo.yaml --set batch.global_batch_size=32 --dry-run

      cadtrain launch --run-dir runs/demo-20250101-120000 --resume --max-restarts 3

      cadtrain launch my_run.yaml --hostfile hosts --run-dir /shared/my_run

      cadtrain launch my_run.yaml --gpus 8 --bench 20 --json

      cadtrain launch my_run.yaml --nodes 2 --gpus 4 --time-limit 12h --run-dir /shared/my_run --sbatch > job.sh
    """
    from cadtrain.cli.hosts import JobWishes, choose_hosts, print_sbatch
    from cadtrain.launch.devices import parse_gpus
    from cadtrain.launch.planning import LaunchRequest, plan_launch
    from cadtrain.launch.restart import RestartPolicy

    measured = measuring.measure_request(
        bench, bench_warmup, bench_stage, bench_tokens, profile, profile_steps, profile_ranks, resume=resume
    )
    if gpu_memory is not None:
        cap_memory(gpu_memory)
    if sbatch:
        measuring.refuse_with(measured, "--sbatch")
        job = JobWishes(
            run_dir, nodes, gpus, time_limit, hostfile, zero, offload, gpu_memory, max_restarts, hang_timeout
        )
        print_sbatch(config, as_overrides(overrides, init_from=init_from, start_stage=start_stage), job)
        return
    hosts, shell = choose_hosts(hostfile, nodes, gpus, ssh_command)
    settings = as_overrides(overrides, time_limit=time_limit, init_from=init_from, start_stage=start_stage)
    request = LaunchRequest(
        config=config, gpus=None if hosts else parse_gpus(gpus), zero=zero.value if zero else None, offload=offload,
        overrides=settings, run_dir=run_dir, resume=resume, hosts=hosts, shell=shell, port=port,
    )  # fmt: skip
    hang = hang_limit(hang_timeout)
    if measured is not None:
        _measure(request, measured, hang, preflight=preflight, dry_run=dry_run, as_json=as_json)
        return
    plan = plan_launch(request)
    if dry_run:
        _show_dry_run(plan, as_json=as_json)
        return
    outcome = _start(plan, hang, RestartPolicy(max_restarts), preflight=preflight, as_json=as_json)
    if as_json:
        from cadtrain.ui.console import print_json

        print_json(_outcome_json(plan, outcome))
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _measure(
    request: LaunchRequest, measured: MeasureRequest, hang: HangLimit, *, preflight: bool, dry_run: bool, as_json: bool
) -> None:
    """Launch ranks that measure, and show what they found."""
    from cadtrain.launch.planning import WORKER, plan_launch
    from cadtrain.launch.restart import RestartPolicy
    from cadtrain.ui.console import print_json

    with measuring.run_dir_for(request.run_dir, measured) as (folder, stays):
        request = replace(request, run_dir=folder, overrides=(*request.overrides, *measured.overrides()))
        plan = plan_launch(request, worker=(*WORKER, *measured.argv()))
        measured.stage_index(plan.config)
        if dry_run:
            _show_dry_run(plan, as_json=as_json)
            return
        outcome = _start(
            plan, hang, RestartPolicy(0), preflight=preflight, as_json=as_json, is_measured=True,
            needs_parts=measured.rows is None,
        )  # fmt: skip
        if outcome.exit_code:
            if as_json:
                print_json(_outcome_json(plan, outcome))
            raise typer.Exit(outcome.exit_code)
        measuring.show_results(plan.run_dir, measured, stays=stays, as_json=as_json)


def _start(
    plan: LaunchPlan, hang: HangLimit, restarts: RestartPolicy, *, preflight: bool, as_json: bool, is_measured: bool = False,
    needs_parts: bool = True,
) -> LaunchOutcome:  # fmt: skip
    """Start the plan and look after it, with words on stderr."""
    from cadtrain.launch.start import start
    from cadtrain.ui.console import err
    from cadtrain.ui.launch import plan_table

    err().print(plan_table(plan))
    if preflight:
        look_first(plan)
    if needs_parts:
        make_demo_parts(plan.config)
    outcome = start(
        plan, announce=lambda text: err().print(text, markup=False), hang=hang, restarts=restarts,
        stdout=2 if as_json else None,
    )  # fmt: skip
    _show_outcome(plan, outcome, is_measured=is_measured)
    return outcome


def cap_memory(text: str) -> None:
    """Let this launch, its ranks and other hosts see no more than `text` of each GPU; raises `UsageError`."""
    import os

    from cadtrain.errors import UsageError
    from cadtrain.gpu_memory import VARIABLE, memory_cap
    from cadtrain.units import parse_bytes

    try:
        parse_bytes(text, needs_unit=True)
    except ValueError as error:
        raise UsageError(f"{error}.", where="--gpu-memory") from error
    memory_cap({VARIABLE: text})
    os.environ[VARIABLE] = text


def look_first(plan: LaunchPlan) -> None:
    """Show what is wrong with this machine; raises `EnvironmentFault` where the run cannot work on it."""
    from cadtrain.doctor.finding import Verdict
    from cadtrain.doctor.preflight import preflight
    from cadtrain.errors import EnvironmentFault
    from cadtrain.ui.console import err
    from cadtrain.ui.doctor import warnings_view

    report = preflight(plan)
    if report.of(Verdict.WARN):
        err().print(warnings_view(report))
    if failed := report.of(Verdict.FAIL):
        raise EnvironmentFault(
            "\n".join(f"{finding.name}: {finding.evidence}. {finding.remedy}" for finding in failed),
            hint="`cadtrain doctor` looks closer; --no-preflight starts all the same.",
        )


def hang_limit(text: str | None) -> HangLimit:
    """`--hang-timeout`; raises `UsageError`."""
    from cadtrain.errors import UsageError
    from cadtrain.launch.hang import HangLimit
    from cadtrain.units import parse_seconds

    if text is None:
        return HangLimit()
    if text.strip() in ("off", "0"):
        return HangLimit(0.0)
    try:
        return HangLimit(parse_seconds(text))
    except ValueError as error:
        raise UsageError(f"{error}.", where="--hang-timeout", hint="Or `off`.") from error


def make_demo_parts(config: RunConfig) -> None:
    """Make the procedural parts of a run without a dataset now, with a progress bar, rather than in a rank."""
    from cadtrain.data.synth.make import demo_dataset
    from cadtrain.ui.data import preparation_progress

    if config.data.path is None:
        with preparation_progress("procedural parts") as progress:
            demo_dataset(config.data.synth, progress=progress)


def _show_dry_run(plan: LaunchPlan, *, as_json: bool) -> None:
    import shlex

    from cadtrain.ui.console import err, print_json, print_text
    from cadtrain.ui.launch import plan_table

    if as_json:
        print_json(plan.as_json())
        return
    err().print(plan_table(plan))
    for name, value in sorted(plan.environment.items()) if plan.argv else ():
        print_text(f"{name}={shlex.quote(value)} \\")
    for _, command in plan.host_commands():
        print_text(shlex.join(command))
    if plan.argv:
        print_text(shlex.join(plan.argv))


def _show_outcome(plan: LaunchPlan, outcome: LaunchOutcome, *, is_measured: bool) -> None:
    from cadtrain.ui.console import err
    from cadtrain.ui.launch import failure_panel
    from cadtrain.units import format_seconds

    took = format_seconds(outcome.seconds)
    if outcome.failure is not None:
        err().print(
            failure_panel(outcome.failure, outcome.explanation, title=f"failed after {took}{_restarts(outcome)}")
        )
    elif outcome.signal_number is not None and is_measured:
        err().print(f"Stopped after {took}; a measurement saves nothing.", markup=False)
    elif outcome.signal_number is not None:
        hosts = ", on the same hosts" if plan.cluster else ""
        err().print(
            f"Stopped after {took}. To go on{hosts}: cadtrain launch --run-dir {plan.run_dir} --resume", markup=False
        )
    else:
        err().print(f"Done in {took}{_restarts(outcome)}: {plan.run_dir}", markup=False)


def _restarts(outcome: LaunchOutcome) -> str:
    count = outcome.num_restarts
    return "" if not count else f" and {count} restart{'s' if count > 1 else ''}"


def _outcome_json(plan: LaunchPlan, outcome: LaunchOutcome) -> dict[str, Any]:
    failure, explanation = outcome.failure, outcome.explanation
    return {
        "run_dir": str(plan.run_dir),
        "exit_code": outcome.exit_code,
        "seconds": round(outcome.seconds, 3),
        "signal": outcome.signal_number,
        "num_ranks": plan.devices.num_ranks,
        "zero_stage": plan.zero.stage,
        "num_restarts": outcome.num_restarts,
        "failure": None
        if failure is None
        else {
            "rank": failure.rank,
            "type": failure.type,
            "message": failure.message,
            "exit_code": failure.exit_code,
            "kind": explanation.kind if explanation else None,
            "reason": explanation.reason if explanation else "",
            "remedies": list(explanation.remedies) if explanation else [],
            "stood_at": failure.stood_at,
        },
    }
