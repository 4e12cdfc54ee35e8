"""`cadtrain init-config`: a complete DeepSpeed JSON, its explanation, and a lint for other people's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from cadtrain.cli import init_config_options as options
from cadtrain.cli.launch_options import ZeroChoice
from cadtrain.cli.options import ForceOption, JsonOption, OutFileOption

if TYPE_CHECKING:
    from cadtrain.config.deepspeed_schema import DeepSpeedConfig
    from cadtrain.plan.language_model import LanguageModel


def init_config(
    zero: options.Zero = ZeroChoice.THREE,
    offload: options.Offload = False,
    offload_to: options.OffloadTo = None,
    model: options.Model = None,
    gpu_memory: options.GpuMemory = None,
    gpus: options.Gpus = None,
    precision: options.Precision = "bf16",
    hidden_size: options.HiddenSize = 4096,
    out: OutFileOption = None,
    force: ForceOption = False,
    explain: options.Explain = False,
    check: options.Check = None,
    schema: options.Schema = False,
    as_json: JsonOption = False,
) -> None:
    """Write a complete, validated DeepSpeed JSON with no "auto" in it.

    Runs do not need one: `cadtrain train` and `launch` build the same from the run's configuration. Use it to read what they
    do, for another trainer, or as a start for `zero.config_file`.

    Examples:

      cadtrain init-config --offload > ds_zero3_offload.json

      cadtrain init-config --zero 2 --gpus 4 --out ds_zero2_config.json

      cadtrain init-config --zero 3 --explain

      cadtrain init-config --zero auto --model Qwen/Qwen3-8B --gpus 4 --gpu-memory 48GB

      cadtrain init-config --offload-to nvme:/local_nvme --out ds_zero3_nvme.json

      cadtrain init-config --check their_config.json

      cadtrain init-config --schema --out deepspeed.schema.json
    """
    if check is not None:
        _check(check, as_json=as_json)
        return
    if schema:
        _write_schema(out, force=force, as_json=as_json)
        return
    offloads, nvme_path = _offload_target(offload_to, offload=offload)
    config = _build(zero.value, offloads, nvme_path, model, gpus, gpu_memory, precision, hidden_size)
    if explain:
        _explain(config, as_json=as_json)
    elif out is not None:
        _write(json_text(config), out, force=force, as_json=as_json)
    else:
        from cadtrain.ui.console import print_text

        print_text(json_text(config))


def _build(
    zero: str, offloads: bool, nvme_path: str | None, model: str | None, gpus: int | None, gpu_memory: str | None, precision: str,
    hidden_size: int,
) -> DeepSpeedConfig:  # fmt: skip
    """The configuration that the options ask for; `hidden_size` counts where no `model` says its own."""
    from cadtrain.config.deepspeed_config import build_deepspeed_config
    from cadtrain.errors import UsageError

    if precision not in ("bf16", "fp32"):
        raise UsageError(
            f"precision {precision!r} is not one of bf16, fp32.", hint="fp16 needs loss scaling and is not supported."
        )
    kind: Literal["bf16", "fp32"] = "bf16" if precision == "bf16" else "fp32"
    shapes = None
    if model is not None:
        from cadtrain.plan.language_model import language_model

        shapes = language_model(model, kind)
    stage = _stage(zero, shapes, gpus, gpu_memory, offload=offloads)
    return build_deepspeed_config(
        zero_stage=stage,
        world_size=gpus,
        precision=kind,
        offload_optimizer=offloads,
        offload_parameters=offloads and stage == 3,
        nvme_path=nvme_path,
        hidden_size=hidden_size if shapes is None else shapes.hidden_size,
        layer_params=None if shapes is None else shapes.layer_params,
    )


def _offload_target(offload_to: str | None, *, offload: bool) -> tuple[bool, str | None]:
    """Whether to offload, and the folder on NVMe if it goes there."""
    from cadtrain.errors import UsageError

    if offload_to is None:
        return offload, None
    kind, _, path = offload_to.partition(":")
    if kind == "cpu" and not path:
        return True, None
    if kind == "nvme" and path:
        return True, path
    raise UsageError(
        f"found {offload_to!r}.", where="--offload-to", hint="Give cpu, or nvme:PATH with a folder on the device."
    )


def _stage(zero: str, shapes: LanguageModel | None, gpus: int | None, gpu_memory: str | None, *, offload: bool) -> int:
    """The ZeRO stage; `auto` is decided as `launch` decides it, for packs of 8,192 tokens, recompute, and all weights learning."""
    from cadtrain.errors import UsageError
    from cadtrain.plan.stage import choose_stage
    from cadtrain.ui.console import err
    from cadtrain.units import format_bytes, parse_bytes

    if zero != "auto":
        return int(zero)
    missing = [
        name for name, value in (("--model", shapes), ("--gpus", gpus), ("--gpu-memory", gpu_memory)) if value is None
    ]
    if shapes is None or gpus is None or gpu_memory is None:
        raise UsageError(
            f"auto needs {' and '.join(missing)}.", where="--zero",
            hint="E.g. --zero auto --model Qwen/Qwen3-8B --gpus 4 --gpu-memory 48GB.",
        )  # fmt: skip
    try:
        memory = parse_bytes(gpu_memory, needs_unit=True)
    except ValueError as error:
        raise UsageError(f"{error}.", where="--gpu-memory") from error
    run = shapes.run.model_copy(update={"zero": shapes.run.zero.model_copy(update={"offload_optimizer": offload})})
    choice = choose_stage(run, gpus, memory, host_weights=offload)
    needed = f", {format_bytes(choice.peak_bytes)} a GPU predicted" if choice.fits and choice.peak_bytes else ""
    advice = "" if choice.fits or offload else "; try --offload"
    err().print(f"ZeRO-{choice.stage}: {choice.reason}{needed}{advice}", markup=False, style=None if choice.fits else "yellow")
    return choice.stage


def _write_schema(out: Path | None, *, force: bool, as_json: bool) -> None:
    import json

    from cadtrain.config.deepspeed_schema import DeepSpeedConfig
    from cadtrain.ui.console import print_text

    schema = DeepSpeedConfig.model_json_schema()
    text = json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"
    if out is None:
        print_text(text)
    else:
        _write(text, out, force=force, as_json=as_json)


def json_text(config: DeepSpeedConfig) -> str:
    """The file's text."""
    import json

    return json.dumps(config.to_dict(), indent=2) + "\n"


