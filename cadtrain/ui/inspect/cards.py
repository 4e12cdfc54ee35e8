"""Designs to look at: a picture, what is known of each, and its caption and sequence to unfold."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence

from cadtrain.data.inspect import Card
from cadtrain.ui.html.document import Html, section, tag
from cadtrain.ui.inspect import words

_SHORT_CAPTION = 120
_MOST_CAPTION = 1000
_MOST_SEQUENCE = 4000
"""Characters shown of one design, so that a page of 300 stays small."""


def gallery(cards: Sequence[Card]) -> Html:
    """All cards, in their order; nothing where there are none."""
    if not cards:
        return Html("")
    note = (
        f"{words.several(len(cards), 'design')} from the shortest to the longest, spread evenly over all lengths, "
        "no two of them equal; the longest, those with the most steps and faulty ones are marked."
    )
    return section("Designs", tag("div", *(_card(card) for card in cards), class_="gallery"), note=note)


def _card(card: Card) -> Html:
    known = [card.split, words.several(card.num_steps, "step")]
    known.append(
        f"{words.whole(card.num_tokens)} tokens"
        if card.num_tokens is not None
        else f"{words.whole(len(card.sequence))} characters"
    )
    flags = tag("ul", *(tag("li", flag) for flag in card.flags), class_="flags") if card.flags else ""
    short = _cut(card.caption, _SHORT_CAPTION)
    is_cut = len(short) < len(card.caption)
    unfolds = "Caption and sequence" if is_cut else "Sequence"
    full = tag("p", _cut(card.caption, _MOST_CAPTION)) if is_cut else ""
    return tag(
        "figure",
        tag("div", _picture(card), class_="tile"),
        tag(
            "figcaption",
            tag("h3", card.id, class_="id"),
            tag("p", ", ".join(filter(None, known)), class_="meta"),
            flags,
            tag("p", short, class_="caption cut" if is_cut else "caption") if short else "",
            tag("details", tag("summary", unfolds), full, tag("pre", _sequence(card.sequence))),
        ),
        class_="card",
    )


def _picture(card: Card) -> Html:
    if card.picture is None:
        return tag("p", f"No picture: {_cut(card.picture_fault, 160)}")
    data = b64encode(card.picture).decode("ascii")
    described = f"{card.id}: {_cut(card.caption, _SHORT_CAPTION)}" if card.caption else f"View of {card.id}"
    return Html(
        str(
            tag(
                "img",
                src=f"data:image/webp;base64,{data}",
                alt=described,
                width=224,
                height=224,
                loading="lazy",
                decoding="async",
            )
        ).removesuffix("</img>")
    )


def _sequence(text: str) -> str:
    if len(text) <= _MOST_SEQUENCE:
        return text
    return f"{text[:_MOST_SEQUENCE]}…\n({words.whole(len(text))} characters in all)"


def _cut(text: str, most: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[: most - 1].rstrip()}…"
