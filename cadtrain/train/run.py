"""A run, assembled: from a configuration and a run folder to a trained model in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from cadtrain import __version__
from cadtrain.cad.codec import added_vocabulary, get_codec, respelling, token_counter
from cadtrain.checkpoint.retention import Retention
from cadtrain.checkpoint.store import CheckpointStore
from cadtrain.config.batch_plan import BatchPlan, plan_batches
from cadtrain.config.deepspeed_config import Precision, deepspeed_config_for
from cadtrain.config.load import to_yaml
from cadtrain.config.recompute import Recompute, recomputed_layers
from cadtrain.config.sections import MODALITY_SETS, RunConfig
from cadtrain.data.examples import ExampleBuilder, ExampleShape, Tokenizer, count_tokens
from cadtrain.data.features.store import FeatureStore, SplitFeatures
from cadtrain.data.feed import Feed
from cadtrain.data.shards import PartDataset
from cadtrain.data.synth.make import demo_dataset
from cadtrain.distributed import Place, barrier
from cadtrain.errors import DataError, Interrupted
from cadtrain.heartbeat import Heartbeat
from cadtrain.metrics.record import CompositeSink, MetricSink, NullSink, RunFacts
from cadtrain.metrics.sinks.jsonl import JsonlSink
from cadtrain.metrics.sinks.tensorboard import TensorBoardSink
from cadtrain.metrics.sinks.wandb import WandbSink
from cadtrain.model.build import build_model, modality_tokens
from cadtrain.model.cad_mllm import CadMllm
from cadtrain.model.census import take_census
from cadtrain.model.components import trainable_components
from cadtrain.model.tokenizer import build_tokenizer
from cadtrain.train.begin import begin
from cadtrain.train.encoded import check_encoders, open_features, rest_encoders
from cadtrain.train.engine import DeepSpeedEngine, ZeroSharding, init_process_group, leave_process_group
from cadtrain.train.interrupt import StopRequest
from cadtrain.train.leave import watch_for
from cadtrain.train.recover import train_to_the_end
from cadtrain.train.schedule import CurriculumSchedule
from cadtrain.train.state import TrainState
from cadtrain.train.trainer import TrainerParts
from cadtrain.train.watched import WatchedEngine, tell_modules

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ENDLESS = 1_000_000
"""Steps of an epoch where there is no data: more than any stage has."""

PRECISIONS: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Feeds:
    """The samples of a run."""

    train: Feed
    validation: Feed | None
    path: Path
    features: FeatureStore | None = None
    """Where the encoders' outputs are read from, if they are not run."""


def run(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool,
    console: MetricSink | None = None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
    heartbeat: Heartbeat | None = None,
) -> TrainState:
    """Train `config` in `run_dir` to its end and return the final state. Every rank of the run calls it.

    `run_dir` exists and holds the run's `config.yaml`; the ZeRO stage is a number and recomputation is decided. `console` is used on rank 0 alone.
    Raises `CadtrainError` of every kind, `Interrupted` after the state was saved. `on_failure` is told of an error at once:
    leaving the process group may wait for peers that wait for this rank, so a failed rank does not leave it in order.
    `heartbeat` gets this rank's signs of life.
    """
    place = Place.from_environment()

    def work(start: Start) -> TrainState:
        sink = _sinks(config, run_dir, place, console)
        start.at_end.callback(sink.close)
        return _train(config, run_dir, start, sink, resume=resume)

    return in_process_group(config, work, on_failure=on_failure, heartbeat=heartbeat or Heartbeat(None))


@dataclass(frozen=True, slots=True)
class Start:
    """What a rank has once it is in the process group."""

    place: Place
    device: torch.device
    path: Path | None
    """The prepared dataset; None where the work needs none."""
    stop: StopRequest
    heartbeat: Heartbeat
    at_end: ExitStack
    """Is closed when the work is over, well or not."""


