"""`cadtrain plan`: memory, throughput and time of a run before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadtrain.cli.launch_options import ZeroChoice
from cadtrain.cli.options import ConfigArgument, JsonOption, SetOption

if TYPE_CHECKING:
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
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory, speed and time of a run under each ZeRO stage, with and without offload and recomputation.

    Nothing is started and no GPU is needed. The fastest choice that fits is marked, with what would let the next
    faster one fit. Counts of weights are exact; memory is within a few percent; speed and time are estimates.

    Examples:

      cadtrain plan cad_mllm_qwen3_14b_lora_l40x4 --gpus 4 --gpu L40

      cadtrain plan my_run.yaml --gpus 8 --gpu-memory 80GB --zero 3 --json
    """
    from cadtrain.config.load import load_run_config
    from cadtrain.plan.predict import predict
    from cadtrain.ui.console import out, print_json
    from cadtrain.ui.plan import plan_json, plan_view

    settings = list(overrides or ())
    if zero is not None:
        settings.append(f"zero.stage={zero.value}")
    if offload:
        settings.append("zero.offload_optimizer=true")
    run = load_run_config(config or "demo", settings).config
    count, memory, kind = _devices(gpus, gpu, gpu_memory)
    found = predict(run, count, memory, kind)
    if as_json:
        print_json(plan_json(found))
    else:
        out().print(plan_view(found))


def _devices(gpus: int | None, name: str | None, memory: str | None) -> tuple[int, int, GpuKind | None]:
    """Number of GPUs, bytes of each and their data sheet, from the options or this machine."""
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
        return gpus or 1, size or kind.memory_bytes, kind
    if size is not None:
        return gpus or 1, size, None
    here: list[Any] = [found for found in find_gpus(os.environ) if found.memory_total]
    if not here:
        raise UsageError("no GPU is seen here to plan for.", hint="Add --gpu-memory 48GB, or --gpu with a kind of GPU.")
    return gpus or len(here), min(found.memory_total for found in here), find_gpu(here[0].name)
