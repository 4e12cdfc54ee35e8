"""Tables for people, from plain rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> Table:
    """A table with light rules; cells are shown as they are, without markup. A cell may be a rich `Text`."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="bold",
        padding=(0, 2, 0, 0),
    )
    for index, column in enumerate(columns):
        # The first columns are names and values to copy: they keep their words whole as long as there is room.
        table.add_column(column, overflow="fold", ratio=None, no_wrap=False, min_width=8 if index else None)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table
