"""An inspection as a page of HTML: figures, charts, faults, and designs to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cadtrain import __version__
from cadtrain.data.inspect import Card, PreparedReport, RawReport, TokenStats
from cadtrain.data.inspect.values import Bin
from cadtrain.ui.html.charts import bars, histogram
from cadtrain.ui.html.document import Html, escape, joined, page, section, table, tag
from cadtrain.ui.inspect import words
from cadtrain.ui.inspect.cards import gallery
from cadtrain.ui.inspect.words import Measure, Report

_MOST_FAULTS = 40
_EXAMPLE_CHARACTERS = 300
_WIDE, _NARROW = 440, 360


def inspection_page(report: Report, cards: Sequence[Card], *, made: str = "") -> str:
    """The whole page; `made` says when and how in its last line."""
    name = Path(report.path).resolve().name or report.path
    head = [tag("h1", name), tag("p", words.headline(report), class_="lead"), _figures(report)]
    parts = [
        _contents(report),
        _lengths(report),
        _composition(report),
        _repeats(report),
        _faults(report),
        gallery(cards),
    ]
    last = ". ".join(filter(None, (f"cadtrain {__version__}, data inspect {report.path}", made)))
    return page(f"{name} · cadtrain data", tag("header", *head), *parts, tag("footer", last))


# -------------------------------------------------------------------------------------------- figures


def _figures(report: Report) -> Html:
    found: list[tuple[str, str, bool]] = []  # label, number, whether it is bad news
    if isinstance(report, RawReport):
        found.append(("designs readable", words.whole(report.readable), False))
        share = f" ({words.percent(report.refused, report.inspected)})" if report.refused else ""
        found.append((f"refused{share}", words.whole(report.refused), report.refused > 0))
    else:
        found.append(("samples", words.whole(report.samples), False))
        left_out = sum(report.failures.values())
        found.append(("inputs left out", words.whole(left_out), left_out > 0))
    found.append(("documents", words.whole(report.documents.count), False))
    if report.designs.steps:
        found.append(("steps, median", words.number(report.designs.steps.median), False))
    found += _length_figures(report)
    found.append(("repeat another's sequence", words.whole(report.duplicates.repeats), False))
    if isinstance(report, PreparedReport):
        leaked = sum(report.leaks.values())
        found.append(("leak from train", words.whole(leaked), leaked > 0))
    return tag(
        "dl",
        *(tag("div", tag("dt", label), tag("dd", text, class_="bad" if bad else None)) for label, text, bad in found),
        class_="figures",
    )


def _length_figures(report: Report) -> list[tuple[str, str, bool]]:
    tokens = report.tokens
    if tokens is None or tokens.sequence is None:
        characters = report.designs.characters
        return [("characters, median", words.number(characters.median), False)] if characters else []
    found = [("tokens, median", words.number(tokens.sequence.median), False)]
    if tokens.budgets:
        budget = tokens.budgets[len(tokens.budgets) // 2]
        kept = words.percent(budget.kept, budget.kept + budget.dropped)
        found.append((f"fit into {words.whole(budget.tokens)} tokens", kept, False))
    return found


# -------------------------------------------------------------------------------------------- contents and lengths


def _contents(report: Report) -> Html:
    counted = [_bars("modalities", words.modalities(report))]
    if isinstance(report, RawReport):
        if report.layout != "omni-cad":
            return Html("")
        sources = report.sources
        beside = {
            "captions": sources.captions,
            "designs with a cloud": sources.clouds,
            "designs with pictures": sources.pictures,
        }
        if sources.captions_without_design:
            beside["captions of no design"] = sources.captions_without_design
        listed = [(name, words.whole(number)) for name, number in beside.items()]
        return section(
            "What is there", tag("div", *counted, table((), listed, caption="beside the designs"), class_="columns")
        )
    columns = (
        "split",
        "samples",
        "share",
        "documents",
        "with points",
        "with views",
        "invalid",
        "not closed",
        "median steps",
    )
    rows = [
        (
            name, words.whole(split.samples), words.percent(split.samples, report.samples), words.whole(split.documents),
            words.whole(split.with_points), words.whole(split.with_images), _bad(split.invalid), _bad(split.open),
            words.number(split.steps.median) if split.steps else "–",
        )
        for name, split in report.splits.items()
    ]  # fmt: skip
    splits = _bars("splits", {name: split.samples for name, split in report.splits.items()})
    counted = [splits, *counted, _bars("captions come from", words.caption_sources(report))]
    return section(
        "What is there", tag("div", *counted, class_="columns"), tag("div", table(columns, rows), class_="below")
    )


def _bad(count: int) -> Html:
    return tag("span", words.whole(count), class_="bad" if count else None)


def _bars(label: str, counts: dict[str, int]) -> Html:
    return bars(
        {name.replace("_", " "): n for name, n in counts.items()}, whole=words.whole, percent=words.percent, label=label
    )


def _lengths(report: Report) -> Html:
    tokens = report.tokens
    measures = {measure.key: measure for measure in words.measures(report)}
    top: list[Html] = []
    if tokens is not None:
        # Lengths once, in the unit that counts.
        for key in ("characters", "caption_characters"):
            measures.pop(key, None)
        if "tokens" in measures:
            marks = [budget.tokens for budget in tokens.budgets]
            top = [_chart(measures.pop("tokens"), marks=marks, width=_WIDE), _budgets(tokens)]
    if not measures:
        return Html("")
    note = (
        f"Tokens of the {tokens.codec} text, counted by {tokens.tokenizer}. Dashed lines are the budgets. "
        "The instruction and the tokens of points and views come on top."
        if tokens is not None
        else ""
    )
    is_wide = len(measures) in (2, 4)  # else the last row would hold one
    charts = [_chart(measure, width=_WIDE if is_wide else _NARROW) for measure in measures.values()]
    classes = " ".join(["columns", *["wide"] * is_wide, *["below"] * bool(top)])
    wide = tag("div", *top, class_="columns wide") if top else ""
    return section("How long, how large", wide, tag("div", *charts, class_=classes), note=note)


def _chart(measure: Measure, *, width: int, marks: Sequence[float] = ()) -> Html:
    spread = measure.spread
    quantiles = f"median {words.number(spread.median)}, p90 {words.number(spread.p90)}, most {words.number(spread.max)}"

    def hover(found: Bin) -> str:
        return f"{words.bin_label(found)}: {words.whole(found.count)} {measure.of} ({words.percent(found.count, spread.count)})"

    drawing = histogram(
        spread.histogram,
        label=f"Histogram of {measure.name} over {words.whole(spread.count)} {measure.of}: {quantiles}",
        edge=words.number,
        hover=hover,
        marks=marks,
        width=width,
    )
    caption = tag("figcaption", tag("h3", measure.name), tag("span", quantiles, class_="quantiles"))
    return tag("figure", caption, drawing, class_="chart")


def _budgets(tokens: TokenStats) -> Html:
    has_captions = tokens.caption is not None
    columns = ["budget", "kept", "", "dropped"] + (["kept with caption", ""] if has_captions else [])
    rows = []
    for budget in tokens.budgets:
        total = budget.kept + budget.dropped
        row = [
            words.whole(budget.tokens),
            words.whole(budget.kept),
            words.percent(budget.kept, total),
            words.whole(budget.dropped),
        ]
        if has_captions:
            row += [words.whole(budget.kept_with_caption), words.percent(budget.kept_with_caption, total)]
        rows.append(row)
    parts = [table(columns, rows, text_columns=(), caption="what a budget of tokens keeps")]
    if tokens.unwritable:
        text = f"{words.several(tokens.unwritable, 'part')} cannot be written in this codec and count as dropped."
        parts.append(tag("p", text, class_="note bad"))
    return tag("div", *parts)


def _composition(report: Report) -> Html:
    found = [_bars(name, dict(counts)) for name, counts in words.composition(report) if counts]
    return section("What designs are made of", tag("div", *found, class_="columns narrow")) if found else Html("")


# -------------------------------------------------------------------------------------------- repeats and faults


def _repeats(report: Report) -> Html:
    parts: list[object] = [tag("p", line) for line in words.repeats(report)]
    if found := words.leaks(report):
        parts.append(tag("p", found, class_="bad"))
    tables = []
    if isinstance(report, PreparedReport) and report.leak_examples:
        rows = [(tag("code", leak.id), leak.split, tag("code", leak.train_id)) for leak in report.leak_examples]
        tables.append(table(("sample", "in", "the same as, in train"), rows, text_columns=(0, 1, 2)))
    if report.duplicates.examples:
        groups = [
            (tag("code", ", ".join(g.names), "" if g.count == len(g.names) else ", …"), g.count)
            for g in report.duplicates.examples
        ]
        tables.append(table(("equal designs", "parts"), groups))
    return section("Repeats", *parts, tag("div", *tables, class_="columns wide below") if tables else "")


def _faults(report: Report) -> Html:
    found = words.fault_rows(report)
    if not found:
        return section("Faults", tag("p", "None."))
    rows = []
    for row in found[:_MOST_FAULTS]:
        kind = joined((row.kind, tag("code", _breakable(row.place), class_="place") if row.place else ""))
        examples = tag("ul", *(tag("li", tag("code", name), ": ", _cut(reason)) for name, reason in row.examples))
        rows.append((kind, words.whole(row.count), row.became, examples))
    shown = table(("fault", "inputs", "", "for example"), rows, text_columns=(0, 2, 3))
    more = (
        f"{len(found) - _MOST_FAULTS} more kinds of faults are in the output of --json."
        if len(found) > _MOST_FAULTS
        else ""
    )
    return section("Faults", tag("div", shown, class_="faults"), tag("p", more, class_="dim") if more else "")


def _breakable(place: str) -> Html:
    """A place in a document that a line may break before each dot of."""
    return Html(escape(place).replace(".", "<wbr>."))


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _EXAMPLE_CHARACTERS else f"{flat[: _EXAMPLE_CHARACTERS - 1]}…"