def in_process_group(
    config: RunConfig, work: Callable[[Start], Result], *, on_failure: Callable[[BaseException], None], heartbeat: Heartbeat,
    needs_data: bool = True,
) -> Result:  # fmt: skip
    """Join the process group, do `work`, leave the group. Every rank calls it. `on_failure` and `heartbeat` as in `run`."""
    # Parts are made before the process group is up: waiting for them must not run into a collective's time limit.
    place = Place.from_environment()
    heartbeat.phase("opening the data")
    path = (config.data.path or demo_dataset(config.data.synth)) if needs_data else None
    with StopRequest() as stop, ExitStack() as at_end:
        heartbeat.phase("joining the process group")
        device = init_process_group()
        try:
            result = work(Start(place, device, path, stop, heartbeat, at_end))
        except BaseException as error:
            on_failure(error)
            if isinstance(error, Interrupted) or place.world_size == 1:
                leave_process_group()
            raise
    leave_process_group()
    return result


@dataclass(frozen=True, slots=True)
class Assembled:
    """The parts of a run that training and measuring share."""

    feeds: Feeds | None
    plan: BatchPlan
    schedule: CurriculumSchedule
    recompute: tuple[int, ...]
    """Decoder layers computed again in the backward pass, by stage."""
    precision: Precision
    codec: str
    """Name and version."""
    shapes: CadMllm
    """The model on the meta device."""
    model: CadMllm
    engine: DeepSpeedEngine
    sharding: ZeroSharding | None
    """How weights are made whole under ZeRO-3; None below."""


def assemble(config: RunConfig, start: Start) -> Assembled:
    """Open the data and build model and engine. Collective. Without `start.path` there are no feeds."""
    place, device, heartbeat = start.place, start.device, start.heartbeat
    heartbeat.phase("opening the data")
    precision = resolve_precision(config, device)
    tokenizer = build_tokenizer(config.model.language, added_vocabulary(config.data.codec))
    feeds = None if start.path is None else open_feeds(config, start.path, tokenizer)
    codec = get_codec(config.data.codec)
    build = partial(
        build_model, config.model, tokenizer=tokenizer, codec=codec.name, codec_version=codec.version, seed=config.seed
    )
    heartbeat.phase("building the model")
    with torch.device("meta"):
        shapes = build(dtype=PRECISIONS[precision], device="meta")
    num_samples = feeds.train.num_samples if feeds else ENDLESS * config.batch.global_batch_size
    plan = plan_batches(config, world_size=place.world_size, num_samples=num_samples)
    schedule = CurriculumSchedule(config.curriculum, plan)
    recompute = recomputed_layers(config.model, len(config.curriculum), len(shapes.language.base_model.layers))
    deepspeed_config = deepspeed_config_for(
        config, zero_stage=int(config.zero.stage), world_size=place.world_size, precision=precision,
        hidden_size=shapes.language.config.hidden_size, layer_params=decoder_layer_parameters(shapes),
    ).to_dict()  # fmt: skip
    sharding = ZeroSharding(deepspeed_config) if config.zero.stage == 3 else None
    model = build(dtype=PRECISIONS[precision], device=device, sharding=sharding)
    if feeds is not None and feeds.features is not None:
        check_encoders(feeds.features, model)
    heartbeat.phase("starting the engine")
    engine = DeepSpeedEngine(model, config=deepspeed_config, optim=config.optim, device=device)
    if config.data.features is not None:
        rest_encoders(model, zero_stage=int(config.zero.stage))
    written = f"{codec.name} {codec.version}"
    return Assembled(feeds, plan, schedule, recompute, precision, written, shapes, model, engine, sharding)


