"""Charts as inline SVG, coloured by the page's style: they follow light and dark, and print."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from cadtrain.data.inspect.values import Bin
from cadtrain.ui.html.document import Html, escape, joined, tag

_HEIGHT = 150
_TOP, _BOTTOM = 26, 22
_CHARACTER = 6.3
"""Width of a digit in the charts' font, bold and in a wide face, in the drawing's units."""


def bars(
    counts: Mapping[str, int], *, whole: Callable[[float], str], percent: Callable[[float, float], str], label: str
) -> Html:
    """Counts by name as a table with a bar to each, the longest bar for the largest count."""
    total, most = sum(counts.values()), max(counts.values(), default=0)
    rows = []
    for name, count in counts.items():
        rect = f'<rect width="{100 * count / most if most else 0:.2f}" height="8" rx="1"/>'
        bar = Html(f'<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{rect}</svg>')
        rows.append(
            tag(
                "tr", tag("th", name, scope="row"), tag("td", bar, class_="bar"), tag("td", whole(count), class_="n"),
                tag("td", percent(count, total), class_="n dim"),
            )
        )  # fmt: skip
    return tag("table", tag("caption", label), tag("tbody", joined(rows)), class_="bars")


def histogram(
    bins: Sequence[Bin],
    *,
    label: str,
    edge: Callable[[float], str],
    hover: Callable[[Bin], str],
    marks: Sequence[float] = (),
    width: int = 360,
) -> Html:
    """A histogram with bins of equal width on the page, whatever they span; `label` says in words what it shows.

    `edge` writes a bin's end, `hover` what a pointer over a bar reads; `marks` are values to draw a line at.
    """
    room = _HEIGHT - _TOP - _BOTTOM
    most = max(found.count for found in bins)
    step = width / len(bins)
    parts = []
    for index, found in enumerate(bins):
        height = max(1.5, room * found.count / most) if found.count else 0
        x, y = index * step, _TOP + room - height
        rect = f'<rect x="{x + step * 0.06:.1f}" y="{y:.1f}" width="{step * 0.88:.1f}" height="{height:.1f}" rx="1.5"/>'
        number = f"{found.count:,}"
        shown = ""
        if found.count and len(number) * _CHARACTER <= step + 3:
            shown = f'<text class="count" x="{x + step / 2:.1f}" y="{y - 3:.1f}">{number}</text>'
        parts.append(f"<g><title>{escape(hover(found))}</title>{rect}{shown}</g>")
    parts.append(f'<path class="axis" d="M0 {_TOP + room + 0.5}H{width}"/>')
    parts += _edges(bins, edge, step, _TOP + room, width)
    parts += _marks(bins, edge, marks, step, room)
    return Html(
        f'<svg class="histogram" viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _edges(bins: Sequence[Bin], edge: Callable[[float], str], step: float, bottom: float, width: int) -> list[str]:
    """Labels below the axis: under the bars where each holds one whole number, else between them; as many as there is room for."""
    is_single = all(isinstance(b.low, int) and b.high - b.low == 1 for b in bins)
    places = [((i + 0.5 * is_single) * step, edge(b.low)) for i, b in enumerate(bins)]
    if not is_single:
        places.append((width, edge(bins[-1].high)))
    every = max(1, math.ceil((max(len(text) for _, text in places) * _CHARACTER + 6) / step))
    labels: list[str] = []
    end = -math.inf
    for place, text in places[::every]:
        half = len(text) * _CHARACTER / 2
        x = min(max(place, half), width - half)
        if x - half >= end + 3:
            labels.append(f'<text class="edge" x="{x:.1f}" y="{bottom + 14}">{escape(text)}</text>')
            end = x + half
    return labels


def _marks(
    bins: Sequence[Bin], edge: Callable[[float], str], marks: Sequence[float], step: float, room: float
) -> list[str]:
    drawn = []
    last = -math.inf
    for mark in sorted(marks):
        place = _place(bins, mark)
        if place is None:
            continue
        x = place * step
        drawn.append(f'<path class="mark" d="M{x:.1f} {_TOP - 14}V{_TOP + room}"/>')
        text = edge(mark)
        if x - last >= len(text) * _CHARACTER + 4:
            anchor = "end" if x + len(text) * _CHARACTER + 3 > step * len(bins) else "start"
            offset = -3 if anchor == "end" else 3
            drawn.append(
                f'<text class="marked" x="{x + offset:.1f}" y="{_TOP - 15}" text-anchor="{anchor}">{escape(text)}</text>'
            )
            last = x
    return drawn


def _place(bins: Sequence[Bin], value: float) -> float | None:
    """Where a value lies, in bins from the left; within a bin by its logarithm. None where it is outside."""
    for index, found in enumerate(bins):
        if found.low <= value < found.high:
            if found.low <= 0:
                return index + (value - found.low) / (found.high - found.low)
            return index + math.log(value / found.low) / math.log(found.high / found.low)
    return None
