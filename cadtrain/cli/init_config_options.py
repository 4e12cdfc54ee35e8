"""The options of `cadtrain init-config`, so that the command's signature can be read at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cadtrain.cli.launch_options import ZeroChoice

Zero = Annotated[
    ZeroChoice, typer.Option("--zero", help="ZeRO stage; auto takes the lowest that fits --model on --gpu-memory.")
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep optimizer states in host memory; in stage 3 the weights as well.")
]
OffloadTo = Annotated[
    str | None,
    typer.Option("--offload-to", metavar="cpu|nvme:PATH", help="Offload, and where to.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|FILE",
        help="A model whose shapes size the buckets: hub name, folder or config.json.",
        show_default=False,
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory", metavar="SIZE", help="Memory of each GPU for --zero auto, e.g. 48GB.", show_default=False
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=1,
        help="Write the batch size for this many GPUs. Default: a file that fits any number.",
        show_default=False,
    ),
]
Precision = Annotated[
    str, typer.Option("--precision", metavar="bf16|fp32", help="Precision of weights and activations.")
]
HiddenSize = Annotated[
    int,
    typer.Option("--hidden-size", min=1, help="Width of the language model; sizes the buckets. 4096 is an 8B model."),
]
Explain = Annotated[bool, typer.Option("--explain", help="Show each value with its reason instead of the JSON.")]
Check = Annotated[
    Path | None,
    typer.Option(
        "--check",
        metavar="FILE",
        help="Lint a DeepSpeed JSON: unknown, removed and doubtful keys.",
        show_default=False,
    ),
]
Schema = Annotated[bool, typer.Option("--schema", help="Write the JSON schema of DeepSpeed files, for editors.")]