def _train(config: RunConfig, run_dir: Path, start: Start, sink: MetricSink, *, resume: bool) -> TrainState:
    place, stop, heartbeat = start.place, start.stop, start.heartbeat
    made = assemble(config, start)
    plan, engine, shapes, written = made.plan, made.engine, made.shapes, made.codec
    assert made.feeds is not None
    feeds = made.feeds
    lines = describe(config, shapes, feeds, plan, made.precision, place, made.recompute)
    facts = {"zero_stage": config.zero.stage, "precision": made.precision, "offload": config.zero.offload_optimizer}
    counts = {name: {"trainable": row.trainable, "frozen": row.frozen} for name, row in take_census(shapes).components.items()}
    store = open_store(config, run_dir, place, plan, engine, {**facts, "census": counts})
    store.clean_unfinished()
    barrier()
    heartbeat.phase("reading a checkpoint" if resume else "starting")
    layout = {"world_size": place.world_size, **facts}
    state, how = begin(config, plan, store, engine, place, layout, codec=written, resume=resume)
    if feeds.features is not None and how:
        check_encoders(feeds.features, made.model, made.sharding, after_loading=True)
    order = order_of(config, feeds)
    is_other_order, state.order = bool(state.order) and state.order != order, order
    stages = tuple((stage.name, stage.last_step) for stage in plan.stages)
    sink.start(RunFacts(config.name, str(run_dir), plan.total_steps, state.step, stages, lines))
    if how:
        sink.note(how)
    if is_other_order:
        sink.note(
            "the data, the seed or the batch size differ from before: the samples are not those of an uninterrupted run"
        )
    leave = watch_for(
        run_dir,
        time_limit_seconds=config.checkpoint.time_limit,
        saved_bytes=engine.saved_bytes(),
        is_main=place.is_main,
    )
    tell_modules(made.model, heartbeat)
    watched = WatchedEngine(engine, heartbeat)
    parts = TrainerParts(
        config=config, config_text=to_yaml(config), place=place, engine=watched, schedule=made.schedule, feed=feeds.train,
        validation_feed=feeds.validation, store=store, sink=sink, stop_signal=lambda: stop.signal_number,
        recompute=made.recompute, leave=leave, on_step=watched.at_step, on_wait=heartbeat.phase,
    )  # fmt: skip
    state = train_to_the_end(parts, state, facts=layout, codec=written)
    heartbeat.phase("leaving")
    engine.close()
    return state


def open_store(
    config: RunConfig, run_dir: Path, place: Place, plan: BatchPlan, engine: DeepSpeedEngine, facts: Mapping[str, Any]
) -> CheckpointStore:
    """The run's checkpoints, with the rules of `config.checkpoint`; `facts` go into every manifest."""
    rules = config.checkpoint
    every = None if rules.keep_every is None else max(1, rules.keep_every.in_steps(plan.steps_per_epoch))
    return CheckpointStore(
        run_dir,
        place=place,
        retention=Retention(rules.keep_last, every, rules.keep_best),
        facts={**facts, "versions": package_versions()},
        frozen_names=engine.frozen_names() if rules.frozen_weights == "once" else frozenset(),
    )


def order_of(config: RunConfig, feeds: Feeds) -> str:
    """A short text that changes when step n would see other samples."""
    feed = feeds.train
    return (
        f"{feed.dataset.digest} {feed.num_samples} samples, {config.batch.global_batch_size} a step, seed {config.seed}"
    )


def decoder_layer_parameters(model: CadMllm) -> int:
    """Elements of one decoder layer, which the bucket sizes follow."""
    layers = model.language.base_model.layers
    return sum(parameter.numel() for parameter in layers[0].parameters())


def resolve_precision(config: RunConfig, device: torch.device) -> Precision:
    """`bf16` or `fp32`: what the configuration says, or what suits the device."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" else "fp32"


def open_feeds(config: RunConfig, path: Path, tokenizer: Tokenizer) -> Feeds:
    """Open the dataset's splits and features, count tokens and keep what fits. Raises `DataError` naming the folder."""
    data, tokens = config.data, modality_tokens(config.model)
    shape = ExampleShape(
        tokens_per_view=tokens.image_tokens_per_view,
        views=data.views_per_sample,
        image_size=config.model.image.image_size if config.model.image else 14,
        point_tokens=tokens.point_tokens,
        num_points=data.num_points,
    )
    features = None if data.features is None else open_features(config, data.features, path)
    used = [key for key in MODALITY_SETS if any(key in stage.probabilities() for stage in config.curriculum)]

    def feed(split: str) -> Feed | None:
        dataset = PartDataset.open(path, split)
        if not len(dataset):
            return None
        respell = respelling(dataset.manifest.codec, data.codec)
        stored = None if features is None else SplitFeatures(features, dataset)
        builder = ExampleBuilder(tokenizer, data.instruction, shape, config.seed, respell, stored)
        lengths = count_tokens(
            tokenizer, data.instruction, dataset.captions(), dataset.column("sequence"), respell=respell, count=token_counter(data.codec)
        )  # fmt: skip
        return Feed(
            dataset, lengths, builder, global_batch_size=config.batch.global_batch_size,
            micro_batch_tokens=config.batch.micro_batch_tokens, max_sample_tokens=data.max_sample_tokens, modality_sets=used,
        )  # fmt: skip

    train = feed("train")
    if train is None:
        raise DataError("its train split is empty", where=str(path), hint="Prepare it again with more parts.")
    if train.num_left_out:
        log.warning(
            "%d of %d samples are longer than data.max_sample_tokens and are left out",
            train.num_left_out,
            len(train.dataset),
        )
    return Feeds(train, feed("validation") if data.validation_samples else None, path, features)


