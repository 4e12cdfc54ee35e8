"""How a measurement looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from cadtrain.ui.tables import plain_table


def report_tables(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The tables of a report as `BenchReport.to_json` gives it."""
    yield plain_table(("measured", ""), list(_what(report)), title=f"Benchmark of {report['run']}")
    yield plain_table(("", "mean", "median"), list(_rates(report)))
    yield plain_table(("", ""), list(_shares(report)))


def profile_tables(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The tables of a profile's `summary.json`: where a step goes on each rank, and the first rank's longest kernels."""
    ranks = summary["ranks"]
    first = next(iter(ranks.values()))
    rows = {rank: dict(_rows_of(found)) for rank, found in ranks.items()}
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    cells = [
        (name, *(f"{found.get(name, 0.0):,.2f}" for found in rows.values()), f"{_mean(rows, name) / _mean(rows, 'a step'):.1%}")
        for name in names
    ]  # fmt: skip
    columns = ("", *(f"rank {rank}, ms" for rank in ranks), "share")
    kind = "the GPU's timeline" if first["is_device"] else "no GPU: operators"
    yield plain_table(columns, cells, title=f"Where a step goes ({kind})")
    kernels = [(f"{row['ms']:,.3f}", f"{row['calls']:,.0f}", row["name"][:90]) for row in first["kernels"]]
    yield plain_table(("ms a step", "calls", "longest kernels" if first["is_device"] else "longest operators"), kernels)


_FIRST_PARTS = ("embedding", "image encoder", "image projector", "point encoder", "point projector", "norms", "attention",
                "rotary", "MLP", "LoRA", "residual stream", "logits and loss")  # fmt: skip
_LAST_PARTS = ("backward", "recompute", "optimizer", "other")


def _rows_of(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Rows that add up to the last one."""
    parts = found["parts_ms"]
    forward = [name for name in _FIRST_PARTS if name in parts]
    forward += [name for name in parts if name not in (*_FIRST_PARTS, *_LAST_PARTS)]
    yield from ((f"forward: {name}", parts[name]) for name in forward)
    yield from ((name, parts[name]) for name in _LAST_PARTS if name in parts)
    yield "communication, nothing computes", found["exposed_communication_ms"]
    yield "copies, nothing else runs", found["exposed_copies_ms"]
    yield "data wait", found["data_wait_ms"]
    yield from ((f"gap: {name}", value) for name, value in found["gaps_ms"].items())
    yield "a step", found["step_ms"]
    yield "(communication beside computing)", found["overlapped_communication_ms"]


def _mean(rows: Mapping[str, Mapping[str, float]], name: str) -> float:
    return sum(found.get(name, 0.0) for found in rows.values()) / len(rows)


def _what(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    hardware, workload = report["hardware"], report["workload"]
    offload = [name for name in ("optimizer", "parameters") if report[f"offload_{name}"]]
    lora = f", LoRA rank {report['lora_rank']}" if report["lora_rank"] else ""
    yield "hardware", f"{report['num_ranks']} x {hardware['device']}"
    yield "model", f"{report['parameters']:,} parameters{lora}; {', '.join(workload['learning'])} learn"
    yield "workload", f"{workload['text']}; stage {workload['stage']}"
    yield (
        "engine",
        f"ZeRO-{report['zero_stage']}, {report['precision']}, recompute {report['recompute']}"
        + (f", {' and '.join(offload)} in host memory" if offload else ""),
    )
    seconds = report["step_seconds"]
    yield (
        "step",
        f"{seconds['median']:.4f} s median, {seconds['min']:.4f} to {seconds['max']:.4f} s, over {report['steps']} steps "
        f"after {report['warmup_steps']} to warm up; {report['micro_steps']['mean']:.2f} micro-steps a step",
    )
    yield "configuration", f"digest {report['config_digest']}"


def _rates(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    mean, median = report["mean"], report["median"]
    for label, key in (
        ("tokens/s a GPU", "tokens_per_second_per_gpu"), ("target tokens/s a GPU", "target_tokens_per_second_per_gpu"),
        ("samples/s a GPU", "samples_per_second_per_gpu"), ("tokens/s", "tokens_per_second"), ("samples/s", "samples_per_second"),
    ):  # fmt: skip
        digits = 2 if key.startswith("samples") else 0
        yield label, f"{mean[key]:,.{digits}f}", f"{median[key]:,.{digits}f}"
    if mean["mfu"] is not None:
        yield "MFU", f"{mean['mfu']:.1%}", f"{median['mfu']:.1%}"
    else:
        yield "MFU", report["no_mfu"], ""


def _shares(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    flops = report["model_flops_per_step"]
    if flops is not None:
        yield "model operations", f"{flops:.3e} a step, {report['model_flops_per_token'] / 1e9:.3f} GFLOP a token"
    memory = report["memory"]
    if memory["allocated_gib"] is not None:
        yield "memory", f"{memory['allocated_gib']:.2f} GiB allocated, {memory['reserved_gib']:.2f} GiB reserved at most"
    yield "pack fill", f"{report['pack_fill']:.1%} of {report['micro_batch_tokens']:,} tokens"
    imbalance = report["imbalance"]
    yield "imbalance", f"{imbalance['mean']:.3f} (most {imbalance['max']:.3f}): tokens of the fullest rank over the mean"
    wait = report["data_wait_share"]
    yield "data wait", f"{wait['mean']:.2%} of the time, {wait['max']:.2%} on the rank that waits longest"
    communication = report["communication"]
    if communication is None:
        yield "communication", f"not known: {report['no_communication']}"
    else:
        kinds = ", ".join(f"{name} {share:.1%}" for name, share in communication["kinds"].items())
        yield (
            "communication",
            f"{communication['share']:.1%} of the time, {communication['exposed_share']:.1%} while nothing computes ({kinds})",
        )
