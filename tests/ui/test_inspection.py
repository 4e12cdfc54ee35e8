"""An inspection in the terminal and as a page."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from cadtrain.data.inspect import Card, LengthOptions, RawReport, inspect_path, inspect_raw
from cadtrain.data.inspect.tally import Fault
from cadtrain.data.inspect.values import Spread
from cadtrain.errors import EnvironmentFault
from cadtrain.ui.html.charts import histogram
from cadtrain.ui.html.document import escape, tag, write_page
from cadtrain.ui.inspect.page import inspection_page
from cadtrain.ui.inspect.terminal import inspection_view
from cadtrain.ui.inspect.words import bin_label, number, percent
from tests.data.inspect.conftest import DISC, PLATE, write_design

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
VOID = {"meta", "img", "wbr"}


class _Checker(HTMLParser):
    """Reads a page and fails where tags do not nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _read(page: str) -> _Checker:
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture
def report(tmp_path: Path) -> RawReport:
    for name, text in (("a", PLATE), ("b", DISC), ("c", DISC)):
        write_design(tmp_path / "designs" / f"{name}.json", text)
    (tmp_path / "designs/broken.json").write_text("{")
    return inspect_raw(tmp_path / "designs", LengthOptions("byte", "byte", budgets=(40, 512))).report


def _card(**changes: object) -> Card:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(buffer, format="WEBP")
    return replace(Card(id="a", sequence=DISC, num_steps=1, picture=buffer.getvalue()), **changes)  # type: ignore[arg-type]


def test_untrusted_text_stays_text(report: RawReport) -> None:
    evil = replace(
        report,
        path=f"/data/{EVIL}",
        refusals=(Fault("schema", f"$.{EVIL}", 1, ((EVIL, EVIL),)),),
    )
    card = _card(id=EVIL, caption=EVIL + "\x00 long enough to be cut" * 20, sequence=EVIL, flags=(EVIL,), split=EVIL)
    found = _read(inspection_page(evil, [card, _card(picture=None, picture_fault=EVIL)]))
    names = [name for name, _ in found.tags]
    assert "script" not in names
    assert names.count("img") == 1
    assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
    text = "".join(found.text)
    assert text.count("<script>alert(1)</script>") >= 7
    assert "\x00" not in text


def test_a_page_needs_nothing_else(report: RawReport) -> None:
    page = inspection_page(report, [_card(caption="A disc")])
    found = _read(page)
    policy = next(a for name, a in found.tags if name == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not {name for name, _ in found.tags} & {"link", "script", "iframe", "object", "base"}
    for _, attributes in found.tags:
        assert "href" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
    assert re.search(r"url\(|@import|https?://", page) is None


def test_a_page_can_be_read_without_seeing_it(report: RawReport) -> None:
    found = _read(inspection_page(report, [_card(caption="A disc")]))
    images = [attributes for name, attributes in found.tags if name == "img"]
    assert [image["alt"] for image in images] == ["a: A disc"]
    charts = [a for name, a in found.tags if name == "svg" and a.get("role") == "img"]
    assert any(
        "Histogram of sequence, tokens over 3 parts: median 34" in (chart["aria-label"] or "") for chart in charts
    )
    others = [a for name, a in found.tags if name == "svg" and a.get("role") != "img"]
    assert all(other["aria-hidden"] == "true" for other in others)
    levels = [int(name[1]) for name, _ in found.tags if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_a_full_page_stays_small(report: RawReport) -> None:
    card = _card(caption="word " * 5000, sequence="L1,2" * 50_000, picture=b"x" * 7500)
    faults = tuple(Fault("schema", f"$.{number}", 1, (("name", "reason " * 5000),) * 3) for number in range(200))
    assert len(inspection_page(replace(report, refusals=faults), [card] * 300)) < 5e6
    assert len(inspection_page(replace(report, refusals=faults), [card] * 48)) < 1.5e6


def test_pages_of_other_reports(synthetic_report: Path, tmp_path: Path) -> None:
    found = _read(inspection_page(inspect_path(synthetic_report, LengthOptions()).report, []))
    assert "validation" in found.text
    (tmp_path / "bad.json").write_text("[]")
    found = _read(inspection_page(inspect_path(tmp_path / "bad.json", LengthOptions("byte", "byte")).report, []))
    assert "no design that can be read" in found.text


@pytest.fixture
def synthetic_report(tmp_path: Path) -> Path:
    from tests.data.conftest import plain_plan, plain_row, write_rows

    return write_rows(tmp_path / "data", [replace(plain_row(i), sequence=DISC) for i in range(12)], plain_plan())


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_view_fits(report: RawReport, synthetic_report: Path, tmp_path: Path, width: int) -> None:
    long = replace(report, refusals=(Fault("schema", "$.entities.*" * 12, 7, (("x" * 60, "reason " * 90),)),))
    (tmp_path / "none.json").write_text("{}")
    others = [
        inspect_path(path, LengthOptions("byte", "byte")).report for path in (synthetic_report, tmp_path / "none.json")
    ]
    for shown in (long, *others):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(inspection_view(shown, width))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        numbers = [line for line in lines if "kept" not in line and re.match(r" *\d", line)]
        assert all("…" not in line for line in numbers if "schema" not in line)


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert write_page(page, "<p>new</p>") == "10 B"
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        write_page(tmp_path / "folder.html", "text")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder.html", "page.html"]


def test_the_pieces_of_a_page() -> None:
    assert tag("p", "a < b", tag("b", "c"), class_="x", title=None) == '<p class="x">a &lt; b<b>c</b></p>'
    assert escape("\ud800\x1b") == "\ufffd\ufffd"


def test_a_chart_draws_every_bin_and_the_marks_within() -> None:
    spread = Spread.of([*range(1, 100), 5000])
    assert spread is not None
    drawing = histogram(spread.histogram, label="x", edge=number, hover=bin_label, marks=(64, 512, 10**6))
    assert drawing.count("<rect") == drawing.count("<title>") == len(spread.histogram)
    assert drawing.count('class="mark"') == 2
    assert ">512<" in drawing
    assert all(0 <= float(x) <= 360 for x in re.findall(r'\bx="([-\d.]+)"', drawing))


def test_numbers_as_people_read_them() -> None:
    assert [number(value) for value in (0, 12836, 12836.2, 20.0, 0.01234, 3.14159)] == [
        "0", "12,836", "12,836", "20", "0.0123", "3.14",
    ]  # fmt: skip
    assert [percent(*pair) for pair in ((1, 3), (1, 10**6), (10**6 - 1, 10**6), (5, 5), (0, 5), (0, 0))] == [
        "33.3%", "<0.1%", ">99.9%", "100%", "0%", "–",
    ]  # fmt: skip
