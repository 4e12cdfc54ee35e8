"""Values with a unit."""

from __future__ import annotations

import pytest

from cadtrain.units import parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13_800), ("3:50:00", 13_800), ("1-02:00:00", 93_600), ("1d 2h", 93_600), ("90 minutes", 5_400), ("2 Hours 5 min", 7_500),
     ("45s", 45), (30, 30), (1.5, 1.5)],
)  # fmt: skip
def test_lengths_of_time(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "0", "0h", "abc", "3h50", "-1h", "1:2:3", 0, -5, True, float("inf")])
def test_what_is_no_length_of_time(text: str | float) -> None:
    with pytest.raises(ValueError, match="no length of time above 0"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("512MiB", 512 << 20), ("1.5 kb", 1500), ("7", 7), ("2TiB", 2 << 40), ("3g", 3 * 10**9), ("9B", 9)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.1B", "5XB", "5 GB more", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="no size above 0"):
        parse_bytes(text)
