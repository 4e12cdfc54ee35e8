"""Other people's DeepSpeed files: every fault at once, and laid over ours where they may be.

DeepSpeed says nothing about a misspelt top-level key or a left-over `"auto"`; each of these is found here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from cadtrain.config.deepspeed_rules import contradictions
from cadtrain.config.deepspeed_schema import DeepSpeedConfig
from cadtrain.config.faults import collect_faults
from cadtrain.config.yaml_source import Document, KeyPath, dotted, read_yaml
from cadtrain.errors import ConfigError, Fault, UsageError

REMOVED: dict[str, str] = {
    "nebula": "Remove it: cadtrain writes its own checkpoints.",
    "compression_training": "Remove it: DeepSpeed no longer compresses models.",
    "amp": "Use `bf16`.",
    "quantize_training": "Remove it: DeepSpeed no longer quantizes while training.",
    "sparse_gradients": "Remove it: gradients of sparse embeddings are reduced sparsely by themselves.",
    "eigenvalue": "Remove it: it belonged to `quantize_training`.",
    "sparse_attention": "Remove it: attention is the model's own.",
    "elasticity": "Remove it: `cadtrain launch --resume` goes on with another number of GPUs.",
    "graph_harvesting": "Remove it: use `compile` instead.",
    "curriculum_learning": "Remove it: the stages of a run are its `curriculum`.",
    "progressive_layer_drop": "Remove it.",
    "zero_optimization.mics_shard_size": "Use `zero_hpz_partition_size` for copies inside a node.",
    "zero_optimization.mics_hierarchical_params_gather": "Use `zero_hpz_partition_size` for copies inside a node.",
    "zero_optimization.zeropp_loco_param": "Remove it.",
}
"""Keys that DeepSpeed 0.19 refuses, and what to do instead."""

RENAMED: dict[str, str] = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.model_persistence_threshold": "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.max_live_parameters": "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.max_reuse_distance": "zero_optimization.stage3_max_reuse_distance",
    "bf16.check_overflow": "bf16.check_grad_overflow",
}
"""Old spellings and the ones to write."""

UNSUPPORTED: dict[str, str] = {
    "autotuning": "`zero.stage: auto` takes the lowest stage that fits",
    "data_efficiency": "the data order is cadtrain's own",
    "data_types.param_dtype": "the precision of a run is its `precision`",
    "datastates_ckpt": "checkpoints are cadtrain's own",
    "expert_parallel": "there are no expert layers",
    "hybrid_engine": "it is for reinforcement learning",
    "pipeline": "there are no pipeline stages",
    "seq_parallel_communication_data_type": "sequences are not split over ranks",
    "sequence_parallel_size": "sequences are not split over ranks",
    "tensor_parallel": "layers are not split over ranks",
    "use_data_before_expert_parallelism": "there are no expert layers",
    "vocabulary_size": "the model knows it",
    "weight_quantization": "it is for inference",
    "zero_optimization.zenflow": "it changes what a step means",
}
"""Keys that DeepSpeed knows and cadtrain has no use for, with the reason."""

OWNED: dict[str, str] = {
    "train_batch_size": "Set `batch.global_batch_size` in the run's configuration.",
    "train_micro_batch_size_per_gpu": "Set `batch.micro_batch_tokens` in the run's configuration.",
    "gradient_accumulation_steps": "Set `batch.global_batch_size` and `batch.micro_batch_tokens` in the run's configuration.",
    "managed_gradient_accumulation": "Remove it.",
    "gradient_allreduce_op": "Remove it: the loss is weighted for a mean over ranks.",
    "optimizer": "Remove it and set `optim` and the stages' `learning_rate` in the run's configuration.",
    "scheduler": "Remove it and set the stages' `schedule` and `warmup` in the run's configuration.",
    "gradient_clipping": "Set `optim.gradient_clipping` in the run's configuration.",
    "zero_force_ds_cpu_optimizer": "Remove it.",
    "bf16.enabled": "Set `precision` in the run's configuration.",
    "bf16.bf16_master_weights_and_grads": "Remove it: master weights are fp32.",
    "bf16.bf16_optimizer_states": "Remove it: optimizer states are fp32.",
    "fp16.enabled": "Set `precision` in the run's configuration to bf16 or fp32.",
    "torch_autocast.enabled": "Set `precision` in the run's configuration.",
    "data_types.grad_accum_dtype": "Remove it: gradients add up in fp32 wherever DeepSpeed can.",
    "zero_optimization.stage": "Set `zero.stage` in the run's configuration.",
    "zero_optimization.offload_optimizer.device": "Set `zero.offload_optimizer` in the run's configuration.",
    "zero_optimization.offload_param.device": "Set `zero.offload_parameters` in the run's configuration.",
    "checkpoint.load_universal": "Remove it: `--resume` decides.",
}
"""Keys that follow from the run's configuration, and what to set there instead."""

