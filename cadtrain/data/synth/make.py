"""Datasets of procedural parts, and the one that the demo makes for itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from cadtrain.cad.codec import get_codec
from cadtrain.cad.quantize import dequantize, quantize
from cadtrain.config.sections import SynthConfig
from cadtrain.data.splits import split_documents
from cadtrain.data.synth.parts import GENERATOR_VERSION, Captions, Difficulty, draw_part
from cadtrain.data.writing.columns import Row
from cadtrain.data.writing.duplicates import Duplicates
from cadtrain.data.writing.pipeline import (
    CAMERA_ORDER,
    Built,
    Dropped,
    Job,
    Note,
    Progress,
    Summary,
    Workers,
    no_progress,
    run,
)
from cadtrain.data.writing.writer import Plan
from cadtrain.errors import GeometryError
from cadtrain.geometry.sample import Sampling

CODEC = "compact"
DEFAULT_NUM_POINTS = 2048
DEFAULT_TIME_LIMIT_SECONDS = 60.0
_MOST_ATTEMPTS = 16


@dataclass(frozen=True, slots=True)
class SynthTask:
    """One part to draw; each is a document of its own."""

    seed: int
    index: int
    num_points: int
    num_views: int
    image_size: int
    sampling: Sampling = "area"
    captions: Captions = "both"
    difficulty: Difficulty = "full"

    @property
    def id(self) -> str:
        """`synth-<seed>/<index>`."""
        return f"synth-{self.seed}/{self.index:08d}"

    @property
    def document(self) -> str:
        """The part itself."""
        return self.id

    @property
    def file(self) -> str:
        """The ledger's name for it."""
        return self.id


def synthesize(
    count: int,
    out: Path,
    *,
    seed: int = 0,
    num_points: int = DEFAULT_NUM_POINTS,
    num_views: int = 2,
    image_size: int = 224,
    sampling: Sampling = "area",
    captions: Captions = "both",
    difficulty: Difficulty = "full",
    workers: int = 1,
    time_limit_seconds: float = DEFAULT_TIME_LIMIT_SECONDS,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Summary:
    """Draw `count` parts, build their solids, and write them as a prepared dataset into `out`; equal designs lie in one split.

    Points and views are those of the quantised design: what the sequence says is exactly what they show. The dataset
    depends on everything but `workers` and the time limit. `captions` and `difficulty` are those of `draw_part`. Raises `UsageError` where `out` is taken.
    """
    tasks = [
        SynthTask(seed, index, num_points, num_views, image_size, sampling, captions, difficulty)
        for index in range(count)
    ]
    splits = split_documents(task.document for task in tasks)
    plan = _plan(count, seed, num_points, num_views, image_size, sampling, captions, difficulty)
    job = Job(plan, tasks, build_synthetic, lambda task: splits[task.document], Workers(workers, time_limit_seconds))
    return run(job, out, overwrite=overwrite, progress=progress)


def _plan(
    count: int,
    seed: int,
    num_points: int,
    num_views: int,
    image_size: int,
    sampling: Sampling,
    captions: Captions,
    difficulty: Difficulty,
) -> Plan:
    return Plan(
        source="synth",
        seed=seed,
        codec=get_codec(CODEC),
        num_points=num_points,
        num_views=num_views,
        image_size=image_size,
        settings={
            "count": count,
            "generator_version": GENERATOR_VERSION,
            "sampling": sampling,
            "captions": captions,
            "difficulty": difficulty,
        },
        duplicates=Duplicates.ONE_SPLIT,
    )


def build_synthetic(task: SynthTask) -> Built | Dropped:
    """Draw one part and build it; a part that makes no valid closed solid is drawn again, with a note for each redraw."""
    # Only workers need the kernel: whoever reads a dataset that is there already does without it.
    from cadtrain.geometry.part import make_part

    notes: list[Note] = []
    for attempt in range(_MOST_ATTEMPTS):
        drawn = draw_part(task.seed, task.index, attempt, captions=task.captions, difficulty=task.difficulty)
        try:
            quantized = quantize(drawn.sequence)
            part = make_part(
                dequantize(quantized),
                num_points=task.num_points,
                camera_indices=CAMERA_ORDER[: task.num_views],
                image_size=task.image_size,
                seed=task.index,
                sampling=task.sampling,
            )
        except GeometryError as error:
            notes.append(Note(task.file, "redrawn", f"{drawn.family}: {error}"))
            continue
        if not (part.is_valid and part.is_watertight):
            notes.append(Note(task.file, "redrawn", f"{drawn.family}: the solid is not valid and closed"))
            continue
        row = Row(
            id=task.id,
            document=task.document,
            caption=drawn.caption,
            caption_source="generated",
            sequence=get_codec(CODEC).encode(quantized),
            num_steps=len(quantized.steps),
            points=part.points if task.num_points else None,
            images=tuple(part.images),
            volume=part.volume,
            area=part.area,
            num_faces=part.num_faces,
            is_valid=part.is_valid,
            is_watertight=part.is_watertight,
        )
        return Built(row, tuple(notes))
    return Dropped("no_solid", f"{_MOST_ATTEMPTS} draws gave no valid closed solid; the last: {notes[-1].reason}")


def cache_folder() -> Path:
    """Where made datasets are kept: `$CADTRAIN_CACHE`, else `$XDG_CACHE_HOME/cadtrain`, else `~/.cache/cadtrain`."""
    if own := os.environ.get("CADTRAIN_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "cadtrain"


def demo_dataset(
    config: SynthConfig, cache_dir: Path | None = None, *, workers: int | None = None, progress: Progress = no_progress
) -> Path:
    """The folder of the procedural dataset that `config` describes, made on first use and reused afterwards.

    Safe to call from several processes at once: one makes it, the others wait for that. `cache_dir` defaults to
    `cache_folder()`, `workers` to the cores that this process may use.
    """
    folder = cache_dir if cache_dir is not None else cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(
        config.count,
        config.seed,
        DEFAULT_NUM_POINTS,
        config.num_views,
        config.image_size,
        "area",
        config.captions,
        config.difficulty,
    )
    out = folder / f"synth-{plan.fingerprint}"
    with FileLock(folder / f"{out.name}.lock"):
        synthesize(
            config.count,
            out,
            seed=config.seed,
            num_views=config.num_views,
            image_size=config.image_size,
            captions=config.captions,
            difficulty=config.difficulty,
            workers=workers or usable_cores(),
            progress=progress,
        )
    return out


def usable_cores() -> int:
    """Cores that this process may run on, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    return max(1, len(affinity(0)) if affinity else os.cpu_count() or 1)
