"""Designs as files for other programs: STEP, STL, GLB, PNG, CadQuery, DeepCAD's vectors and JSON, text.

Every design is made in a worker that a time limit can kill, into a folder beside the results; its files are moved to their
names together, once all of them are there. So a failure leaves nothing of its design, and nothing half written. That folder,
`.export-<host>-<process>-…`, outlives only a process that was killed; the next export into the same place on that host removes it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cadtrain.cad.codec import get_codec
from cadtrain.cad.formats.cadquery_code import to_cadquery
from cadtrain.cad.formats.deepcad import to_deepcad_json
from cadtrain.cad.formats.deepcad17 import limits, to_vectors
from cadtrain.cad.quantize import quantize
from cadtrain.data.export.options import ExportFormat, ExportOptions
from cadtrain.data.export.source import Design, Source, read_source
from cadtrain.data.writing.pipeline import CAMERA_ORDER
from cadtrain.errors import DataError, EnvironmentFault, GeometryError, UsageError
from cadtrain.geometry.sandbox import KERNEL_MODULE, Failure, KernelPool

_DATA_KINDS = {"schema", "grammar", "data"}
_STAGING = ".export-"
_PROBE_BYTES = 8 << 20
"""What a disk must still take for a failure of the kernel's writer not to be the disk's."""
_OTHER_HINT = "Give another folder with --out."
_OUT_HINT = "Make room or give another folder with --out; designs that were done are there, --force makes all again."


@dataclass(frozen=True, slots=True)
class Exported:
    """One design's end: its files, remarks on them, or why there are none."""

    name: str
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What an export did, design by design."""

    out: Path
    designs: tuple[Exported, ...] = field(default_factory=tuple)

    @property
    def failed(self) -> tuple[Exported, ...]:
        """Designs without files."""
        return tuple(design for design in self.designs if design.failure is not None)

    @property
    def num_files(self) -> int:
        """Files written."""
        return sum(len(design.files) for design in self.designs)

    @property
    def failures(self) -> dict[str, int]:
        """Failures by kind, the most frequent first."""
        return dict(Counter(d.failure.kind for d in self.failed if d.failure).most_common())

    @property
    def exit_code(self) -> int:
        """0, or 2 where all that failed is input that cannot be read, else 4."""
        kinds = set(self.failures)
        return 0 if not kinds else DataError.exit_code if kinds <= _DATA_KINDS else 4


@dataclass(frozen=True, slots=True)
class _Task:
    source: Source
    options: ExportOptions
    folder: Path


def export(
    sources: Sequence[Source],
    out: Path,
    options: ExportOptions,
    *,
    workers: int = 1,
    time_limit_seconds: float = 60.0,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportSummary:
    """Write every source's files into `out`; a source that fails is a result, and the others are still written.

    Raises `UsageError`, before anything is written, where two sources would write the same file, a file is there and
    `force` is not given, `out` cannot be a folder, or a file would replace an input; `EnvironmentFault` with the system's reason where
    a folder or file cannot be written, by this process or by a worker: the work ends there, and what was done stays.
    """
    check_names(sources, out, options, force=force)
    needs_kernel = any(format_.needs_solid for format_ in options.formats)
    preload = (__name__, KERNEL_MODULE) if needs_kernel else (__name__,)
    designs: list[Exported] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{socket.gethostname()}-{os.getpid()}-", dir=out))
        try:
            tasks = [_Task(source, options, staging / str(number)) for number, source in enumerate(sources)]
            with KernelPool(min(workers, len(tasks)), time_limit_seconds, preload=preload) as pool:
                for task, outcome in zip(tasks, pool.map(_make, tasks), strict=True):
                    if outcome.failure is not None:
                        designs.append(Exported(task.source.name, failure=outcome.failure))
                    else:
                        files = _publish(task.folder, options.names(task.source.stem), out)
                        designs.append(Exported(task.source.name, files, tuple(outcome.value or ())))
                    shutil.rmtree(task.folder, ignore_errors=True)
                    progress(len(designs), len(tasks))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError("is no folder, nor can it be made one.", where=str(out), hint=_OTHER_HINT) from error
    except OSError as error:
        raise _unwritable(error, out) from error
    return ExportSummary(out, tuple(designs))


def _unwritable(error: OSError, path: Path) -> EnvironmentFault:
    return EnvironmentFault(f"cannot be written: {error.strerror or error}.", where=str(path), hint=_OUT_HINT)


def _remove_stale(out: Path) -> None:
    """Remove the staging folders that killed processes of this host have left."""
    for folder in out.glob(f"{_STAGING}*"):
        host, _, rest = folder.name.removeprefix(_STAGING).rpartition("-")[0].rpartition("-")
        if host == socket.gethostname() and rest.isdigit() and not _is_alive(int(rest)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def check_names(sources: Sequence[Source], out: Path, options: ExportOptions, *, force: bool) -> None:
    """Raise `UsageError` with every name that stands in the way."""
    if not sources:
        raise UsageError("nothing to export.", hint="Name files, `--dataset` with `--id`, or `--text`.")
    if out.exists() and not out.is_dir():
        raise UsageError("is a file, not a folder.", where=str(out), hint=_OTHER_HINT)
    nameless = [source.name for source in sources if source.stem in ("", ".", "..") or "/" in source.stem]
    if nameless:
        raise UsageError(_listed("inputs whose names cannot name a file", nameless))
    inputs = {source.path.resolve() for source in sources if source.path is not None}
    places = Counter(source.path.resolve() for source in sources if source.path is not None)
    if twice := [str(place) for place, count in places.items() if count > 1]:
        raise UsageError(_listed(f"{_several(len(twice), 'input')} given twice", twice), hint="Name each file once.")
    writers: dict[str, list[str]] = {}
    for source in sources:
        for name in options.names(source.stem):
            writers.setdefault(name, []).append(source.name)
    shared = [f"{name}: {', '.join(names)}" for name, names in writers.items() if len(names) > 1]
    if shared:
        raise UsageError(
            _listed(f"{_several(len(shared), 'file')} would be written twice", shared),
            hint="Export inputs of one name into different folders.",
        )
    replaced = [str(out / name) for name in writers if (out / name).resolve() in inputs]
    if replaced:
        raise UsageError(_listed("inputs would be replaced by their own export", replaced), hint="Use another --out.")
    present = [str(out / name) for name in writers if (out / name).exists()]
    if present and not force:
        raise UsageError(
            _listed(f"{_several(len(present), 'file')} in the way", present), hint="Give --force to replace them."
        )


def _several(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(head: str, items: Sequence[str], most: int = 20) -> str:
    more = [f"  and {len(items) - most} more"] if len(items) > most else []
    return "\n".join([f"{head}:", *(f"  {item}" for item in items[:most]), *more])


def _publish(folder: Path, names: Sequence[str], out: Path) -> tuple[Path, ...]:
    for name in names:
        os.replace(folder / name, out / name)
    return tuple(out / name for name in names)


# ------------------------------------------------------------------------------------------------------ in the worker process


def _make(task: _Task) -> tuple[str, ...]:
    """Write one design's files into its own folder; remarks on them. Raises `EnvironmentFault` where that cannot be written."""
    design = read_source(task.source, quantized=task.options.quantized)
    try:
        return _write(design, task)
    except OSError as error:
        # The folder is gone at the end: what has to be mended is the one it lies in.
        raise _unwritable(error, task.folder.parent.parent) from error


