"""`cadtrain data encode`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadtrain.cli.data.common import interruptible
from cadtrain.cli.options import ConfigArgument, JsonOption, SetOption

if TYPE_CHECKING:
    from cadtrain.config.sections import RunConfig


class Device(StrEnum):
    """Where the encoders run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Storage(StrEnum):
    """How features are stored."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


def encode(
    config: ConfigArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Folder of the features. Default: data.features.", show_default=False
        ),
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="Where the encoders run; auto takes a GPU.")] = Device.AUTO,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Views or clouds encoded at once.")] = 64,
    dtype: Annotated[
        Storage | None,
        typer.Option("--dtype", help="How features are stored. Default: in the run's precision.", show_default=False),
    ] = None,
    variants: Annotated[
        int, typer.Option("--variants", min=1, metavar="K", help="Draws of points stored of each training part.")
    ] = 1,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-w", min=1, metavar="N", help="Threads that decode. Default: one a core.", show_default=False
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Encode nothing: read the whole folder and name every damaged file.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder, once the new features are whole.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the frozen encoders once, so that training need not.

    Stores what they give for every view and point cloud. Set data.features to the folder, and a run reads features in place of views and points. They hold for these encoders, this dataset, this precision and this data.num_points; a run with others is refused.

    An interrupted run goes on where it stopped when it is started again.

    Examples:

      cadtrain data encode my_run.yaml --out features

      cadtrain data encode my_run.yaml -o features --variants 4 --set precision=bf16

      cadtrain data encode my_run.yaml -o features --check
    """
    from cadtrain.config.load import load_run_config
    from cadtrain.errors import UsageError

    run = load_run_config(config or "demo", tuple(overrides or ())).config
    folder = out or run.data.features
    if folder is None:
        raise UsageError("no folder to write to.", where="--out", hint="Add --out FOLDER, or set data.features.")
    if check:
        _check(folder, as_json=as_json)
        return
    _encode(run, folder, device, batch, dtype, variants, workers, overwrite=overwrite, as_json=as_json)


def _encode(
    run: RunConfig, folder: Path, device: Device, batch: int, dtype: Storage | None, variants: int,
    workers: int | None, *, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    from dataclasses import asdict

    from cadtrain.cli.launch import make_demo_parts
    from cadtrain.data.synth.make import usable_cores
    from cadtrain.train.encode import EncodeOptions, encode
    from cadtrain.ui.console import err, out, print_json
    from cadtrain.ui.features import encoding_progress, plan_text, summary_text

    make_demo_parts(run)
    options = EncodeOptions(
        folder,
        device.value,
        batch,
        None if dtype is None else dtype.value,
        variants,
        workers or usable_cores(),
        overwrite,
    )
    with interruptible(), encoding_progress("features") as progress:
        summary = encode(
            run,
            options,
            on_plan=lambda plan, device: err().print(plan_text(plan, device), markup=False, soft_wrap=True),
            progress=progress,
        )
    if as_json:
        told = asdict(summary.manifest)
        told["files"] = len(summary.manifest.files)
        print_json({"out": str(summary.out), "resumed": summary.resumed, "seconds": summary.seconds, "manifest": told})
    else:
        out().print(summary_text(summary), soft_wrap=True)


def _check(folder: Path, *, as_json: bool) -> None:
    from cadtrain.cli.exit_codes import ExitCode
    from cadtrain.data.features.store import FeatureStore
    from cadtrain.ui.console import out, print_json
    from cadtrain.ui.features import checking_progress

    store = FeatureStore.open(folder)
    with (
        interruptible("Stopped; nothing was changed.", hint=None),
        checking_progress(len(store.manifest.files)) as on_file,
    ):
        damaged = store.check(on_file)
    if as_json:
        print_json({"folder": str(folder), "files": len(store.manifest.files), "damaged": damaged})
    else:
        text = "\n".join(damaged) or f"all {len(store.manifest.files)} files of {folder} are whole"
        out().print(text, markup=False, soft_wrap=True)
    if damaged:
        raise typer.Exit(ExitCode.USAGE)
