"""Numbers and names of an inspection as people read them; the same in the terminal and on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cadtrain.data.inspect import PreparedReport, RawReport, Spread
from cadtrain.data.inspect.values import Bin
from cadtrain.units import format_bytes

Report = RawReport | PreparedReport

ALONE = "design alone"
"""A raw design without caption, cloud and pictures."""
LAYOUTS = {"omni-cad": "Omni-CAD folder", "flat": "folder of design files", "file": "design file"}


@dataclass(frozen=True, slots=True)
class Measure:
    """One distribution to show: its name, what one value counts, and the unit behind its numbers."""

    key: str
    name: str
    spread: Spread
    unit: str = ""
    of: str = "parts"


def whole(number: float) -> str:
    """`1234567` -> `1,234,567`."""
    return f"{number:,.0f}"


def number(value: float) -> str:
    """A whole number in full, any other with three digits that count: `12,836`, `0.0123`, `9.14`, `20`."""
    if isinstance(value, int) or value >= 100 or value == 0:
        return whole(value)
    return f"{value:.3g}"


def percent(part: float, total: float) -> str:
    """`12.3%`; `<0.1%` for what is not nothing, `>99.9%` for what is not all."""
    if not total:
        return "–"
    share = 100 * part / total
    if 0 < share < 0.1:
        return "<0.1%"
    if part < total and share > 99.9:
        return ">99.9%"
    return f"{share:.0f}%" if share in (0, 100) else f"{share:.1f}%"


def bin_label(found: Bin) -> str:
    """`8–11` for whole numbers, `0.5–1` for others."""
    if isinstance(found.low, int):
        return whole(found.low) if found.high - found.low == 1 else f"{whole(found.low)}–{whole(found.high - 1)}"
    return f"{number(found.low)}–{number(found.high)}"


def counted(counts: Mapping[str, int]) -> list[str]:
    """`["join 657 (58.9%)", "new 266 (23.9%)"]`."""
    total = sum(counts.values())
    return [f"{name.replace('_', ' ')} {whole(n)} ({percent(n, total)})" for name, n in counts.items()]


def several(count: int, noun: str) -> str:
    """`1 part`, `2 parts`."""
    return f"{whole(count)} {noun}{'' if count == 1 else 's'}"


def headline(report: Report) -> str:
    """What was looked at, in a line."""
    if isinstance(report, RawReport):
        looked = "" if report.inspected == report.files else f", {whole(report.inspected)} of them inspected"
        size = format_bytes(report.json_bytes)
        return f"{LAYOUTS[report.layout]}, {several(report.files, 'design')} in {size} of JSON{looked}"
    manifest = report.manifest
    stored = []
    if manifest.num_points:
        stored.append(f"{whole(manifest.num_points)} points")
    if manifest.num_views:
        stored.append(f"{several(manifest.num_views, 'view')} of {manifest.image_size} px")
    made = f"prepared from {manifest.source} by cadtrain {manifest.cadtrain_version}"
    kept = f"{' and '.join(stored)} a part" if stored else "no points, no views"
    looked = "" if report.inspected == report.samples else f"; sequences of {whole(report.inspected)} inspected"
    return f"{made}; {kept}; codec {manifest.codec} {manifest.codec_version}{looked}"


def measures(report: Report) -> Iterator[Measure]:
    """The distributions that the report has, in the order in which they are shown."""
    designs, tokens = report.designs, report.tokens
    named: list[tuple[str, str, Spread | None, str, str]] = [
        ("steps", "steps", designs.steps, "", "parts"),
        ("curves", "curves", designs.curves_per_part, "", "parts"),
        ("characters", "sequence, characters", designs.characters, "", "parts"),
        ("caption_characters", "caption, characters", report.captions, "", "captions"),
    ]
    if tokens is not None:
        named.append(("tokens", "sequence, tokens", tokens.sequence, "", "parts"))
        if tokens.caption is not None:
            named.append(("caption_tokens", "caption, tokens", tokens.caption, "", "captions"))
            named.append(("sample_tokens", "both, tokens", tokens.sample, "", "parts"))
    if isinstance(report, RawReport):
        named.append(("size", "longest side, mm", report.size_mm, "mm", "parts"))
    else:
        named.append(("seconds", "making, seconds", report.seconds, "s", "parts"))
        named.append(("memory", "making, peak MiB", report.peak_memory_mib, "MiB", "parts"))
    for key, name, spread, unit, of in named:
        if spread is not None:
            yield Measure(key, name, spread, unit, of)


def modalities(report: Report) -> dict[str, int]:
    """Samples by what they have, the most frequent first."""
    counts: Counter[str] = Counter()
    for found in (
        [report.modalities] if isinstance(report, RawReport) else [s.modalities for s in report.splits.values()]
    ):
        counts.update(found)
    return {ALONE if name == "none" else name: number for name, number in counts.most_common()}


def caption_sources(report: PreparedReport) -> dict[str, int]:
    """Samples by where their captions are from, the most frequent first."""
    counts: Counter[str] = Counter()
    for split in report.splits.values():
        counts.update(split.captions)
    return dict(counts.most_common())


def composition(report: Report) -> Iterator[tuple[str, Mapping[str, int]]]:
    """What designs are made of: a name and counts."""
    designs = report.designs
    yield "operations", designs.operations
    yield "extents", designs.extents
    yield "curves", designs.curves
    yield "sketch planes", designs.planes


@dataclass(frozen=True, slots=True)
class FaultRow:
    """A line of the table of faults: what went wrong where, what became of the input, how many, examples (name, reason)."""

    kind: str
    place: str
    became: str
    count: int
    examples: tuple[tuple[str, str], ...]


def fault_rows(report: Report) -> list[FaultRow]:
    """All faults of the report, those that cost a part first."""
    if isinstance(report, RawReport):
        rows = [FaultRow(f.kind, f.place, "cannot be used", f.count, f.examples) for f in report.refusals]
        faults = report.sources.caption_faults
        return rows + [FaultRow(f.kind, f.place, "no caption", f.count, f.examples) for f in faults]
    rows = [FaultRow(f.kind, f.place, "cannot be read", f.count, f.examples) for f in report.undecodable]
    return rows + [
        FaultRow(f.kind, "", "left out" if f.dropped else "used all the same", f.count, f.examples)
        for f in report.ledger
    ]


def repeats(report: Report) -> list[str]:
    """Sentences about documents, equal designs and leaks."""
    documents, twins = report.documents, report.duplicates
    parts = twins.distinct + twins.repeats
    if not parts:
        return ["no design that can be read"]
    lines = [f"{several(parts, 'part')} of {several(documents.count, 'document')}"]
    if documents.with_variants:
        have = "has variants" if documents.with_variants == 1 else "have variants"
        lines[0] += f"; {whole(documents.with_variants)} {have}, at most {whole(documents.most_variants)}"
    if twins.repeats:
        repeat = "repeats" if twins.repeats == 1 else "repeat"
        lines.append(
            f"{several(twins.repeats, 'part')} ({percent(twins.repeats, parts)}) {repeat} another one's sequence: "
            f"{several(twins.groups, 'group')} of at most {whole(twins.largest)}, {whole(twins.across_documents)} across documents"
        )
    else:
        lines.append("no two parts have the same sequence")
    return lines


def leaks(report: Report) -> str:
    """A sentence about samples whose sequence is in the training split too, or nothing."""
    if isinstance(report, RawReport):
        return ""
    found = [
        f"{whole(n)} of {whole(report.splits[split].samples)} in {split}" for split, n in report.leaks.items() if n
    ]
    return f"samples whose sequence is in train too: {', '.join(found)}" if found else ""
