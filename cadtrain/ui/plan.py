"""How a prediction looks: its choices in a table, where the memory of the marked one goes, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cadtrain.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from cadtrain.plan.calibration import CalibrationResult
    from cadtrain.plan.memory import RankMemory
    from cadtrain.plan.predict import Option, RunPlan

_GIB = 2**30
_USES = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations, at their peak",
    "buckets": "gradient buckets",
    "gathered": "gathered weights",
    "reserve": "allocator's reserve",
    "context": "CUDA and NCCL",
}


def plan_view(plan: RunPlan) -> RenderableType:
    """The whole answer for a person; fits into 80 columns."""
    parts: list[RenderableType] = [_head(plan), Text(), _weights(plan), Text(), _choices(plan), Text()]
    shown = plan.best or min(plan.options, key=lambda option: option.memory.total)
    parts += [_breakdown(plan, shown), Text(), *_remarks(plan)]
    return Group(*parts)


def _head(plan: RunPlan) -> Text:
    name = f" {plan.gpu.name}" if plan.has_rates else ""
    return Text.assemble(
        (f"{plan.num_ranks} ×{name or ' GPU'}", "bold"),
        f" with {format_bytes(plan.memory_bytes)} each, packs of {plan.micro_batch_tokens:,} tokens",
    )


def _plain() -> Table:
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))


def _weights(plan: RunPlan) -> Table:
    census, table = plan.model.census, _plain()
    table.add_column("weights")
    for column in ("trainable", "frozen"):
        table.add_column(column, justify="right")
    for component, row in census.components.items():
        table.add_row(component.replace("_", " "), f"{row.trainable:,}", f"{row.frozen:,}")
    table.add_row("all", f"{census.trainable:,}", f"{census.total - census.trainable:,}", style="bold")
    notes = [("of these LoRA", census.lora), ("tied, counted once", census.tied)]
    for name, count in notes:
        if count:
            table.add_row(name, f"{count:,}", "", style="dim")
    return table


def _choices(plan: RunPlan) -> Table:
    table = _plain()
    for column in ("ZeRO", "on host", "recompute"):
        table.add_column(column, no_wrap=column != "recompute")  # of many stages
    columns = ["GPU GiB", "host"] + (["tokens/s", "time"] if plan.has_rates else [])
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for option in plan.options:
        choice = option.choice
        held = "+ weights" if choice.offload_parameters else "optimizer" if choice.offload_optimizer else ""
        mark = Text("fastest", style="bold green") if option is plan.best else Text("" if option.fits else "too large")
        rates = [f"{option.tokens_per_second:,.0f}", _time(option)] if plan.has_rates else []
        table.add_row(
            str(choice.stage), held, "" if choice.recompute.setting() == "none" else choice.recompute.short(), f"{option.memory.total / _GIB:.1f}", f"{sum(option.host.values()) / _GIB:.0f}",
            *rates, mark, style="bold" if option is plan.best else "" if option.fits else "dim",
        )  # fmt: skip
    return table


def _time(option: Option) -> str:
    return "?" if option.seconds is None else format_seconds(option.seconds)


def _breakdown(plan: RunPlan, option: Option) -> Table:
    table = _plain()
    table.add_column(f"one GPU, {option.choice.describe()}")
    table.add_column("GiB", justify="right")
    values = option.memory.as_dict()
    for name, text in _USES.items():
        if values[name]:
            if name in ("reserve", "context"):
                text += " (measured)" if plan.corrections.newest else " (estimate)"
            table.add_row(text, f"{values[name] / _GIB:.2f}")
        if name == "activations" and values[name]:
            parts = plan.model.peak(option.choice.recompute)
            for part, count in sorted(parts.items(), key=lambda item: -item[1]):
                if count >= 0.01 * values[name]:
                    table.add_row(f"  {part}", f"{count / _GIB:.2f}", style="dim")
    table.add_row("all", f"{values['total'] / _GIB:.2f}", style="bold")
    return table


def _remarks(plan: RunPlan) -> list[Text]:
    frozen = f", frozen weights ({format_bytes(plan.frozen_bytes)}) once" if plan.frozen_bytes else ""
    found = [Text(f"Checkpoints take up to {format_bytes(plan.disk_bytes)}: {plan.num_kept} at once{frozen}.")]
    if newest := plan.corrections.newest:
        stages = ", ".join(sorted(plan.corrections.records))
        text = f"Reserve, CUDA and NCCL are as measured on {newest.when[:10]}; the rest is corrected for {stages}."
        found.append(Text(text))
    if plan.best is None:
        found.append(Text("No choice fits.", style="bold yellow"))
    elif isinstance(plan.best.choice.recompute.setting(), tuple):
        layers = zip(plan.stages, plan.best.choice.recompute.layers, strict=True)
        each = ", ".join(f"{name} {count}" for name, count in layers)
        found.append(Text(f"Recomputed layers of {plan.model.num_layers}, by stage: {each}."))
    if plan.advice:
        found.append(Text(plan.advice))
    if not plan.has_rates:
        found.append(Text("For speed and time name the GPU with --gpu."))
    elif plan.gpu.is_measured:
        found.append(Text("Speed, a GPU, and time are estimates, from measurements on this kind of GPU.", style="dim"))
    else:
        found.append(Text("Speed, a GPU, and time are estimates, scaled by data sheets from H200.", style="dim"))
    return found


def calibration_view(result: CalibrationResult) -> RenderableType:
    """What was predicted for the measured pack, what was measured, and what plans will say from now on; GiB."""
    table = _plain()
    table.add_column(f"{result.choice.describe()}, a full pack of stage {result.stage}")
    for column in ("predicted", "measured", "corrected"):
        table.add_column(column, justify="right")
    for name, values in _calibration_rows(result).items():
        table.add_row(name, *(f"{value / _GIB:.2f}" for value in values))
    found = result.calibration
    took = f"Two steps of packs of {found.tokens:,} tokens, on {found.num_ranks} rank{'s' * (found.num_ranks > 1)}"
    kept = f"kept in {result.path}" if result.path else "tensors were counted on the CPU; nothing is kept of that"
    return Group(table, Text(), Text(f"{took}, in {format_seconds(result.seconds)}; {kept}."), Text())


def _calibration_rows(result: CalibrationResult) -> dict[str, tuple[int, int, int]]:
    """(predicted, measured, corrected) bytes by what they are."""
    predicted, measured, corrected = result.predicted, result.measured, result.corrected

    def states(memory: RankMemory) -> int:
        return memory.weights + memory.gradients + memory.optimizer

    rows = {
        "weights, gradients, optimizer": (states(predicted), measured.held, states(corrected)),
        "at most in a step beside them": (
            predicted.allocated - states(predicted), measured.allocated - measured.held, corrected.allocated - states(corrected)
        ),
        "allocated": (predicted.allocated, measured.allocated, corrected.allocated),
    }  # fmt: skip
    if result.is_kept:
        rows["allocator's reserve"] = (predicted.reserve, measured.reserved - measured.allocated, corrected.reserve)
        rows["reserved"] = tuple(sum(pair) for pair in zip(rows["allocated"], rows["allocator's reserve"], strict=True))  # type: ignore[assignment]
        rows["CUDA and NCCL"] = (predicted.context, measured.context, corrected.context)
        rows["all"] = (predicted.total, measured.reserved + measured.context, corrected.total)
    return rows


def calibration_json(result: CalibrationResult) -> dict[str, Any]:
    """The same for a script, in bytes."""
    found = result.calibration
    names = ("predicted", "measured", "corrected")
    return {
        "key": found.key,
        "choice": result.choice.describe(),
        "stage": result.stage,
        "tokens": found.tokens,
        "num_ranks": found.num_ranks,
        "bytes": {
            name: dict(zip(names, values, strict=True)) for name, values in _calibration_rows(result).items()
        },
        "factors": {"states": found.states, "passes": found.passes, "reserve": found.reserve},
        "kept_in": None if result.path is None else str(result.path),
        "seconds": round(result.seconds, 1),
    }


def plan_json(plan: RunPlan) -> dict[str, Any]:
    """The whole answer for a script; sizes in bytes, times in seconds."""
    census = plan.model.census
    return {
        "num_gpus": plan.num_ranks,
        "gpu": plan.gpu.name if plan.has_rates else None,
        "gpu_memory_bytes": plan.memory_bytes,
        "weights": {
            "trainable": census.trainable,
            "frozen": census.total - census.trainable,
            "lora": census.lora,
            "tied": census.tied,
            "components": {
                name: {"trainable": row.trainable, "frozen": row.frozen} for name, row in census.components.items()
            },
        },
        "num_layers": plan.model.num_layers,
        "activation_bytes": {
            name: plan.model.peak(plan.model.everywhere(layers))
            for name, layers in (("none", 0), ("full", plan.model.num_layers))
        },
        "options": [_option_json(plan, option) for option in plan.options],
        "fastest": None if plan.best is None else plan.options.index(plan.best),
        "advice": plan.advice or None,
        "disk_bytes": plan.disk_bytes,
        "corrected_by": [record.sharing for record in plan.corrections.records.values()],
    }


def _option_json(plan: RunPlan, option: Option) -> dict[str, Any]:
    choice = option.choice
    return {
        "zero_stage": choice.stage,
        "offload_optimizer": choice.offload_optimizer,
        "offload_parameters": choice.offload_parameters,
        "recompute_layers": dict(zip(plan.stages, choice.recompute.layers, strict=True)),
        "fits": option.fits,
        "gpu_bytes": option.memory.as_dict(),
        "host_bytes": option.host,
        "checkpoint_bytes": option.checkpoint,
        "tokens_per_second_per_gpu": round(option.tokens_per_second, 1) if plan.has_rates else None,
        "seconds": round(option.seconds, 1) if plan.has_rates and option.seconds is not None else None,
    }
