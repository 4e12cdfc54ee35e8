"""Decoding views and checking clouds."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cadtrain.data.sample import Sample, decode_image, encode_image
from cadtrain.errors import DataError


def _png(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


def test_decode_gives_floats_in_channel_order() -> None:
    decoded = decode_image(_png(Image.new("RGB", (8, 8), (255, 128, 0))), 8)
    assert decoded.shape == (3, 8, 8)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded[:, 0, 0], [1.0, 128 / 255, 0.0], atol=1e-6)
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_a_wide_picture_is_padded_not_cropped() -> None:
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste((255, 0, 0), (0, 8, 2, 12))
    picture.paste((0, 0, 255), (38, 8, 40, 12))
    decoded = decode_image(_png(picture), 40)
    assert decoded[:, 0, 0].tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(decoded[:, 20, 0], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(decoded[:, 20, 39], [0, 0, 1], atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_other_modes_become_rgb_and_transparency_white(mode: str) -> None:
    picture = Image.new(mode, (6, 6))
    decoded = decode_image(_png(picture), 6)
    expected = 1.0 if "A" in mode else 0.0
    np.testing.assert_allclose(decoded, expected, atol=1e-6)


def test_encode_keeps_what_needs_no_change() -> None:
    data = _png(Image.new("RGB", (16, 16), "red"))
    assert encode_image(data, 16) is data
    smaller = encode_image(data, 8)
    assert Image.open(io.BytesIO(smaller)).size == (8, 8)
    jpeg = encode_image(_png(Image.new("RGB", (16, 16), "red"), "JPEG"), 16)
    assert jpeg.startswith(b"\x89PNG")


@pytest.mark.parametrize("data", [b"", b"no picture", _png(Image.effect_noise((64, 64), 50).convert("RGB"))[:200]])
def test_bytes_that_are_no_picture_name_the_sample(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^0000/00000007: .*no readable picture"):
        decode_image(data, 8, where="0000/00000007")


def test_points_that_are_not_finite_name_the_sample() -> None:
    points = np.zeros((10, 6), dtype=np.float32)
    sample = Sample("a/1", "a/1", "", "", points, ())
    assert sample.checked_points() is points
    points[3, 1] = np.nan
    with pytest.raises(DataError, match=r"^a/1: 1 of 10 points are NaN or infinite"):
        sample.checked_points()
