"""From a folder in Omni-CAD's layout to a prepared dataset; what the folder lacks is computed from its designs.

What is used is the folder's own where it is there and sound, and otherwise made: a caption by `cad.describe`, points and views by
the kernel. A cloud without normals gets those of the nearest points of the design's surface. A part whose design cannot be read,
quantised, or (where the kernel is needed) built is left out; everything that went wrong is in `failures.jsonl`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from cadtrain.cad.codec import get_codec
from cadtrain.cad.formats import read_design
from cadtrain.cad.quantize import quantize
from cadtrain.cad.sequence import CadSequence
from cadtrain.data.prepare.inputs import (
    PartTask,
    PartTasks,
    PrepareOptions,
    file_digest,
    no_document_listed,
    skipped_inputs,
    split_function_of,
    spread,
)
from cadtrain.data.prepare.sources.clouds import (
    find_cloud,
    has_normals,
    read_cloud,
    resample,
    to_unit_frame,
    with_normals_of,
)
from cadtrain.data.prepare.sources.omnicad import OmniCadFolder, printable
from cadtrain.data.prepare.sources.pictures import find_pictures
from cadtrain.data.prepare.states import states_before
from cadtrain.data.sample import encode_image
from cadtrain.data.splits import document_of
from cadtrain.data.writing.columns import Row
from cadtrain.data.writing.duplicates import Duplicates
from cadtrain.data.writing.pipeline import (
    CAMERA_ORDER,
    Built,
    Dropped,
    Job,
    Note,
    Progress,
    Result,
    ShardSummary,
    Summary,
    Workers,
    no_progress,
    run,
    run_shard,
)
from cadtrain.data.writing.share import Shard
from cadtrain.data.writing.target import refuse_inputs
from cadtrain.data.writing.writer import Plan
from cadtrain.errors import DataError, GeometryError, SchemaError
from cadtrain.geometry.part import Part
from cadtrain.geometry.sandbox import KERNEL_MODULE

__all__ = ["PartTask", "PrepareOptions", "build_part", "prepare", "prepare_shard"]

SURFACE_POINTS = 16384
"""Points drawn from a surface to look up the normals of a cloud that has none."""
_MADE = "made from the design instead"


def prepare(
    root: Path,
    out: Path,
    options: PrepareOptions,
    workers: Workers,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Summary:
    """Prepare the parts of the Omni-CAD folder `root` into the dataset `out`; an interrupted run goes on where it stopped.

    Raises `DataError` where `root` is no such folder, the split file cannot be read, or no part at all is usable, `UsageError`
    where `out` is taken or meets `root`. A part that cannot be used never ends the run.
    """
    refuse_inputs(root, out)
    return run(_job(root, options, workers), out, overwrite=overwrite, progress=progress)


def prepare_shard(
    root: Path,
    out: Path,
    options: PrepareOptions,
    workers: Workers,
    shard: Shard,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ShardSummary | Summary:
    """One share of `prepare`; processes that do the others may run at the same time, here or on other machines.

    Raises as `prepare` does, but a share without any usable part is none of it.
    """
    refuse_inputs(root, out)
    return run_shard(_job(root, options, workers), out, shard, overwrite=overwrite, progress=progress)


def _job(root: Path, options: PrepareOptions, workers: Workers) -> Job[PartTask]:
    folder = OmniCadFolder.discover(root)
    ids = spread(folder.ids, options.limit)
    split_of = split_function_of(ids, options.split_file)
    used = [part_id for part_id in ids if split_of(document_of(part_id)) is not None]
    if options.split_file and not used:
        raise no_document_listed(folder, ids, options.split_file)

    def split_of_task(task: PartTask) -> str:
        split = split_of(task.document)
        assert split is not None, "only parts with a split became tasks"
        return split

    plan = Plan(
        source="omni-cad",
        seed=options.seed,
        codec=get_codec(options.codec),
        num_points=options.num_points,
        num_views=options.num_views,
        image_size=options.image_size,
        duplicates=Duplicates(options.duplicates),
        settings=asdict(options)
        | {
            "split_file": file_digest(options.split_file),
            "inputs": folder.inputs_digest,
            "root": root.resolve().name,
        },
    )
    tasks = PartTasks(folder, used, options, workers.time_limit_seconds)
    needs_kernel = bool(options.num_points or options.num_views)
    return Job(
        plan,
        tasks,
        build_part,
        split_of_task,
        workers,
        skipped=skipped_inputs(folder, ids, split_of),
        preload=(KERNEL_MODULE,) if needs_kernel else (),
    )


# ------------------------------------------------------------------------------------------------------ in the worker process


def build_part(task: PartTask) -> Result | list[Result]:
    """Make one part's row from its files and, where they do not suffice, from the kernel; with `prefixes` those of its states too."""
    start = time.monotonic()
    try:
        sequence = read_design(task.design)
    except SchemaError as error:
        return Dropped("schema", error.message)
    except DataError as error:
        return Dropped("unreadable", error.message)
    whole = _built(_Work(task, sequence))
    if not task.options.prefixes:
        return whole
    states: list[Result] = []
    for number, state in states_before(sequence):
        own = replace(task, id=f"{task.id}@{number}", caption=None, clouds=None, pictures=None)
        if time.monotonic() - start > task.states_seconds:
            reason = f"a state on the way, not begun {task.states_seconds:g} s after its design"
            states.append(Dropped("time_limit", reason, id=own.id))
            continue
        made = _built(_Work(own, state))
        states.append(replace(made, id=own.id) if isinstance(made, Dropped) else replace(made, is_whole=False))
    return [*states, whole]


