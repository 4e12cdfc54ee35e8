"""One sample as it is stored: a design's text with what shows the part (caption, points, views)."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from cadtrain.errors import DataError

POINT_CHANNELS = 6
"""A stored point is x, y, z and its unit normal."""

_UNTOUCHED = "cadtrain: an RGB PNG as it was read"
_RESAMPLE = Image.Resampling.BICUBIC


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A part of a prepared dataset.

    `points` is float32[P, 6], position and unit normal in the part's unit cube, read-only, or None; `images` are PNG files, empty
    where there are none. `sequence` is the compact text of the quantised design. `document` names the design of which this
    part may be one variant among several.
    """

    id: str
    document: str
    caption: str
    sequence: str
    points: np.ndarray | None
    images: tuple[bytes, ...]

    def checked_points(self) -> np.ndarray:
        """float32[P, 6]: the stored points; raises `DataError` naming the sample where there are none or one is not finite."""
        if self.points is None:
            raise DataError(
                "the sample has no points", where=self.id, hint="Check `has_points` before asking for them."
            )
        check_points(self.points, where=self.id)
        return self.points


def check_points(points: np.ndarray, *, where: str) -> None:
    """Raise `DataError` unless `points` is a finite [P, 3] or [P, 6] array with at least one point."""
    if points.ndim != 2 or points.shape[1] not in (3, POINT_CHANNELS) or len(points) == 0:
        raise DataError(
            f"a point cloud of shape {list(points.shape)}",
            where=where,
            hint="Expected [P, 3] (x, y, z) or [P, 6] (x, y, z and a normal) with at least one point.",
        )
    bad = int(np.count_nonzero(~np.isfinite(points).all(axis=1)))
    if bad:
        raise DataError(f"{bad} of {len(points)} points are NaN or infinite", where=where, hint="Make the cloud again.")


def decode_image(data: bytes, size: int, *, where: str | None = None) -> np.ndarray:
    """float32[3, size, size] in [0, 1], red green blue: the picture in the middle of a square.

    A picture that is not square is padded with the colour of its top left pixel, so that no part of the object is cut off;
    transparency becomes white. Raises `DataError` naming `where` for bytes that are no picture.
    """
    square = _as_square(_open_rgb(data, where), size)
    return np.ascontiguousarray(np.asarray(square, dtype=np.float32).transpose(2, 0, 1)) / np.float32(255)


def encode_image(data: bytes, size: int, *, where: str | None = None) -> bytes:
    """The picture as a PNG of `size` x `size`, squared as `decode_image` says; bytes that are that already come back unchanged.

    Raises `DataError` naming `where` for bytes that are no picture.
    """
    picture = _open_rgb(data, where)
    if picture.size == (size, size) and picture.info.get(_UNTOUCHED):
        return data
    buffer = io.BytesIO()
    _as_square(picture, size).save(buffer, format="PNG")
    return buffer.getvalue()


def _open_rgb(data: bytes, where: str | None) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            if picture.mode == "RGB":
                plain = picture.copy()
                plain.info[_UNTOUCHED] = picture.format == "PNG"
                return plain
            if "A" in picture.getbands() or "transparency" in picture.info:
                layer = picture.convert("RGBA")
                white = Image.new("RGBA", layer.size, "white")
                return Image.alpha_composite(white, layer).convert("RGB")
            return picture.convert("RGB")
    # Pillow reports a cut-off file as OSError, a broken chunk as SyntaxError or ValueError, a bomb as an error of its own.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no known picture format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{len(data)} bytes that are no readable picture ({reason})",
            where=where,
            hint="Render the view again or remove it.",
        ) from error


def _as_square(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    if width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), picture.getpixel((0, 0)))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square
    return picture if picture.size == (size, size) else picture.resize((size, size), _RESAMPLE)