AUTO_IS_A_VALUE: frozenset[str] = frozenset({"data_types.keep_in_fp32_modules"})
"""Keys where `"auto"` is DeepSpeed's own word and not a gap for a trainer to fill."""

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Finding:
    """What the lint says of one key."""

    level: Literal["error", "warning"]
    fault: Fault


def check_file(path: Path) -> list[Finding]:
    """Everything that is wrong (`error`) or doubtful (`warning`) in a DeepSpeed JSON file, in the order of its lines.

    The file is judged by itself: whether it fits a run is `merge_user_file`'s question. Raises `UsageError` where there is no file.
    """
    document = _read(path)
    faults = list(document.faults)
    if not isinstance(document.values, dict):
        return [Finding("error", Fault(str(path), "holds no JSON object.", "Start from `cadtrain init-config`."))]
    values, unresolved = _split_auto(document.values)
    faults += _schema_faults(values, document)
    findings = [Finding("error", fault) for fault in faults]
    for key in unresolved:
        does = (
            "DeepSpeed drops it and takes its default in silence"
            if len(key) > 1
            else "DeepSpeed itself does not know the word"
        )
        hint = "Write the value; `cadtrain init-config` shows one for every key."
        findings.append(
            Finding("warning", Fault(document.where(key), f'"auto" is for the trainer to fill; {does}.', hint))
        )
    findings += [Finding("warning", fault) for fault in _doubts(values, document)]
    findings += [
        Finding(found.level, Fault(document.where(found.path), found.message, found.hint))
        for found in contradictions(values)
    ]
    return sorted(findings, key=lambda finding: _line(finding.fault))


