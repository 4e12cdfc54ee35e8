"""Designs to export, wherever they come from: files of several formats, sequence texts, rows of a prepared dataset."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cadtrain.cad.codec import get_codec
from cadtrain.cad.formats import read_design
from cadtrain.cad.formats.deepcad17 import from_vectors
from cadtrain.cad.quantize import CENTRED_LONGEST_SIDE, dequantize, quantize
from cadtrain.cad.sequence import CadSequence
from cadtrain.errors import DataError, EnvironmentFault, GrammarError, UsageError

SEQUENCE_SIZE_M = 0.1
"""A quantized sequence has no size: 120 steps of its grid, the longest side of most parts, become this long."""
VECTOR_DATASET = "vec"
"""Where DeepCAD's `.h5` files hold the rows."""
SOLID_SUFFIXES = (".step", ".stp", ".iges", ".igs", ".brep", ".stl", ".obj", ".glb", ".gltf", ".3mf", ".ply", ".off")
"""Of solids and meshes, which do not say how they were made."""
_INPUTS_HINT = (
    "Inputs are designs (.json), DeepCAD's vectors (.npy, .h5) and sequence texts (any other suffix, such as .txt)."
)
_EXCERPT = 24
"""Characters shown on either side of a fault in a text."""


@dataclass(frozen=True, slots=True)
class Source:
    """One design to export: a file, or a text in a codec."""

    stem: str
    """Name of the written files, without the suffix."""
    path: Path | None = None
    text: str | None = None
    codec: str | None = None

    @property
    def name(self) -> str:
        """How messages name it."""
        return str(self.path) if self.path is not None else self.stem


@dataclass(frozen=True, slots=True)
class Design:
    """A design that was read, and how long its unit is."""

    sequence: CadSequence
    unit_m: float = 1.0


def file_sources(paths: Sequence[Path]) -> list[Source]:
    """The files as sources, named by their stems."""
    return [Source(path.stem, path=path) for path in paths]


def text_sources(texts: Sequence[str]) -> list[Source]:
    """Texts given by hand: `sequence`, or `sequence_1`, `sequence_2`, … for several."""
    stems = ["sequence"] if len(texts) == 1 else [f"sequence_{number}" for number in range(1, len(texts) + 1)]
    return [Source(stem, text=text) for stem, text in zip(stems, texts, strict=True)]


def dataset_sources(folder: Path, ids: Sequence[str]) -> list[Source]:
    """The parts `ids` of the prepared dataset in `folder`, in that order; `/` in an id becomes `_`.

    Raises `DataError` for a folder that is no dataset, `UsageError` that names all ids that are given twice or not in it.
    """
    from cadtrain.data.manifest import SPLITS, Manifest
    from cadtrain.data.shards import PartDataset

    if twice := [part_id for part_id, count in Counter(ids).items() if count > 1]:
        raise UsageError(f"given twice: {', '.join(twice[:10])}.", where="--id", hint="Name each part once.")
    codec = Manifest.read(folder).codec
    wanted, found = set(ids), {}
    for split in SPLITS:
        rows = PartDataset.open(folder, split)
        places = [place for place, part_id in enumerate(rows.column("id")) if part_id in wanted]
        sequences = rows.column("sequence") if places else []
        found.update({rows[place].id: sequences[place] for place in places})
    missing = [part_id for part_id in ids if part_id not in found]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(ids)} ids are not in the dataset: {', '.join(missing[:10])}.",
            where=str(folder),
            hint="Ids are those of the column `id`, such as 0000/00000071_00005.",
        )
    return [Source(part_id.replace("/", "_"), text=found[part_id], codec=codec) for part_id in ids]


def read_source(source: Source, *, quantized: bool) -> Design:
    """The design of a source; `quantized` rounds one that is exact to the 8-bit grid.

    A file's suffix says what it is: `.json` a design or a text of the codec `json`, `.npy` and `.h5` DeepCAD's vectors,
    anything else a text in one of the codecs. Raises `DataError` with the place and the reason.
    """
    path = source.path
    if path is None:
        return _of_text(source.text or "", source.codec, source.name)
    suffix = path.suffix.lower()
    if suffix in SOLID_SUFFIXES:
        raise DataError(f"{suffix[1:].upper()} is no input format.", where=str(path), hint=_INPUTS_HINT)
    if not path.exists():
        raise DataError("no such file.", where=str(path))
    if suffix in (".npy", ".h5", ".hdf5"):
        rows = _npy(path) if suffix == ".npy" else _hdf5(path)
        return _of_grid(dequantize(from_vectors(rows, str(path))))
    if suffix != ".json":
        return _of_text(_read_text(path), None, str(path))
    text = _read_text(path)
    if text.lstrip().startswith('{"steps":'):
        return _of_text(text, "json", str(path))
    sequence = read_design(path)
    if not quantized:
        return Design(sequence)
    on_grid = dequantize(quantize(sequence))
    return Design(on_grid, max(sequence.material_box().size) / CENTRED_LONGEST_SIDE)


def _of_grid(sequence: CadSequence) -> Design:
    return Design(sequence, SEQUENCE_SIZE_M / CENTRED_LONGEST_SIDE)


def _of_text(text: str, codec: str | None, where: str) -> Design:
    text = text.strip()
    if not text:
        raise DataError("is empty: no sequence to read.", where=where)
    # The first character tells the codecs apart: S, {, or the number of DeepCAD's first command.
    name = codec or ("json" if text[0] == "{" else "deepcad17" if text[0].isdigit() else "compact")
    try:
        return _of_grid(dequantize(get_codec(name).decode(text)))
    except DataError as error:
        error.where = error.where or f"{where} (read as {name})"
        if isinstance(error, GrammarError):
            error.message += f"; {_excerpt(text, error.position)}"
        raise


def _excerpt(text: str, position: int) -> str:
    before, after = text[max(0, position - _EXCERPT) : position], text[position : position + _EXCERPT]
    follows = f"stands {after!r}" if after else "the text ends"
    return f"after {before!r} {follows}" if before else f"there {follows}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}.", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"is no text (byte {error.start} is no UTF-8).",
            where=str(path),
            hint=_INPUTS_HINT,
        ) from error


def _npy(path: Path) -> Any:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(_why(error, "is no .npy file of numbers"), where=str(path)) from error
    return _checked(rows, path)


def _hdf5(path: Path) -> Any:
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as error:
        raise EnvironmentFault(f"cannot be read: {error}.", where=str(path), hint="`pip install h5py`.") from error
    try:
        with h5py.File(path, "r") as file:
            if VECTOR_DATASET not in file:
                raise DataError(f"has no dataset {VECTOR_DATASET!r}: it holds {sorted(file)}.", where=str(path))
            rows = np.asarray(file[VECTOR_DATASET])
    except OSError as error:
        raise DataError(_why(error, "is no HDF5 file, or a damaged one"), where=str(path)) from error
    return _checked(rows, path)


def _why(error: Exception, what: str) -> str:
    """The system's reason where it has one, else what the file is not: the libraries tell of their internals."""
    number = getattr(error, "errno", None)
    return f"cannot be read: {os.strerror(number)}." if number else f"{what}."


def _checked(rows: Any, path: Path) -> Any:
    if getattr(rows, "ndim", None) != 2 or not np.issubdtype(rows.dtype, np.integer):
        shape, dtype = getattr(rows, "shape", "no array"), getattr(rows, "dtype", "?")
        raise DataError(f"holds {dtype} of shape {shape}, not whole numbers of shape [N, 17].", where=str(path))
    return rows
