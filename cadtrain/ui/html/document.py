"""A page, and the small pieces that pages are made of. Every function takes plain text and escapes it; what it gives is HTML."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from cadtrain.errors import EnvironmentFault
from cadtrain.units import format_bytes

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""No script runs and nothing is fetched, even if a text got through unescaped."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Any text as HTML; `Html` stays as it is. Characters that no page may hold become U+FFFD."""
    if isinstance(text, Html):
        return text
    clean = "".join(c if c in "\t\n" or (c >= " " and not "\ud800" <= c <= "\udfff") else "\ufffd" for c in str(text))
    return Html(html.escape(clean, quote=True))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """`<name …>content</name>`; attributes are written with - for _, without a trailing _, and left out where they are None."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{joined(content)}</{name}>")


def joined(pieces: Iterable[object]) -> Html:
    """The pieces one after the other, each escaped if it is plain text."""
    return Html("".join(escape(piece) for piece in pieces))


def section(title: str, *content: object, note: str = "") -> Html:
    """A titled part of a page."""
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else "", *content)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: Iterable[int] = (0,), caption: str = ""
) -> Html:
    """A table whose first column names its rows, with a head unless `columns` is empty; all columns but `text_columns` hold numbers. It scrolls where it is too wide."""
    is_text = set(text_columns)

    def cells(row: Sequence[object]) -> Html:
        named = {} if 0 not in is_text else {"scope": "row"}
        first = tag("th", row[0], class_=None if 0 in is_text else "n", **named)
        return first + joined(
            tag("td", cell, class_=None if i in is_text else "n") for i, cell in enumerate(row[1:], 1)
        )  # type: ignore[return-value]

    head = (
        tag(
            "thead",
            tag(
                "tr",
                *(tag("th", name, scope="col", class_=None if i in is_text else "n") for i, name in enumerate(columns)),
            ),
        )
        if columns
        else ""
    )
    body = joined(tag("tr", Html(cells(row))) for row in rows)
    title = tag("caption", caption) if caption else ""
    return tag("div", tag("table", title, head, tag("tbody", body)), class_="scroll")


def page(title: str, *body: object) -> str:
    """A whole document, in one file, with its style inside."""
    style = files("cadtrain.ui.html").joinpath("style.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>\n{style}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{joined(body)}\n</main></body></html>\n'
    )


def write_page(path: Path, text: str) -> str:
    """Write a page, whole or not at all; returns its size in words. Raises `EnvironmentFault` where it cannot be written."""
    data = text.encode("utf-8")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"the page cannot be written: {error.strerror or error}.",
            where=str(path),
            hint="Choose another place with `--html`.",
        ) from error
    return format_bytes(len(data))
