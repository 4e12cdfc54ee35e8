"""`cadtrain data encode`: runs the frozen encoders of a configuration over a prepared dataset, once and for all runs.

Legend: B views or clouds of a batch, N tokens of one, W width of a token, R rows of a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cadtrain.config.sections import RunConfig
from cadtrain.data.features.manifest import ITEM_BYTES, Encoded, FeatureManifest, FileTask, Kind
from cadtrain.data.features.store import DTYPES
from cadtrain.data.features.writer import FeatureWriter
from cadtrain.data.loader import ReadAhead
from cadtrain.data.manifest import SPLITS, Manifest
from cadtrain.data.order import draw_points
from cadtrain.data.sample import decode_image
from cadtrain.data.shards import PartDataset
from cadtrain.data.synth.make import demo_dataset
from cadtrain.errors import ConfigError, DataError, EnvironmentFault, Fault, UsageError
from cadtrain.model.build import build_encoders
from cadtrain.model.encoders.fingerprint import fingerprint
from cadtrain.model.encoders.image import ImageEncoder
from cadtrain.model.encoders.point import PointEncoder
from cadtrain.train.run import PRECISIONS, resolve_precision

FILE_BYTES = 256 * 2**20
"""About the size of one file of rows. Two are in memory: one that fills and one that is written."""

Storage = Literal["bf16", "fp16", "fp32"]
Encoder = ImageEncoder | PointEncoder


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """What is not in the configuration."""

    out: Path
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch: int = 64
    dtype: Storage | None = None
    """How features are stored; None: as the encoder gives them, in the run's precision."""
    variants: int = 1
    workers: int = 2
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class EncodeProgress:
    """Where an encoding stands, in rows; `resumed` of them are from earlier runs, `seconds` are this run's."""

    done: int
    total: int
    resumed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EncodeSummary:
    """What an encoding did."""

    out: Path
    manifest: FeatureManifest
    resumed: int
    """Rows from earlier runs."""
    seconds: float


def encode(
    config: RunConfig,
    options: EncodeOptions,
    *,
    on_plan: Callable[[FeatureManifest, str], None] = lambda plan, device: None,
    progress: Callable[[EncodeProgress], None] = lambda state: None,
) -> EncodeSummary:
    """Store what the frozen encoders of `config` give for every view and cloud of its dataset.

    `on_plan` is told sizes, and the device, before the first row is made. Goes on where an earlier run with the same
    encoders, data and options stopped. Raises `ConfigError` for an encoder that learns, `UsageError` where there is none
    or the output folder is taken, `DataError` naming a sample, `EnvironmentFault` for a full disk or a missing GPU.
    """
    started = time.monotonic()
    _refuse_learning(config)
    path = config.data.path or demo_dataset(config.data.synth)
    datasets = {split: PartDataset.open(path, split) for split in SPLITS}
    device = _device(options.device)
    precision = resolve_precision(config, device)
    model = build_encoders(config.model, dtype=PRECISIONS[precision], device=device, seed=config.seed)
    encoders: dict[Kind, Encoder] = {}
    if model.image_encoder is not None:
        encoders["image"] = model.image_encoder
    if model.point_encoder is not None:
        encoders["point"] = model.point_encoder
    plan = make_plan(config, path, datasets, encoders, dtype=options.dtype or precision, variants=options.variants)
    with FeatureWriter(options.out, plan, overwrite=options.overwrite) as writer:
        on_plan(plan, device.type)
        resumed = sum(file.rows for file in writer.finished.values())
        rows = RowSource(config, datasets, plan)
        done = resumed
        progress(EncodeProgress(done, plan.total_rows, resumed, 0.0))
        for count in _encode_files(writer, encoders, rows, options, device):
            done += count
            progress(EncodeProgress(done, plan.total_rows, resumed, time.monotonic() - started))
        manifest = writer.finish()
    return EncodeSummary(writer.out, manifest, resumed, time.monotonic() - started)