def merge_user_file(path: Path, ours: DeepSpeedConfig) -> DeepSpeedConfig:
    """`ours` with the values of a user's file laid over it.

    `"auto"` takes our value where we have one. Raises `ConfigError` with all faults: unknown and removed keys, wrong
    values, an `"auto"` that nothing fills, and keys that contradict the run's configuration.
    """
    document = _read(path)
    faults = list(document.faults)
    if not isinstance(document.values, dict):
        raise ConfigError([*faults, Fault(str(path), "holds no JSON object.", "Start from `cadtrain init-config`.")])
    values, unresolved = _split_auto(document.values)
    base = ours.to_dict()
    for key in unresolved:
        if _get(base, key) is _ABSENT and key[0] not in OWNED:
            faults.append(
                Fault(document.where(key), '"auto" has nothing to stand for here.', "Write a value, or remove the key.")
            )
    faults += _schema_faults(values, document)
    told = {fault.where for fault in faults}
    faults += [fault for fault in _conflicts(values, base, document) if fault.where not in told]
    if faults:
        raise ConfigError(sorted(faults, key=_line))
    return DeepSpeedConfig.model_validate(_laid_over(base, values))


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        names = [item.name for item in path.parent.glob("*.json")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = (
            f"Did you mean `{path.parent / near[0]}`?" if near else "Write one with `cadtrain init-config --out FILE`."
        )
        raise UsageError("no such DeepSpeed file.", where=str(path), hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {error}.", where=str(path)) from error
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        shown = (text.splitlines() or [""])[min(error.lineno, len(text.splitlines()) or 1) - 1]
        raise ConfigError(
            [Fault(f"{path}:{error.lineno}", f"not readable as JSON: {error.msg}.\n    {error.lineno} | {shown}")]
        ) from error
    # JSON is YAML, and this reader knows the line of every key and sees keys written twice. YAML knows no tabs.
    return read_yaml(text.replace("\t", "  "), str(path))


def _split_auto(values: dict[str, Any]) -> tuple[dict[str, Any], list[KeyPath]]:
    """`values` without its `"auto"`s, and the key paths of these."""
    unresolved: list[KeyPath] = []

    def walk(value: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, item in value.items():
            here = (*path, key)
            if item == "auto" and dotted(here) not in AUTO_IS_A_VALUE and key not in REMOVED:
                unresolved.append(here)
            else:
                kept[key] = walk(item, here) if isinstance(item, dict) else item
        return kept

    return walk(values, ()), unresolved


def _schema_faults(values: dict[str, Any], document: Document) -> list[Fault]:
    try:
        DeepSpeedConfig.model_validate(values)
    except ValidationError as error:
        found = collect_faults(DeepSpeedConfig, values, error, document.where)
        return [_better(fault) for fault in found]
    return []


def _better(fault: Fault) -> Fault:
    """Say of an unknown key what is known about it: removed, renamed, or of no use here."""
    key = fault.where.rpartition(" ")[2]
    if not fault.message.startswith("unknown key"):
        return fault
    if key in REMOVED:
        return Fault(fault.where, "DeepSpeed 0.19 removed this key and refuses to start with it.", REMOVED[key])
    if key in RENAMED:
        return Fault(fault.where, "an old spelling.", f"Write `{RENAMED[key]}`.")
    if key in UNSUPPORTED:
        return Fault(
            fault.where, f"DeepSpeed knows this key, cadtrain does not use it: {UNSUPPORTED[key]}.", "Remove it."
        )
    return Fault(
        fault.where,
        "unknown key; DeepSpeed would ignore it in silence." if "." not in key else "unknown key.",
        fault.hint,
    )


def _conflicts(values: dict[str, Any], base: dict[str, Any], document: Document) -> list[Fault]:
    faults = []
    for key, hint in OWNED.items():
        path: KeyPath = tuple(key.split("."))
        theirs, our = _get(values, path), _get(base, path)
        if theirs is _ABSENT or theirs == our or (our is _ABSENT and theirs in (None, False, "none")):
            continue
        stands = "it has none" if our is _ABSENT else f"the run has {json.dumps(our)}"
        shown = "a block" if isinstance(theirs, dict) else json.dumps(theirs)
        faults.append(
            Fault(
                document.where(path), f"found {shown}, but this follows from the run's configuration ({stands}).", hint
            )
        )
    return faults


def _doubts(values: dict[str, Any], document: Document) -> Iterator[Fault]:
    """Values that are allowed and known to hurt."""
    zero = values.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    doubts: list[tuple[bool, KeyPath, str, str]] = [
        (zero.get("stage3_use_all_reduce_for_fetch_params") is True, ("zero_optimization", "stage3_use_all_reduce_for_fetch_params"),
         "gathering by all-reduce corrupted weights before DeepSpeed 0.19.4.", "Set it to false."),
        (zero.get("overlap_comm") is False, ("zero_optimization", "overlap_comm"),
         "gradients are reduced while nothing is computed; its old faults are mended since 0.19.3.", "Set it to true."),
        (zero.get("sub_group_size") == 0, ("zero_optimization", "sub_group_size"), "0 makes a group of every parameter.", "Write 1000000000."),
        (zero.get("stage3_max_live_parameters") == 0, ("zero_optimization", "stage3_max_live_parameters"),
         "0 gathers every layer twice.", "Write 1000000000."),
        (zero.get("stage3_max_reuse_distance") == 0, ("zero_optimization", "stage3_max_reuse_distance"),
         "0 lets go of weights that the next pass wants at once; they are gathered again.", "Write 1000000000."),
        (zero.get("stage3_prefetch_bucket_size") == 0, ("zero_optimization", "stage3_prefetch_bucket_size"),
         "0 gathers nothing ahead: every layer waits for its weights.", "Write the size of a decoder layer or two, e.g. 200000000."),
        (zero.get("elastic_checkpoint") is True, ("zero_optimization", "elastic_checkpoint"), "no longer works in ZeRO-3.", "Set it to false."),
        (values.get("wall_clock_breakdown") is True, ("wall_clock_breakdown",), "synchronises the device several times a step.", "Set it to false."),
        (isinstance(values.get("bf16"), dict) and values["bf16"].get("check_grad_overflow") is False, ("bf16", "check_grad_overflow"),
         "a gradient that is not finite would reach the weights.", "Set it to true."),
        ("fp16" in values and isinstance(values["fp16"], dict) and values["fp16"].get("enabled") is True, ("fp16", "enabled"),
         "cadtrain trains in bf16 or fp32.", "Use `bf16`."),
    ]  # fmt: skip
    for holds, path, what, hint in doubts:
        if holds:
            yield Fault(document.where(path), what, hint)


def _get(values: Any, path: KeyPath) -> Any:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return _ABSENT
        values = values[key]
    return values


def _laid_over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def _line(fault: Fault) -> int:
    line = fault.where.split(" ")[0].rpartition(":")[2]
    return int(line) if line.isdigit() else 0
