"""`cadtrain init-config`: a complete DeepSpeed JSON, its explanation, and a lint for other people's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadtrain.cli.options import ForceOption, JsonOption, OutFileOption

if TYPE_CHECKING:
    from cadtrain.config.deepspeed_schema import DeepSpeedConfig


def init_config(
    zero: Annotated[int, typer.Option("--zero", min=0, max=3, help="ZeRO stage.")] = 3,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep optimizer states in host memory; in stage 3 the weights as well.")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=1,
            help="Write the batch size for this many GPUs. Default: a file that fits any number.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="bf16|fp32", help="Precision of weights and activations.")
    ] = "bf16",
    hidden_size: Annotated[
        int,
        typer.Option(
            "--hidden-size", min=1, help="Width of the language model; sizes the buckets. 4096 is an 8B model."
        ),
    ] = 4096,
    out: OutFileOption = None,
    force: ForceOption = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show each value with its reason instead of the JSON.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            metavar="FILE",
            help="Lint a DeepSpeed JSON: unknown, removed and doubtful keys.",
            show_default=False,
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Write a JSON schema of DeepSpeed's configuration, for editors.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a complete, validated DeepSpeed JSON with no "auto" in it.

    Runs do not need one: `cadtrain train` and `launch` build the same from the run's configuration. Use it to read what they
    do, for another trainer, or as a start for `zero.config_file`.

    Examples:

      cadtrain init-config --offload > ds_zero3_offload.json

      cadtrain init-config --zero 2 --gpus 4 --out ds_zero2_config.json

      cadtrain init-config --zero 3 --explain

      cadtrain init-config --check their_config.json

      cadtrain init-config --schema > deepspeed.schema.json
    """
    if check is not None:
        _check(check, as_json=as_json)
        return
    if schema:
        _schema()
        return
    from cadtrain.config.deepspeed_config import build_deepspeed_config
    from cadtrain.errors import UsageError

    if precision not in ("bf16", "fp32"):
        raise UsageError(
            f"precision {precision!r} is not one of bf16, fp32.", hint="fp16 needs loss scaling and is not supported."
        )
    config = build_deepspeed_config(
        zero_stage=zero,
        world_size=gpus,
        precision="bf16" if precision == "bf16" else "fp32",
        offload_optimizer=offload,
        offload_parameters=offload and zero == 3,
        hidden_size=hidden_size,
    )
    if explain:
        _explain(config, as_json=as_json)
    elif out is not None:
        _write(config, out, force=force, as_json=as_json)
    else:
        from cadtrain.ui.console import print_text

        print_text(json_text(config))


def _schema() -> None:
    from cadtrain.config.deepspeed_schema import DeepSpeedConfig
    from cadtrain.ui.console import print_json

    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **DeepSpeedConfig.model_json_schema()})


def json_text(config: DeepSpeedConfig) -> str:
    """The file's text."""
    import json

    return json.dumps(config.to_dict(), indent=2) + "\n"


def _write(config: DeepSpeedConfig, path: Path, *, force: bool, as_json: bool) -> None:
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
        partial.write_text(json_text(config), encoding="utf-8")
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
    from cadtrain.config.deepspeed_reasons import explain
    from cadtrain.ui.config import reasons_table
    from cadtrain.ui.console import out, print_json

    rows = explain(config)
    if as_json:
        print_json([{"key": key, "value": value, "why": why} for key, value, why in rows])
        return
    out().print(reasons_table(rows))


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