def describe(
    config: RunConfig, model: CadMllm, feeds: Feeds, plan: BatchPlan, precision: str, place: Place, recompute: tuple[int, ...]
) -> tuple[tuple[str, str], ...]:
    """The start banner: the arithmetic of the run before its first step."""
    total = sum(p.numel() for p in model.parameters())
    learns = {name: sum(p.numel() for _, p in rows) for name, rows in trainable_components(model).items()}
    kept, all_samples = feeds.train.num_samples, len(feeds.train.dataset)
    left_out = (
        f", {feeds.train.num_left_out} left out as longer than {config.data.max_sample_tokens} tokens"
        if feeds.train.num_left_out
        else ""
    )
    stages = ", ".join(f"{stage.name} to step {stage.last_step}" for stage in plan.stages)
    rows = (
        (
            "model",
            f"{total:,} parameters, {sum(learns.values()):,} learn: "
            + ", ".join(f"{k} {v:,}" for k, v in learns.items()),
        ),
        ("data", f"{kept:,} of {all_samples:,} training samples in {feeds.path}{left_out}"),
        *([("features", _describe_features(feeds.features))] if feeds.features is not None else []),
        ("codec", _describe_codec(config, feeds.train)),
        (
            "batch",
            f"{plan.global_batch_size} samples a step over {place.world_size} ranks, packs of up to {plan.micro_batch_tokens:,} tokens",
        ),
        ("steps", f"{plan.total_steps} ({plan.steps_per_epoch} an epoch): {stages}"),
        ("engine", f"ZeRO-{config.zero.stage}, {precision}, {_describe_recompute(recompute, model)}"),
    )
    for label, text in rows:
        log.info("%s: %s", label, text)
    return rows


def _describe_recompute(layers: tuple[int, ...], model: CadMllm) -> str:
    words = Recompute(layers, len(model.language.base_model.layers)).describe()
    return words or "no recomputation"


def _describe_codec(config: RunConfig, feed: Feed) -> str:
    added = len(added_vocabulary(config.data.codec))
    targets = feed.lengths.target[feed.kept]
    text = f"{config.data.codec}: {np.median(targets):.0f} tokens a sequence in the median, {targets.max()} at most"
    return f"{text}; {added} tokens added to the vocabulary" if added else text


def _describe_features(store: FeatureStore) -> str:
    manifest = store.manifest
    draws = f", {manifest.variants} draws of points a sample" if "point" in manifest.encoded else ""
    return f"{manifest.total_rows:,} stored in {store.folder} ({manifest.dtype}{draws}); the encoders are not run"


def package_versions() -> dict[str, str]:
    """Versions that a checkpoint depends on."""
    return {"cadtrain": __version__, **{name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")}}


def _sinks(config: RunConfig, run_dir: Path, place: Place, console: MetricSink | None) -> MetricSink:
    if not place.is_main:
        return NullSink()
    sinks: list[MetricSink] = [JsonlSink(run_dir / "metrics.jsonl")]
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard"))
    if config.logging.wandb:
        dumped: dict[str, Any] = config.model_dump(mode="json")
        sinks.append(WandbSink(dumped))
    if console is not None:
        sinks.append(console)
    return CompositeSink(sinks)
