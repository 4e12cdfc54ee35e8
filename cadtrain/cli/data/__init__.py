"""`cadtrain data`: make datasets, from procedural parts or from folders, look into them, store features, write designs as files."""

from __future__ import annotations

import typer

from cadtrain.cli.command import PlainCommand
from cadtrain.cli.data.encode import encode
from cadtrain.cli.data.export import export
from cadtrain.cli.data.inspect import inspect
from cadtrain.cli.data.merge import merge
from cadtrain.cli.data.prepare import prepare
from cadtrain.cli.data.synth import synth

app = typer.Typer(
    help="Make datasets from procedural parts or folders of designs, look into them, export designs.",
    no_args_is_help=True,
)
app.command("synth", cls=PlainCommand)(synth)
app.command("prepare", cls=PlainCommand)(prepare)
app.command("merge", cls=PlainCommand)(merge)
app.command("encode", cls=PlainCommand)(encode)
app.command("inspect", cls=PlainCommand)(inspect)
app.command("export", cls=PlainCommand)(export)
