"""Small datasets that the tests of this folder share."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from cadtrain.cad.codec import get_codec
from cadtrain.data.splits import split_documents
from cadtrain.data.synth.make import synthesize
from cadtrain.data.writing.columns import Row
from cadtrain.data.writing.writer import DatasetWriter, LedgerEntry, Plan


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 16 procedural parts, 256 points, one view of 64 pixels."""
    out = tmp_path_factory.mktemp("synthetic") / "parts"
    synthesize(16, out, seed=7, num_points=256, num_views=1, image_size=64, workers=1)
    return out


def plain_row(index: int, *, num_points: int = 4, images: tuple[bytes, ...] = ()) -> Row:
    """A row that no kernel made."""
    rng = np.random.default_rng(index)
    points = rng.normal(size=(num_points, 6)).astype(np.float32) if num_points else None
    name = f"doc/{index:08d}"
    return Row(
        id=name, document=name, caption=f"part {index}", caption_source="file", sequence=f"S{index}.", num_steps=1,
        points=points, images=images,
    )  # fmt: skip


def plain_plan(num_points: int = 4, **settings: object) -> Plan:
    """A plan for plain rows."""
    return Plan(
        source="test", seed=0, codec=get_codec("compact"), num_points=num_points, num_views=0, image_size=0,
        settings=dict(settings),
    )  # fmt: skip


def write_rows(out: Path, rows: list[Row], plan: Plan, entries: tuple[LedgerEntry, ...] = ()) -> Path:
    """A dataset of these rows, in one chunk, split by document."""
    splits = split_documents(row.document for row in rows)
    with DatasetWriter(out, plan) as writer:
        with writer.chunk(0) as chunk:
            for entry in entries:
                chunk.note(asdict(entry))
            for row in rows:
                chunk.add(row, splits[row.document])
        writer.finish()
    return out
