"""`cadtrain plan`: memory, throughput and time of a run before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadtrain.cli.launch_options import ZeroChoice
from cadtrain.cli.options import ConfigArgument, JsonOption, SetOption

if TYPE_CHECKING:
    from cadtrain.plan.calibration import CalibrationResult
    from cadtrain.plan.predict import RunPlan
    from cadtrain.plan.rates import GpuKind


def plan(
    config: ConfigArgument = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="Number of GPUs. Default: every visible one, or 1.", show_default=False),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help="Kind of GPU, e.g. H100 or L40. Default: this machine's.", show_default=False
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory", metavar="SIZE", help="Memory of one GPU, e.g. 48GB or 44.5GiB.", show_default=False
        ),
    ] = None,
    zero: Annotated[
        ZeroChoice | None, typer.Option("--zero", help="Show this ZeRO stage only; auto shows all.")
    ] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Show only choices that use host memory.")] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Measure two steps of the largest pack on this machine's GPUs first, and correct plans by them."
        ),
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory, speed and time of a run under each ZeRO stage, with and without offload and recomputation.

    Without --calibrate nothing is started and no GPU is needed. The fastest choice that fits is marked, with what would
    let the next faster one fit. Counts of weights are exact; memory is within a few percent; speed and time are estimates.

    Examples:

      cadtrain plan cad_mllm_qwen3_14b_lora_l40x4 --gpus 4 --gpu L40

      cadtrain plan my_run.yaml --gpus 8 --gpu-memory 80GB --zero 3 --json

      cadtrain plan my_run.yaml --gpus 2 --zero 2 --calibrate
    """
    from cadtrain.config.load import load_run_config
    from cadtrain.errors import UsageError
    from cadtrain.plan.predict import predict

    if calibrate and (gpu or gpu_memory):
        raise UsageError(
            "--calibrate measures this machine's GPUs, so no other can be named.", where="--gpu" if gpu else "--gpu-memory",
            hint="Leave it away.",
        )  # fmt: skip
    measured = None
    if calibrate:
        from cadtrain.cli.calibrate import calibrate_plan

        measured = calibrate_plan(config, gpus, zero.value if zero else None, overrides, offload=offload)
        if not measured.is_kept:
            _show(measured, None, as_json=as_json)
            return
    settings = list(overrides or ())
    if zero is not None:
        settings.append(f"zero.stage={zero.value}")
    if offload:
        settings.append("zero.offload_optimizer=true")
    run = load_run_config(config or "demo", settings).config
    count, memory, kind, device = _devices(gpus, gpu, gpu_memory)
    _show(measured, predict(run, count, memory, kind, device=device), as_json=as_json)


def _show(measured: CalibrationResult | None, plan: RunPlan | None, *, as_json: bool) -> None:
    """What was measured, if something was, and the plan, if there is one."""
    from cadtrain.ui.console import out, print_json
    from cadtrain.ui.plan import calibration_json, calibration_view, plan_json, plan_view

    if as_json:
        found = {} if plan is None else plan_json(plan)
        print_json(found if measured is None else {**found, "measured_step": calibration_json(measured)})
        return
    if measured is not None:
        out().print(calibration_view(measured))
    if plan is not None:
        out().print(plan_view(plan))


def _devices(gpus: int | None, name: str | None, memory: str | None) -> tuple[int, int, GpuKind | None, str]:
    """Number of GPUs, bytes of each, their data sheet and their name, from the options or this machine."""
    import os

    from cadtrain.errors import UsageError
    from cadtrain.launch.devices import find_gpus
    from cadtrain.plan.rates import find_gpu, gpu_named
    from cadtrain.units import parse_bytes

    size = None
    if memory is not None:
        try:
            size = parse_bytes(memory, needs_unit=True)
        except ValueError as error:
            raise UsageError(f"{error}.", where="--gpu-memory") from error
    kind = None if name is None else gpu_named(name)
    if kind is not None:
        return gpus or 1, size or kind.memory_bytes, kind, kind.name
    if size is not None:
        return gpus or 1, size, None, ""
    here: list[Any] = [found for found in find_gpus(os.environ) if found.memory_total]
    if not here:
        raise UsageError("no GPU is seen here to plan for.", hint="Add --gpu-memory 48GB, or --gpu with a kind of GPU.")
    memory_bytes = min(found.memory_total for found in here)
    return gpus or len(here), memory_bytes, find_gpu(here[0].name), here[0].name
