"""How a launch looks: its plan before, the failure after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cadtrain.launch.reasons import HANG, LOST_HOST
from cadtrain.units import format_bytes

if TYPE_CHECKING:
    from cadtrain.launch.failure import RankFailure
    from cadtrain.launch.planning import LaunchPlan
    from cadtrain.launch.reasons import Explanation

TRACEBACK_LINES = 16
NATIVE_LINES = 8


def plan_table(plan: LaunchPlan) -> RenderableType:
    """What is about to be started."""
    config = plan.config
    language = config.model.language
    model = language.pretrained or (language.config or {}).get("model_type", "?")
    parts = [
        str(model),
        *(name for name, part in (("points", config.model.point), ("images", config.model.image)) if part),
    ]
    if language.lora is not None:
        parts.append(f"LoRA rank {language.lora.rank}")
    data = str(config.data.path) if config.data.path else f"{config.data.synth.count} procedural parts"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows = [
        ("ranks", plan.devices.describe()),
        *_hosts_row(plan),
        ("ZeRO", f"stage {plan.zero.stage} ({plan.zero.reason}){_offload_text(plan)}"),
        ("recompute", _recompute_text(plan)),
        ("precision", config.precision),
        ("model", ", ".join(parts)),
        ("data", data),
        ("stages", ", ".join(f"{stage.name} ({stage.duration})" for stage in config.curriculum)),
        ("run folder", f"{plan.run_dir}{' (resumed)' if plan.resume else ''}"),
    ]
    memory = _memory_text(plan)
    if memory:
        rows.insert(2, ("memory", memory))
    for name, value in rows:
        table.add_row(name, escape(value))
    if plan.zero.offload_optimizer:
        table.add_row(
            "note",
            "steps through host memory are slow; `cadtrain plan` shows what would fit without, such as smaller packs",
            style="yellow",
        )
    if not plan.zero.fits:
        table.add_row(
            "warning",
            "the estimate says that this does not fit; `cadtrain plan` shows what would",
            style="yellow",
        )
    return table


def _hosts_row(plan: LaunchPlan) -> list[tuple[str, str]]:
    if plan.cluster is None:
        return []
    names = ", ".join(f"{host.name} ({host.slots})" for host in plan.cluster.hosts)
    return [("hosts", f"{names}; they meet at {plan.cluster.master_addr}:{plan.cluster.master_port}")]


def _memory_text(plan: LaunchPlan) -> str:
    """Predicted peak beside what the smallest GPU has; empty where nothing was predicted."""
    if plan.zero.peak_bytes is None:
        return ""
    there = min(gpu.memory_total for gpu in plan.devices.gpus)
    return f"{format_bytes(plan.zero.peak_bytes)} of {format_bytes(there)} a GPU predicted at the peak"


def _recompute_text(plan: LaunchPlan) -> str:
    """What `model.recompute` is, or has come to, in words."""
    setting = plan.config.model.recompute
    if isinstance(setting, str):
        return {"full": "every layer"}.get(setting, setting)
    of = f" of {plan.zero.recompute.of}" if plan.zero.recompute is not None else ""
    if isinstance(setting, int):
        return f"the first {setting}{of} layers"
    stages = zip(plan.config.curriculum, setting, strict=True)
    return f"{', '.join(f'{stage.name} {layers}' for stage, layers in stages)}{of} layers"


def _offload_text(plan: LaunchPlan) -> str:
    zero = plan.config.zero
    parts = [name for name, on in (("optimizer", zero.offload_optimizer), ("weights", zero.offload_parameters)) if on]
    return f", {' and '.join(parts)} in host memory" if parts else ""


def failure_panel(failure: RankFailure, explanation: Explanation | None, *, title: str) -> RenderableType:
    """Which rank failed first, with what, why in plain words, what to do, and the end of what it left."""
    return Panel(_failure_text(failure, explanation), title=title, border_style="red", title_align="left")


def _failure_text(failure: RankFailure, explanation: Explanation | None) -> Text:
    who = f"rank {failure.rank}: " if failure.rank >= 0 and failure.type != HANG else ""
    is_signal = failure.type.startswith("SIG")
    text = Text()
    text.append(who, style="bold")
    if failure.type not in ("exit", HANG, LOST_HOST) and not is_signal:
        text.append(f"{failure.type}: ", style="red")
    text.append(failure.message)
    if explanation is not None and explanation.reason:
        text.append(f"\n\n{explanation.reason}", style="bold")
    for remedy in explanation.remedies if explanation is not None else ():
        text.append(f"\n→ {remedy}", style="cyan")
    if failure.stood_at and failure.type != HANG and not failure.is_expected:
        text.append(f"\n\nwhere rank {failure.rank} stood: {failure.stood_at}", style="dim")
    if failure.traceback and not failure.is_expected:
        text.append(f"\n\n{_end_of(failure.traceback, TRACEBACK_LINES)}", style="dim")
    native = _end_of(failure.native_tail, NATIVE_LINES) if is_signal or failure.type == "exit" else ""
    if native:
        text.append(f"\n\nthe last that native code wrote:\n{native}", style="dim")
    elif failure.log_tail:
        text.append(f"\n\nlast lines of its log:\n{failure.log_tail}", style="dim")
    if failure.log_path is not None:
        text.append(f"\n\nlog: {failure.log_path}", style="dim")
    return text


def _end_of(text: str, lines: int) -> str:
    """The last `lines` lines of `text`; what is left out is said."""
    rows = text.rstrip().splitlines()
    return "\n".join(rows if len(rows) <= lines else [f"… {len(rows) - lines} lines before", *rows[-lines:]])
