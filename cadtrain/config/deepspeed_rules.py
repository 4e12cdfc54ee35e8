"""What two keys of a DeepSpeed file say against each other: each alone is right, together they fail or cost dearly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

KeyPath = tuple[str | int, ...]

OVERLAP_FACTOR = 4.5
"""Memory of overlapped communication in reduce buckets, at most (Source: transformers' DeepSpeed guide; the buffers in use, those in
flight and their copies)."""
OVERLAP_BYTES = 4 * 10**9
"""Bytes of that from which it is worth a word."""
DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's own reduce bucket, in elements."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """One pair of keys: where to look, what is wrong with it, what to do."""

    level: Literal["error", "warning"]
    path: KeyPath
    message: str
    hint: str


def contradictions(values: dict[str, Any]) -> Iterator[Contradiction]:
    """Every rule between keys that `values` (without `"auto"`s) breaks; values of a wrong type are the schema's business."""
    zero = _block(values, "zero_optimization")
    stage = zero.get("stage", 0)
    yield from _batch(values)
    if _block(values, "bf16").get("enabled") is True and _block(values, "fp16").get("enabled") is True:
        yield Contradiction("error", ("fp16", "enabled"), "bf16 is enabled as well.", "Enable one of the two.")
    if stage in (0, 1, 2, 3) and not isinstance(stage, bool):
        yield from _offload(zero, stage, has_aio="aio" in values)
        yield from _without_effect(zero, stage)
        yield from _overlap(zero, stage)


def _block(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _batch(values: dict[str, Any]) -> Iterator[Contradiction]:
    whole = {
        name: values.get(name)
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    }
    batch, micro, steps = (int(v) if isinstance(v, int | float) and v == int(v) else 0 for v in whole.values())
    known = [number for number in (micro, steps) if number > 0]
    if batch <= 0 or not known:
        return
    product = micro * steps if len(known) == 2 else known[0]
    if batch % product:
        terms = [f"{micro} per GPU"] * (micro > 0) + [f"{steps} accumulation steps"] * (steps > 0)
        above = -(-batch // product) * product
        hint = f"Use {above - product} or {above}." if above > product else f"Use {above}."
        yield Contradiction("error", ("train_batch_size",), f"{batch} is no multiple of {' × '.join(terms)}.", hint)


def _offload(zero: dict[str, Any], stage: int, *, has_aio: bool) -> Iterator[Contradiction]:
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        block = _block(zero, name)
        device = block.get("device", "none")
        if device not in ("cpu", "nvme"):
            continue
        where: KeyPath = ("zero_optimization", name, "device")
        if stage < least:
            need = "stage 3" if least == 3 else "stage 1, 2 or 3"
            yield Contradiction("error", where, f"needs {need}, found stage {stage}.", "Raise the stage or remove it.")
        elif device == "nvme" and stage < 3:
            yield Contradiction(
                "error", where, f"NVMe needs stage 3, found stage {stage}.", "Raise the stage or use cpu."
            )
        elif device == "nvme" and not block.get("nvme_path"):
            yield Contradiction("error", where, "NVMe needs a folder.", "Add `nvme_path`.")
        elif device == "nvme" and not has_aio:
            hint = "Add `aio`; `cadtrain init-config --offload-to nvme:PATH` writes one."
            yield Contradiction(
                "warning", where, "without an `aio` block transfers use DeepSpeed's small defaults.", hint
            )


def _without_effect(zero: dict[str, Any], stage: int) -> Iterator[Contradiction]:
    if stage == 3:
        return
    for key in zero:
        if key.startswith("stage3_") and zero[key] not in (False, 0):
            yield Contradiction(
                "warning", ("zero_optimization", key), f"has no effect in stage {stage}.", "Remove it, or use stage 3."
            )


def _overlap(zero: dict[str, Any], stage: int) -> Iterator[Contradiction]:
    bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    if stage == 0 or zero.get("overlap_comm") is not True or not isinstance(bucket, int | float):
        return
    taken = OVERLAP_FACTOR * 2 * bucket
    if taken >= OVERLAP_BYTES:
        written = "reduce_bucket_size" in zero
        name = "reduce_bucket_size" if written else "overlap_comm"
        yield Contradiction(
            "warning", ("zero_optimization", name),
            f"{'' if written else 'the default bucket of '}{bucket:,.0f} elements with overlap_comm take up to {taken / 1e9:.1f} GB on each GPU.",
            "Use 2e8 or less where memory is short.",
        )  # fmt: skip
