"""Point clouds from files: found, read, checked, and brought into the unit frame.

    pcd/<shard>/<name>.npz   pcd/<shard>/<name>.npy   pcd/<name>.npz   pcd/<name>.npy

An array is [N, 3] (x, y, z) or [N, 6] (with normals); an archive holds it under `points`, `xyz`, or as its first array. In the unit
frame the middle of the cloud's box is the origin and its longest side runs from -1 to 1, as `geometry.part` has it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from cadtrain.data.sample import check_points
from cadtrain.errors import DataError

_KEYS = ("points", "xyz")
MISMATCH_DISTANCE = 0.05
"""Median distance from a cloud to the design's surface, in the unit frame, above which it is not a cloud of that design."""


def find_cloud(folder: Path, part_id: str) -> Path | None:
    """The part's cloud under `folder`, or None."""
    name = part_id.rsplit("/", 1)[-1]
    for stem in dict.fromkeys((part_id, name)):
        for suffix in (".npz", ".npy"):
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                return path
    return None


def read_cloud(path: Path) -> np.ndarray:
    """float64[N, 3] or [N, 6]: the array in the file as it is; raises `DataError` for what is no usable cloud."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            array = loaded
        else:
            with loaded:
                names = loaded.files
                key = next((key for key in _KEYS if key in names), names[0] if names else None)
                if key is None:
                    raise DataError("an archive without arrays", where=str(path))
                array = loaded[key]
    # NumPy reports a damaged file in all these ways, depending on which byte is wrong.
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"no readable NumPy array ({error})", where=str(path), hint="Make the cloud again.") from error
    if array.dtype.kind not in "fiu":
        raise DataError(f"an array of {array.dtype}, not of numbers", where=str(path))
    check_points(array, where=str(path))
    return array.astype(np.float64)


def to_unit_frame(cloud: np.ndarray, where: str) -> np.ndarray:
    """The cloud moved and scaled into the unit frame; normals, if any, are made unit length.

    Raises `DataError` for a cloud without extent.
    """
    low, high = cloud[:, :3].min(axis=0), cloud[:, :3].max(axis=0)
    longest = float((high - low).max())
    if not longest > 0:
        raise DataError(f"all {len(cloud)} points are in one place", where=where)
    moved = cloud.copy()
    moved[:, :3] = (cloud[:, :3] - (low + high) / 2) * (2.0 / longest)
    if cloud.shape[1] > 3:
        lengths = np.linalg.norm(cloud[:, 3:], axis=1, keepdims=True)
        moved[:, 3:] = np.divide(cloud[:, 3:], lengths, out=np.zeros_like(cloud[:, 3:]), where=lengths > 0)
    return moved


def has_normals(cloud: np.ndarray) -> bool:
    """Whether every point has a normal; zeros in their place, which some exporters write, are none."""
    return cloud.shape[1] > 3 and bool((np.linalg.norm(cloud[:, 3:], axis=1) > 0.5).all())


def with_normals_of(cloud: np.ndarray, surface: np.ndarray, where: str) -> np.ndarray:
    """float64[N, 6]: each point of `cloud` with the normal of the nearest point of `surface` (float[S, 6]), both in the unit frame.

    Raises `DataError` where the cloud does not lie on the surface.
    """
    distances, nearest = cKDTree(surface[:, :3]).query(cloud[:, :3])
    median = float(np.median(distances))
    if median > MISMATCH_DISTANCE:
        raise DataError(
            f"the cloud is not of this design: half of its points are more than {median:.2f} from the surface "
            "(the part is 2 long)",
            where=where,
        )
    return np.concatenate([cloud[:, :3], surface[nearest, 3:]], axis=1)


def resample(cloud: np.ndarray, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """float32[num_points, C]: points of the cloud drawn without repeating; one that has too few gives each at least once."""
    size = len(cloud)
    if size >= num_points:
        chosen = rng.choice(size, num_points, replace=False)
    else:
        chosen = np.concatenate([np.arange(size), rng.integers(size, size=num_points - size)])
    return np.ascontiguousarray(cloud[chosen], dtype=np.float32)
