"""`cadtrain convert`: a checkpoint as one file of weights, a Hugging Face folder or a PEFT adapter."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cadtrain.cli.options import ForceOption, JsonOption
from cadtrain.errors import UsageError


class DtypeChoice(StrEnum):
    """Values of `--dtype`."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run folder, one of its checkpoints, or a folder that DeepSpeed or transformers.Trainer saved into."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="FILE.bin, FILE.safetensors, or a folder for `from_pretrained`.")],
    dtype: Annotated[
        DtypeChoice | None,
        typer.Option("--dtype", help="Type of the parameters. Default: fp32 in a file, as trained in a folder."),
    ] = None,
    merge_lora: Annotated[
        bool | None,
        typer.Option("--merge-lora/--no-merge-lora", help="Add adapters to their weights. Default: in a folder only."),
    ] = None,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter", help="Write a PEFT adapter folder for the plain language model, and projectors beside it."
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest file of weights in a folder, e.g. 5GB.")
    ] = "5GB",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compare every weight with the hashes taken of the live ones, and read the target back."
        ),
    ] = False,
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="Which checkpoint of the run. Default: the newest.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint to `.bin`, `.safetensors`, a Hugging Face folder or a PEFT adapter.

    Weights are read, cast and written piece by piece, so memory does not grow with the model. Nothing in a checkpoint is run.

    Examples:

      cadtrain convert runs/demo-20250101-120000 out.bin

      cadtrain convert runs/demo-20250101-120000 cad-model --dtype bf16 --verify

      cadtrain convert runs/my_lora_run adapter --adapter
    """
    from cadtrain.convert.service import convert_checkpoint
    from cadtrain.ui.console import err, print_json, print_text
    from cadtrain.ui.progress import bytes_progress
    from cadtrain.units import format_bytes, format_seconds, parse_bytes

    try:
        max_shard_bytes = parse_bytes(max_shard_size)
    except ValueError as error:
        raise UsageError(str(error), where="--max-shard-size") from error
    with bytes_progress() as progress:
        result = convert_checkpoint(
            source, target, dtype=dtype.value if dtype else None, merge_lora=merge_lora, adapter=adapter,
            max_shard_bytes=max_shard_bytes, verify=verify, step=step, force=force, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json({**asdict(result), "target": str(result.target), "shards": str(result.shards)})
        return
    of = f"step {result.step}, " if result.step is not None else ""
    err().print(
        f"{result.num_parameters:,} parameters in {result.dtype}{', adapters merged' if result.merged_lora else ''}"
        f" ({of}ZeRO-{result.zero_stage} of {result.num_ranks} ranks), {format_bytes(result.nbytes)} in {format_seconds(result.seconds)}",
        markup=False,
    )
    if result.verified:
        err().print("every weight in it is the one that was live when the checkpoint was saved", markup=False)
    for note in result.notes:
        err().print(note, markup=False)
    print_text(str(result.target))
