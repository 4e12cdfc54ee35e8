"""Which designs a page shows, and their pictures."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cadtrain.data.inspect import LengthOptions, PreparedScan, inspect_path, inspect_raw, make_gallery
from cadtrain.data.inspect.gallery import PICTURE_SIZE, choose
from cadtrain.data.inspect.tally import DesignTally
from tests.data.inspect.conftest import CUT_PLATE, DISC, PLATE, write_design


def _tally(lengths: list[int], steps: list[int], hashes: list[int] | None = None) -> DesignTally:
    tally = DesignTally()
    tally.positions.extend(range(100, 100 + len(lengths)))
    tally.characters.extend(lengths)
    tally.steps.extend(steps)
    tally.hashes.extend(hashes or range(len(lengths)))
    return tally


def test_a_choice_spreads_over_all_lengths_with_the_extremes() -> None:
    lengths = np.random.default_rng(0).permutation(1000)
    picks = choose(_tally(lengths.tolist(), [1] * 999 + [9]), 32, {})
    chosen = [int(lengths[pick.row]) for pick in picks]
    assert chosen == sorted(chosen)
    assert len(chosen) == len(set(chosen)) == 32
    assert chosen[-3:] == [997, 998, 999]
    assert all("longest" in pick.flags for pick in picks[-3:])
    assert "most steps" in next(pick.flags for pick in picks if pick.row == 999)
    assert max(b - a for a, b in itertools.pairwise(chosen)) < 80


def test_no_two_chosen_designs_are_equal() -> None:
    picks = choose(_tally([5] * 50, [1] * 50, [number % 4 for number in range(50)]), 10, {})
    assert sorted(pick.row % 4 for pick in picks) == [0, 1, 2, 3]


def test_faulty_designs_are_chosen_and_marked() -> None:
    tally = _tally(list(range(200)), [1] * 200)
    picks = choose(tally, 12, {"invalid": [150], "not closed": [150, 151]})
    assert {pick.row: pick.flags for pick in picks if pick.row in (50, 51)} == {
        50: ("invalid", "not closed"),
        51: ("not closed",),
    }


def test_a_choice_from_nothing_is_nothing() -> None:
    assert choose(DesignTally(), 5, {"invalid": []}) == []


@pytest.mark.kernel
def test_cards_of_a_raw_folder(raw_folder: Path) -> None:
    scan = inspect_raw(raw_folder, LengthOptions("byte", "byte"))
    told: list[tuple[int, int]] = []
    cards = make_gallery(scan, 8, workers=1, time_limit_seconds=60, progress=lambda *done: told.append(done))
    assert [card.sequence for card in cards] == [DISC, PLATE, CUT_PLATE]
    assert [card.caption for card in cards] == ["A disc", "A plate <script>alert('x')</script> with a hole", ""]
    assert [card.num_tokens for card in cards] == [len(DISC), len(PLATE), len(CUT_PLATE)]
    assert told[0] == (1, 3)  # the disc has a picture of its own
    assert told[-1] == (3, 3)
    for card in cards:
        assert card.picture is not None
        with Image.open(io.BytesIO(card.picture)) as picture:
            assert (picture.format, picture.size) == ("WEBP", (PICTURE_SIZE, PICTURE_SIZE))


@pytest.mark.kernel
def test_a_part_that_takes_too_long_has_a_card_without_a_picture(tmp_path: Path) -> None:
    write_design(tmp_path / "one.json", PLATE)
    (card,) = make_gallery(inspect_raw(tmp_path, LengthOptions()), 1, workers=1, time_limit_seconds=1e-6)
    assert card.picture is None
    assert "not done after" in card.picture_fault
    assert "not built" in card.flags


def test_cards_of_a_dataset_use_its_views(synthetic: Path) -> None:
    scan = inspect_path(synthetic, LengthOptions())
    assert isinstance(scan, PreparedScan)
    cards = make_gallery(scan, 100, workers=1, time_limit_seconds=1e-6)
    assert len(cards) == scan.report.duplicates.distinct
    assert all(card.picture and card.caption and card.caption_source == "generated" for card in cards)
    assert {card.split for card in cards} == {"train", "validation", "test"}
    by_id = {
        scan.splits["train"].dataset[i].id: scan.splits["train"].dataset[i]
        for i in range(len(scan.splits["train"].dataset))
    }
    assert all(by_id[card.id].sequence == card.sequence for card in cards if card.split == "train")