def _write(design: Design, task: _Task) -> tuple[str, ...]:
    task.folder.mkdir(parents=True)
    notes: list[str] = []
    solid_formats = [format_ for format_ in task.options.formats if format_.needs_solid]
    for format_ in task.options.formats:
        if format_ not in solid_formats:
            notes += _write_description(design, format_, task.folder / (task.source.stem + format_.suffix))
    if solid_formats:
        notes += _write_solid(design, task, solid_formats)
    return tuple(notes)


def _write_description(design: Design, format_: ExportFormat, path: Path) -> list[str]:
    sequence = design.sequence
    if format_ is ExportFormat.DEEPCAD17:
        rows = np.array(to_vectors(sequence), dtype=np.int64)
        with path.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
        return [f"deepcad17: {excess}" for excess in limits(sequence)]
    if format_ is ExportFormat.CADQUERY:
        path.write_text(to_cadquery(sequence), encoding="utf-8")
    elif format_ is ExportFormat.JSON:
        path.write_text(json.dumps(to_deepcad_json(sequence), indent=1) + "\n", encoding="utf-8")
    else:
        path.write_text(get_codec("compact").encode(quantize(sequence)) + "\n", encoding="utf-8")
    return []


def _probe(folder: Path) -> None:
    """Raise `OSError` where `folder` takes no more."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_PROBE_BYTES))
        file.flush()


def _write_solid(design: Design, task: _Task, formats: Sequence[ExportFormat]) -> list[str]:
    # Only workers need the kernel.
    from cadtrain.geometry import encode_png, kernel, render_views, write_glb, write_step, write_stl

    options, stem = task.options, task.folder / task.source.stem
    solid = kernel.scaled(kernel.build_solid(design.sequence), design.unit_m)
    if options.size_mm is not None:
        solid = kernel.scaled(solid, options.size_mm / 1000 / max(kernel.bounding_box(solid).size))
    notes = [] if kernel.is_valid(solid) else ["the solid is not valid: the kernel's check finds faults"]
    if ExportFormat.STEP in formats:
        try:
            write_step(solid, f"{stem}.step")
        except GeometryError:
            _probe(task.folder)  # the kernel does not say why it could not write
            raise
    if set(formats) == {ExportFormat.STEP}:
        return notes
    mesh = kernel.tessellate(solid)
    if not mesh.is_watertight:
        notes.append("the mesh is not closed")
    writers: dict[ExportFormat, Callable[[Any, str], None]] = {ExportFormat.STL: write_stl, ExportFormat.GLB: write_glb}
    for format_ in formats:
        if format_ in writers:
            writers[format_](mesh, f"{stem}{format_.suffix}")
    if ExportFormat.PNG in formats:
        views = render_views(mesh, CAMERA_ORDER[: options.num_views], options.image_size)
        for name, view in zip([n for n in options.names(task.source.stem) if n.endswith(".png")], views, strict=True):
            (task.folder / name).write_bytes(encode_png(view))
    return notes
