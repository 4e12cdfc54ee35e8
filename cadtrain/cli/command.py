"""Commands whose help calls an argument by its name alone: `DIR`, not `{DIR}` with `<path>` beside it."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand


class PlainCommand(TyperCommand):
    """A command for `app.command(…, cls=PlainCommand)`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and parameter.metavar:
                parameter.display_type = _nothing  # type: ignore[method-assign]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words after the command's name; optional ones stay in brackets."""
        return [piece.removeprefix("{").removesuffix("}") for piece in super().collect_usage_pieces(ctx)]


def _nothing(ctx: Any) -> str:
    return ""
