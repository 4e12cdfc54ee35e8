"""An inspection in a terminal: tables that fit into 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cadtrain.data.inspect import PreparedReport, RawReport, Spread
from cadtrain.data.inspect.lengths import TokenStats
from cadtrain.ui.inspect import words
from cadtrain.ui.inspect.words import FaultRow, Report

_SPARKS = "▁▂▃▄▅▆▇█"
_BAR = "█"
_PARTIAL = " ▏▎▍▌▋▊▉"
_MOST_FAULTS = 12
_EXAMPLE_CHARACTERS = 200


def inspection_view(report: Report, width: int) -> RenderableType:
    """The report for a terminal of `width` columns."""
    parts: list[RenderableType] = [Text(report.path, style="bold"), Text(words.headline(report)), Text()]
    parts += [_raw_counts(report, width)] if isinstance(report, RawReport) else [_splits(report, width)]
    if report.designs.steps is not None:
        parts += [Text(), _measures(report)]
        if report.tokens is not None:
            parts += [Text(), *_tokens(report.tokens, width)]
        parts += [Text(), _counted(words.composition(report), width)]
    parts += [Text(), *(Text(line) for line in words.repeats(report))]
    if found := words.leaks(report):
        parts.append(Text(found, style="yellow"))
    if rows := words.fault_rows(report):
        parts += [Text(), *_faults(rows)]
    return Group(*parts)


def _grid(columns: Sequence[str], *, right: int = 1) -> Table:
    """A table whose columns from `right` on hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= right else "left", no_wrap=True)
    return table


def _raw_counts(report: RawReport, width: int) -> RenderableType:
    share = f" ({words.percent(report.refused, report.inspected)})" if report.refused else ""
    refused = Text(f"{words.whole(report.refused)} refused{share}", style="red" if report.refused else "")
    rows = [("designs", [Text(f"{words.whole(report.readable)} readable"), refused])]
    sources = report.sources
    if report.layout == "omni-cad":
        orphans = (
            f" ({words.whole(sources.captions_without_design)} of no design)" if sources.captions_without_design else ""
        )
        found = f"{words.several(sources.captions, 'caption')}{orphans}", f"{words.several(sources.clouds, 'cloud')}"
        rows.append(
            ("beside them", [Text(text) for text in (*found, f"{words.whole(sources.pictures)} with pictures")])
        )
        rows.append(("modalities", [Text(text) for text in words.counted(words.modalities(report))]))
    return _named(rows, width)


def _splits(report: PreparedReport, width: int) -> RenderableType:
    table = _grid(["split", "samples", "documents", "points", "views", "invalid", "not closed"])
    for name, split in report.splits.items():
        faults = [Text(words.whole(n), style="yellow" if n else "") for n in (split.invalid, split.open)]
        counts = (split.samples, split.documents, split.with_points, split.with_images)
        table.add_row(name, *(words.whole(n) for n in counts), *faults)
    counted = {"modalities": words.modalities(report), "captions": words.caption_sources(report)}
    return Group(table, Text(), _counted(counted.items(), width))


def _counted(rows: Iterable[tuple[str, Mapping[str, int]]], width: int) -> Table:
    return _named([(name, [Text(text) for text in words.counted(counts)]) for name, counts in rows], width)


def _named(rows: Sequence[tuple[str, Sequence[Text]]], width: int) -> Table:
    """Names with their values, which are never broken: a line ends between two of them."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    room = width - 2 - max(len(name) for name, _ in rows)
    for name, values in rows:
        lines = [Text()]
        for value in values:
            if len(lines[-1]) and len(lines[-1]) + 2 + len(value) > room:
                lines.append(Text())
            lines[-1].append_text(Text("  ") + value if len(lines[-1]) else value)
        table.add_row(name, Text("\n").join(lines) if values else Text("none"))
    return table


def _measures(report: Report) -> Table:
    table = _grid(["", "median", "p90", "p99", "most", ""])
    table.columns[-1].justify = "left"
    table.columns[0].style = "bold"
    for measure in words.measures(report):
        spread = measure.spread
        quantiles = (spread.median, spread.p90, spread.p99, spread.max)
        table.add_row(
            measure.name, *(words.number(value) for value in quantiles), Text(_sparkline(spread), style="cyan")
        )
    return table


def _sparkline(spread: Spread) -> str:
    most = max(found.count for found in spread.histogram)
    return "".join(
        _SPARKS[max(0, -(-len(_SPARKS) * found.count // most) - 1)] if found.count else " "
        for found in spread.histogram
    )


def _tokens(tokens: TokenStats, width: int) -> list[RenderableType]:
    title = Text(f"tokens of a sequence: tokenizer {tokens.tokenizer}, codec {tokens.codec}", style="bold")
    if tokens.sequence is None:
        return [title, Text("no sequence to measure")]
    table = _grid(["tokens", "parts", "", ""], right=0)
    table.columns[2].justify = table.columns[3].justify = "left"
    most = max(found.count for found in tokens.sequence.histogram)
    room = max(10, min(40, width - 50))
    seen = 0
    for found in tokens.sequence.histogram:
        seen += found.count
        reached = words.percent(seen, tokens.sequence.count)
        table.add_row(
            words.bin_label(found),
            words.whole(found.count),
            Text(_bar(found.count / most, room).ljust(room), style="cyan"),
            Text(f"{reached:>8} to here", style="dim"),
        )
    parts: list[RenderableType] = [title, table, Text(), _budgets(tokens)]
    if tokens.unwritable:
        text = (
            f"{words.several(tokens.unwritable, 'part')} cannot be written in codec {tokens.codec}; counted as dropped"
        )
        parts.append(Text(text, style="yellow"))
    return parts


def _bar(share: float, room: int) -> str:
    eighths = round(share * room * 8)
    return _BAR * (eighths // 8) + _PARTIAL[eighths % 8].strip()


def _budgets(tokens: TokenStats) -> Table:
    has_captions = tokens.caption is not None
    columns = ["budget", "kept", "", "dropped"] + (["with caption", "", "dropped"] if has_captions else [])
    table = _grid(columns, right=0)
    for budget in tokens.budgets:
        total = budget.kept + budget.dropped
        row = [
            words.whole(budget.tokens),
            words.whole(budget.kept),
            words.percent(budget.kept, total),
            words.whole(budget.dropped),
        ]
        if has_captions:
            kept = budget.kept_with_caption
            row += [words.whole(kept), words.percent(kept, total), words.whole(budget.dropped_with_caption)]
        table.add_row(*row)
    return table


def _faults(rows: Sequence[FaultRow]) -> list[RenderableType]:
    parts: list[RenderableType] = [Text("faults", style="bold")]
    for row in rows[:_MOST_FAULTS]:
        head = Text.assemble(
            f"{words.whole(row.count):>7}  ", (row.kind, "red"), f" {row.place}" if row.place else "", (f", {row.became}", "dim"),
            overflow="ellipsis", no_wrap=True,
        )  # fmt: skip
        parts.append(head)
        for name, reason in row.examples[:1]:
            text = " ".join(f"{name}: {reason}".split())
            cut = text if len(text) <= _EXAMPLE_CHARACTERS else f"{text[: _EXAMPLE_CHARACTERS - 1]}…"
            parts.append(Padding(Text(cut, style="dim"), (0, 0, 0, 9)))
    if len(rows) > _MOST_FAULTS:
        parts.append(Text(f"         and {len(rows) - _MOST_FAULTS} more kinds; `--json` has all of them", style="dim"))
    return parts
