"""The generated documents say what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cadtrain.cli.document import COMMAND, documents, main

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", ["cli.md", "config.md"])
def test_documents_are_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == documents()[name], f"regenerate with `{COMMAND}`"


def test_links_inside_lead_somewhere() -> None:
    text = documents()["cli.md"]
    headings = {line.lstrip("# ").strip("`").replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    assert {link for link in re.findall(r"\]\(#([^)]+)\)", text)} <= headings
    for link in re.findall(r"\]\((\.\./[^)]+)\)", documents()["config.md"]):
        assert (DOCS / link).is_file(), link


def test_every_option_is_explained() -> None:
    rows = [line for line in documents()["cli.md"].splitlines() if line.startswith(("| `-", "| `["))]
    assert rows
    assert [row for row in rows if row.rstrip().endswith("|  |")] == []


def test_writing(tmp_path: Path) -> None:
    main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cli.md", "config.md"}