def make_plan(
    config: RunConfig,
    path: Path,
    datasets: Mapping[str, PartDataset],
    encoders: Mapping[Kind, Encoder],
    *,
    dtype: Storage,
    variants: int,
) -> FeatureManifest:
    """The manifest of the features to be made, without its files. Raises `UsageError` where nothing is to be encoded."""
    encoded: dict[str, Encoded] = {}
    rows_per_file: dict[str, int] = {}
    for kind, encoder in encoders.items():
        found = fingerprint(encoder)
        encoded[kind] = Encoded(found.weights, found.description, encoder.num_tokens, encoder.width)
        rows_per_file[kind] = max(1, FILE_BYTES // (encoder.num_tokens * encoder.width * ITEM_BYTES[dtype]))
    rows: dict[str, dict[str, int]] = {}
    for split, dataset in datasets.items():
        draws = variants if split == "train" else 1
        counts = {"image": int(dataset.num_images.sum()), "point": int(dataset.has_points.sum()) * draws}
        rows[split] = {str(kind): counts[kind] for kind in encoders}
    if not any(count for kinds in rows.values() for count in kinds.values()):
        what = (
            "model.image and model.point are null" if not encoders else f"{path} has neither views nor points for them"
        )
        raise UsageError(f"there is nothing to encode: {what}.")
    return FeatureManifest(
        dataset=Manifest.read(path).digest, dataset_path=str(path), dtype=dtype, encoded=encoded,
        num_points=config.data.num_points, variants=variants, seed=config.seed, rows=rows, rows_per_file=rows_per_file,
    )  # fmt: skip


class RowSource:
    """What the encoders are shown for each row."""

    def __init__(self, config: RunConfig, datasets: Mapping[str, PartDataset], plan: FeatureManifest) -> None:
        self._datasets, self._plan = datasets, plan
        self._image_size = config.model.image.image_size if config.model.image is not None else 0
        self._starts = {
            (split, kind): np.concatenate([[0], np.cumsum(counts)])
            for split, dataset in datasets.items()
            for kind, counts in (
                ("image", dataset.num_images),
                ("point", dataset.has_points * len(plan.draw_epochs(split))),
            )
        }

    def place(self, split: str, kind: Kind, row: int) -> tuple[int, int]:
        """The sample of a row, and which of its views or draws it is."""
        starts = self._starts[split, kind]
        sample = int(np.searchsorted(starts, row, side="right")) - 1
        return sample, row - int(starts[sample])

    def name(self, split: str, kind: Kind, row: int) -> str:
        """The row in words, for messages."""
        sample, number = self.place(split, kind, row)
        what = "view" if kind == "image" else "draw of points"
        return f"{self._datasets[split].texts(sample).id} ({what} {number})"

    def read(self, split: str, kind: Kind, rows: Sequence[int]) -> np.ndarray:
        """float32[B, 3, H, W] views or float32[B, P, 6] clouds; raises `DataError` naming the sample."""
        found = []
        for index, group in groupby((self.place(split, kind, row) for row in rows), key=lambda place: place[0]):
            sample = self._datasets[split][index]
            for _, number in group:
                if kind == "image":
                    where = f"{sample.id} (view {number})"
                    found.append(decode_image(sample.images[number], self._image_size, where=where))
                else:
                    epoch = self._plan.draw_epochs(split)[number]
                    points = sample.checked_points()
                    found.append(draw_points(self._plan.seed, epoch, index, points, self._plan.num_points))
        return np.stack(found)


def _encode_files(
    writer: FeatureWriter,
    encoders: Mapping[Kind, Encoder],
    source: RowSource,
    options: EncodeOptions,
    device: torch.device,
) -> Iterator[int]:
    """Make every file that is missing; yields the number of rows of each batch. A file is written while the next one fills."""
    with ThreadPoolExecutor(1, thread_name_prefix="features") as pool:
        writing: Future[None] | None = None
        for task in list(writer.missing()):
            encoded = writer.plan.encoded[task.kind]
            rows = torch.empty(task.stop - task.start, encoded.tokens, encoded.width, dtype=DTYPES[writer.plan.dtype])
            yield from _fill(rows, task, encoders[task.kind], source, options, device)
            if writing is not None:
                writing.result()
            writing = pool.submit(writer.write, task, rows)
        if writing is not None:
            writing.result()


def _fill(
    out: torch.Tensor, task: FileTask, encoder: Encoder, source: RowSource, options: EncodeOptions, device: torch.device
) -> Iterator[int]:
    """Encode the rows of one file into `out` [R, N, W], batch by batch; threads read and decode ahead."""
    batches = [
        range(start, min(start + options.batch, task.stop)) for start in range(task.start, task.stop, options.batch)
    ]
    with ReadAhead(
        lambda rows: source.read(task.split, task.kind, rows), batches, num_workers=options.workers
    ) as ahead:
        for rows, shown in zip(batches, ahead, strict=True):
            with torch.inference_mode():
                features = encoder(torch.from_numpy(shown).to(device)).to(out.dtype)
                finite = features.isfinite().all(dim=(1, 2))
                out[rows.start - task.start : rows.stop - task.start] = features.cpu()
            _refuse_infinite(finite, rows, task, source, out.dtype)
            yield len(rows)


def _refuse_infinite(finite: torch.Tensor, rows: range, task: FileTask, source: RowSource, dtype: torch.dtype) -> None:
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"its features are not finite in {str(dtype).removeprefix('torch.')}",
            where=source.name(task.split, task.kind, rows[bad[0]]),
            hint="Look at the part with `cadtrain data inspect`. fp16 ends at 65504: try --dtype bf16.",
        )


def _refuse_learning(config: RunConfig) -> None:
    faults = [
        Fault(f"model.{kind}.trainable", "true: the features of an encoder that learns are old after a step.", "Set it to false.")
        for kind, section in (("image", config.model.image), ("point", config.model.point))
        if section is not None and section.trainable
    ]  # fmt: skip
    if faults:
        raise ConfigError(faults)


def _device(name: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise EnvironmentFault("there is no CUDA device.", where="--device cuda", hint="Try `cadtrain doctor`.")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")