def _built(work: _Work) -> Result:
    try:
        return work.built()
    except GeometryError as error:
        return Dropped(error.kind, error.reason)


@dataclass(slots=True)
class _Work:
    """One part being made."""

    task: PartTask
    sequence: CadSequence
    notes: list[Note] = field(default_factory=list)

    def built(self) -> Built:
        """The row, and what was wrong with the part's own files."""
        task, options = self.task, self.task.options
        cloud = self._own_cloud()
        images = self._own_images()
        lacks_points = options.num_points > 0 and (cloud is None or not has_normals(cloud))
        lacks_images = options.num_views > 0 and not images
        part = self._make(lacks_points, cloud is not None, lacks_images) if lacks_points or lacks_images else None
        if part is not None and lacks_images:
            images = tuple(part.images)
        # The kernel knows the solid's own box; without it the box of all added material has to do, which differs only where
        # a cut or an intersection takes away a whole side.
        quantized = quantize(self.sequence, box=part.bounding_box if part else None)
        caption, caption_source = self._caption()
        row = Row(
            id=task.id,
            document=task.document,
            caption=caption,
            caption_source=caption_source,
            sequence=get_codec(options.codec).encode(quantized),
            num_steps=len(quantized.steps),
            points=self._points(cloud, part),
            images=images,
            volume=part.volume if part else None,
            area=part.area if part else None,
            num_faces=part.num_faces if part else None,
            is_valid=part.is_valid if part else None,
            is_watertight=part.is_watertight if part else None,
        )
        return Built(row, tuple(self.notes))

    def _own_cloud(self) -> np.ndarray | None:
        """float64[N, 3 or 6]: the cloud from the folder in the unit frame, or None where there is no usable one."""
        folder, options = self.task.clouds, self.task.options
        path = find_cloud(folder, self.task.id) if folder and options.num_points else None
        if path is None:
            return None
        try:
            return to_unit_frame(read_cloud(path), str(path))
        except DataError as error:
            self._note(path, "bad_points", f"{error.message}; {_MADE}")
            return None

    def _own_images(self) -> tuple[bytes, ...]:
        """PNG files of the wanted size made from the folder's pictures; those that cannot be read are left out."""
        folder, options = self.task.pictures, self.task.options
        images: list[bytes] = []
        bad: list[tuple[Path, DataError]] = []
        if folder is None or not options.num_views:
            return ()
        for path in find_pictures(folder, self.task.id)[: options.num_views]:
            try:
                images.append(encode_image(path.read_bytes(), options.image_size, where=str(path)))
            except DataError as error:
                bad.append((path, error))
        others = "1 other picture is used" if len(images) == 1 else f"{len(images)} other pictures are used"
        for path, fault in bad:
            self._note(path, "bad_image", f"{fault.message}; {f'left out; {others}' if images else _MADE}")
        return tuple(images)

    def _make(self, lacks_points: bool, has_cloud: bool, lacks_images: bool) -> Part:
        # Only workers need the kernel.
        from cadtrain.geometry.part import make_part

        options = self.task.options
        wanted = max(SURFACE_POINTS, options.num_points) if has_cloud else options.num_points
        return make_part(
            self.sequence,
            num_points=wanted if lacks_points else 0,
            camera_indices=CAMERA_ORDER[: options.num_views] if lacks_images else (),
            image_size=options.image_size,
            seed=self._seed,
            # A cloud of the folder's own only looks up normals in these points.
            sampling="area" if has_cloud else options.sampling,
        )

    def _points(self, cloud: np.ndarray | None, part: Part | None) -> np.ndarray | None:
        """float32[P, 6], or None where no points are wanted."""
        num_points = self.task.options.num_points
        if not num_points:
            return None
        rng = np.random.default_rng([self._seed, 1])
        if cloud is not None and has_normals(cloud):
            return resample(cloud, num_points, rng)
        assert part is not None, "the kernel was asked where normals are missing"
        surface = part.points
        if cloud is not None:
            try:
                return resample(with_normals_of(cloud, surface, self.task.file), num_points, rng)
            except DataError as error:
                path = find_cloud(self.task.clouds, self.task.id) if self.task.clouds else None
                self._note(path or self.task.design, "cloud_of_another_part", f"{error.message}; {_MADE}")
        return resample(surface, num_points, rng) if len(surface) != num_points else surface

    def _caption(self) -> tuple[str, str]:
        if self.task.caption:
            return self.task.caption, "file"
        from cadtrain.cad.describe import describe

        return describe(self.sequence), "described"

    def _note(self, path: Path, kind: str, reason: str) -> None:
        self.notes.append(Note(printable(path.relative_to(self.task.root).as_posix()), kind, reason))

    @property
    def _seed(self) -> int:
        """Fixed by the run's seed and the part's id, so that neither order nor number of workers matters."""
        text = f"{self.task.options.seed} {self.task.id}".encode()
        return int.from_bytes(blake2b(text, digest_size=6).digest(), "big")