def _write(text: str, path: Path, *, force: bool, as_json: bool) -> None:
    import os

    from cadtrain.errors import UsageError
    from cadtrain.ui.console import err, print_json

    if path.is_dir():
        raise UsageError("is a folder.", where=str(path), hint="Give the name of a file.")
    if path.exists() and not force:
        raise UsageError(
            "there is a file already.", where=str(path), hint="Add --force to replace it, or give another name."
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Written whole beside its place and moved there: nobody ever reads half of it.
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(
            f"cannot be written: {error.strerror}.", where=str(path), hint="Is there such a folder, and is it yours?"
        ) from error
    if as_json:
        print_json({"written": str(path)})
    else:
        err().print(f"Wrote {path}", markup=False, highlight=False)


def _explain(config: DeepSpeedConfig, *, as_json: bool) -> None:
    from cadtrain.config.deepspeed_reasons import SINCE, explain
    from cadtrain.ui.config import reasons_table
    from cadtrain.ui.console import out, print_json

    rows = explain(config)
    if as_json:
        print_json([{"key": key, "value": value, "why": why, "since": SINCE.get(key)} for key, value, why in rows])
        return
    shown = [(key, value, f"{why} (DeepSpeed: {SINCE[key]}.)" if key in SINCE else why) for key, value, why in rows]
    out().print(reasons_table(shown))


def _check(path: Path, *, as_json: bool) -> None:
    from cadtrain.config.deepspeed_lint import check_file
    from cadtrain.ui.config import findings_text
    from cadtrain.ui.console import out, print_json

    findings = check_file(path)
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        rows = [
            {"level": f.level, "where": f.fault.where, "message": f.fault.message, "hint": f.fault.hint or None}
            for f in findings
        ]
        print_json({"file": str(path), "errors": errors, "warnings": len(findings) - errors, "findings": rows})
    else:
        out().print(findings_text(path, findings), soft_wrap=True)
    if errors:
        raise typer.Exit(2)
