"""The sections of a run's configuration: frozen, strict, and free of side effects.

Loading a configuration only reads. Numbers that depend on the machine or on the data are derived later
(`batch_plan`, `deepspeed_config`) and saved beside the run. The string under each field is its help and
its documentation (`docs/config.md` is generated from it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from cadtrain.config.recompute import RecomputeSetting, recompute_fault
from cadtrain.config.section import Section, SectionFault, SectionFaults
from cadtrain.units import Duration, parse_seconds

DurationField = Annotated[Duration, BeforeValidator(Duration.parse), PlainSerializer(str, return_type=str)]

SecondsField = Annotated[float, BeforeValidator(parse_seconds)]

Component = Literal["language", "image_encoder", "image_projector", "point_encoder", "point_projector"]
COMPONENTS: tuple[Component, ...] = ("language", "image_encoder", "image_projector", "point_encoder", "point_projector")

CodecName = Literal["compact", "tokens", "json", "deepcad17"]

MODALITY_SETS: tuple[str, ...] = (
    "text",
    "point",
    "image",
    "text+point",
    "text+image",
    "point+image",
    "text+point+image",
)
"""Every modality set that a stage may draw, in canonical spelling: text, point, image joined by `+`."""


def _counted_in_steps(value: Duration | None) -> Duration | None:
    """For what must come after the same step on every rank."""
    if value is not None and value.unit == "minutes":
        raise ValueError(f"{value}: count it in steps or epochs, so that every rank, and a resumed run, does the same")
    if value is not None and value.value <= 0:
        raise ValueError(f"{value} must be more than 0")
    return value


class LoraConfig(Section):
    """Low-rank adapters on the language model (peft); without this section all its weights are trained."""

    rank: int = Field(32, ge=1)
    """Rank r of each adapter."""
    alpha: float = Field(64.0, gt=0)
    """Scale of each adapter: its product is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on each adapter's input."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""


class LanguageModelConfig(Section):
    """The causal language model that writes the sequence."""

    pretrained: str | None = None
    """Local folder or hub name to load weights from. Exactly one of `pretrained` and `config` is given."""
    config: dict[str, Any] | None = None
    """A transformers configuration (`model_type` and its fields) to build with random weights."""
    tokenizer: str | None = None
    """`bytes` for the built-in byte-level tokenizer, else a local folder or hub name. Default: `pretrained`, or `bytes`."""
    lora: LoraConfig | None = None
    """Adapters; null trains all weights."""

    @model_validator(mode="after")
    def _one_source(self) -> LanguageModelConfig:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError(
                "give exactly one of `pretrained` (a folder or hub name) and `config` (a transformers configuration)"
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("`config` needs a `model_type`, e.g. qwen3")
        return self


class ImageEncoderConfig(Section):
    """DINOv2, the image encoder."""

    pretrained: str | None = None
    """Local folder or hub name of a DINOv2; null builds one with random weights from `config`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of transformers' `Dinov2Config` for a model with random weights."""
    image_size: int = Field(224, ge=14)
    """Side of the square that each view is scaled to, in pixels; a multiple of the patch size."""
    trainable: bool = False
    """Whether the encoder learns; a frozen one stays in eval mode and takes no gradient."""


class PointEncoderConfig(Section):
    """The Michelangelo-style point encoder: Fourier features, cross-attention from learned latents, self-attention."""

    pretrained: str | None = None
    """Path of a state dict (`.safetensors`, `.bin`, `.pt` or `.ckpt`) to load, Michelangelo's checkpoint say; null means random weights."""
    num_latents: int = Field(256, ge=1)
    """Number of learned queries; the encoder gives one token for each. Michelangelo's published weights have 257."""
    width: int = Field(768, ge=8)
    """Width of the latents."""
    num_heads: int = Field(12, ge=1)
    """Attention heads."""
    num_layers: int = Field(8, ge=0)
    """Self-attention layers after the cross-attention."""
    num_frequencies: int = Field(8, ge=1)
    """Fourier frequencies a coordinate."""
    trainable: bool = False
    """Whether the encoder learns; a frozen one stays in eval mode and takes no gradient."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> PointEncoderConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        return self


class ModelConfig(Section):
    """The model, built whole at the start whatever the curriculum uses first."""

    language: LanguageModelConfig
    """The language model."""
    image: ImageEncoderConfig | None = None
    """The image encoder; null builds a model without images."""
    point: PointEncoderConfig | None = None
    """The point encoder; null builds a model without point clouds."""
    projector_width: int = Field(2048, ge=1)
    """Hidden width of the two-layer projectors from encoder to language model."""
    recompute: RecomputeSetting = "auto"
    """Decoder layers whose activations are computed again in the backward pass instead of kept: `none`, `full`, the first N, or a list with a number for
    each stage of the curriculum. `auto`: for each stage the fewest with which the run fits the GPUs, found by `launch` and `train` before they start and written into the run's configuration; on CPU none."""
    kernels: Literal["auto", "plain"] = "auto"
    """`auto`: fused norms, gated MLPs and rotary embeddings where CUDA and the `gpu` extra are there, adapters that add in place, and a
    loss that never holds all logits. `plain` runs the libraries' own modules, to compare."""

    @field_validator("recompute", mode="before")
    @classmethod
    def _layers_are_counted(cls, value: Any) -> Any:
        items = list(value) if isinstance(value, list | tuple) else [value]
        is_word = value in ("auto", "none", "full") if isinstance(value, str) else False
        if not is_word and not (items and all(type(item) is int and item >= 0 for item in items)):
            raise ValueError(
                f"found {value!r}, expected auto, none, full, a number of layers, or a list of one for each stage"
            )
        return value

    @model_validator(mode="after")
    def _recompute_is_there(self) -> ModelConfig:
        """Where the configuration says how many layers there are; else this waits for the model."""
        layers = (self.language.config or {}).get("num_hidden_layers")
        wanted = self.recompute if isinstance(self.recompute, tuple) else (self.recompute,)
        most = max((item for item in wanted if isinstance(item, int)), default=0)
        if isinstance(layers, int) and most > layers:
            fault = recompute_fault(most, layers)
            raise SectionFaults([SectionFault(("recompute",), fault.message, fault.hint)])
        return self


class SynthConfig(Section):
    """Procedural parts, made on first use into the cache folder when `data.path` is null."""

    count: int = Field(512, ge=8)
    """Number of parts."""
    seed: int = 0
    """Seed of the parts."""
    image_size: int = Field(224, ge=32)
    """Side of the rendered views in pixels."""
    num_views: int = Field(2, ge=1, le=8)
    """Rendered views a part."""
    captions: Literal["short", "long", "both"] = "both"
    """Length of the captions: one clause, or sizes and places of everything, or half of the parts each."""
    difficulty: Literal["simple", "full"] = "full"
    """`full` draws parts as real ones are, with their tail of long designs; `simple` leaves out the longer ones."""


class DataConfig(Section):
    """What is trained on, and how a sample is cut from it."""

    path: Path | None = None
    """A prepared dataset (`cadtrain data prepare` or `data synth`); null makes procedural parts."""
    synth: SynthConfig = SynthConfig()
    """The procedural parts used when `path` is null."""
    features: Path | None = None
    """Stored outputs of the frozen encoders (`cadtrain data encode`): they are read in place of views and points, and no encoder runs."""
    codec: CodecName = "compact"
    """How the model writes a design, however the data was stored: `compact` is text; `tokens` adds 299 tokens to the vocabulary and is about a third as long."""
    num_points: int = Field(2048, ge=1)
    """Points drawn from a sample's cloud each time it is seen."""
    views_per_sample: int = Field(1, ge=1)
    """Views drawn from a sample's images each time it is seen."""
    instruction: str = "Generate a CAD model from the given inputs."
    """The sentence that stands before the description in every sample."""
    max_sample_tokens: int = Field(4096, ge=16)
    """A sample with more tokens than this, those of its modalities included, is left out and counted, never cut."""
    validation_samples: int = Field(256, ge=0)
    """At most this many samples of the validation split are used for each modality set; 0 switches validation off."""
    validate_every: DurationField | None = None
    """Steps or epochs between validations inside a stage; every stage's end is validated in any case."""
    num_workers: int = Field(2, ge=0)
    """Threads a rank that read and decode samples ahead of the model."""

    _validate_every_in_steps = field_validator("validate_every")(_counted_in_steps)


def _modality_hint(key: str) -> str:
    parts = set(key.replace(" ", "").split("+"))
    same = [known for known in MODALITY_SETS if set(known.split("+")) == parts]
    return f"Write `{same[0]}`." if same else f"Known are {', '.join(MODALITY_SETS)}."


class StageConfig(Section):
    """One stage of the curriculum: which modality sets are drawn, which components learn, at what rate, how long."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in logs and metrics."""
    duration: DurationField = Field(examples=["1 epoch"])
    """Length: `20 steps`, `1 epoch`."""
    modalities: dict[str, float] = Field(examples=[{"text": 1.0}])
    """Probability of each modality set, e.g. `text: 0.3, text+point: 0.7`; scaled to sum to 1."""
    learning_rate: float = Field(2e-5, gt=0)
    """Peak rate of the language model."""
    multipliers: dict[Component, float] = Field(default_factory=dict)
    """Rate of a component as a multiple of `learning_rate`; 0 keeps it as it is. Default: 5 for projectors, 1 otherwise."""
    warmup: DurationField = Duration(0)
    """Linear way to the peak at the start of the stage: from 0 for a component that is new, else from its rate at the last stage's end."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the fall after the warm-up."""
    final_ratio: float = Field(0.1, ge=0, le=1)
    """Rate at the stage's end as a share of the peak."""

    @field_validator("modalities")
    @classmethod
    def _known_modalities(cls, value: dict[str, float]) -> dict[str, float]:
        faults = [
            SectionFault((key,), "unknown modality set.", _modality_hint(key))
            for key in value
            if key not in MODALITY_SETS
        ]
        faults += [SectionFault((key,), f"probability {p} must not be negative.") for key, p in value.items() if p < 0]
        if not faults and not sum(value.values()) > 0:
            faults.append(SectionFault((), f"found {value}, expected at least one probability above 0."))
        if faults:
            raise SectionFaults(faults)
        return value

    @field_validator("duration", "warmup")
    @classmethod
    def _counted_in_steps(cls, value: Duration) -> Duration:
        if value.unit == "minutes":
            raise ValueError(f"{value}: a stage is counted in steps or epochs, so that every rank ends it together")
        return value

    @field_validator("duration")
    @classmethod
    def _lasts(cls, value: Duration) -> Duration:
        if value.value <= 0:
            raise ValueError(f"{value} must be more than 0")
        return value

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> StageConfig:
        # Different units are compared when the number of samples is known (`batch_plan`).
        if self.warmup.unit == self.duration.unit and self.warmup.value > self.duration.value:
            what = f"{self.warmup} is longer than the stage, whose duration is {self.duration}."
            raise SectionFaults(
                [SectionFault(("warmup",), what, f"Use at most {self.duration}, or a longer duration.")]
            )
        return self

    def multiplier(self, component: Component) -> float:
        """Rate of `component` as a multiple of `learning_rate`."""
        return self.multipliers.get(component, 5.0 if component.endswith("projector") else 1.0)

    def probabilities(self) -> dict[str, float]:
        """The modality sets that can be drawn, in canonical order, with probabilities that sum to 1."""
        total = sum(self.modalities.values())
        return {key: self.modalities[key] / total for key in MODALITY_SETS if self.modalities.get(key, 0) > 0}

    def uses(self, modality: Literal["text", "point", "image"]) -> bool:
        """Whether any modality set of this stage holds `modality`."""
        return any(modality in key.split("+") for key in self.probabilities())


class OptimConfig(Section):
    """AdamW and clipping, the same for all stages."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay; biases, norms and embeddings have none."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""
    bad_steps: Literal["stop", "rollback"] = "stop"
    """What follows when weights are no longer finite, or ten steps in a row had no finite gradient: `stop` ends the run; `rollback` goes
    back to the last checkpoint before and passes over the samples of those steps. A single step without a finite gradient is passed over in any case."""
    max_rollbacks: int = Field(3, ge=1)
    """How often a run may go back before it ends."""


class ZeroConfig(Section):
    """How DeepSpeed shares optimizer states, gradients and weights between ranks."""

    stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage; `auto` takes the lowest that fits, or with `model.recompute: auto` the fastest. Where none fits, `launch` takes the fastest
    that does with the optimizer, or weights too, in host memory, and says so."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory."""
    offload_parameters: bool = False
    """Keep weights in host memory between uses (stage 3)."""
    reduce_bucket_size: int | None = Field(None, ge=1)
    """Elements a gradient bucket; null derives it from the model."""
    prefetch_bucket_size: int | None = Field(None, ge=0)
    """Elements gathered ahead of use (stage 3); null derives it from the model."""
    persistence_threshold: int | None = Field(None, ge=0)
    """Parameters smaller than this stay whole on every rank (stage 3); null derives it from the model."""
    config_file: Path | None = None
    """A DeepSpeed JSON of your own; its values win over the ones above where cadtrain does not own them."""

    @model_validator(mode="after")
    def _offload_needs_stage(self) -> ZeroConfig:
        if self.offload_parameters and self.stage not in ("auto", 3):
            raise ValueError(f"offload_parameters needs stage 3, found {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, found 0")
        return self


class BatchConfig(Section):
    """How many samples an optimizer step sees, and how many tokens fit on a device at once."""

    global_batch_size: int = Field(64, ge=1)
    """Samples an optimizer step, over all ranks; the same on any number of GPUs."""
    micro_batch_tokens: int = Field(8192, ge=16)
    """Token budget of one pack (micro-batch) on one rank. At least `data.max_sample_tokens`."""


class CheckpointConfig(Section):
    """When the run is saved and how much is kept."""

    every: DurationField = Duration(500)
    """Time between checkpoints, in steps, epochs or minutes; every stage's end is saved as well."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept; older ones are removed after a newer one is whole and verified."""
    keep_every: DurationField | None = None
    """Checkpoints whose step is a multiple of this, in steps or epochs, are kept for good."""
    keep_best: int = Field(0, ge=0)
    """So many checkpoints with the lowest validation loss (mean over the stage's modality sets) are kept as well."""
    asynchronous: bool = False
    """Copy the state to host memory and write it while training goes on. Needs host memory for the state of all of a host's ranks."""
    frozen_weights: Literal["once", "always"] = "once"
    """`once`: weights that never learn are written with the first checkpoint only, into a folder that all checkpoints of the run share;
    `always`: into every checkpoint, which DeepSpeed's own tools then read."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What follows when a checkpoint cannot be saved: `stop` ends the run, `continue` trains on to the next one. The last one of a run must be saved."""
    init_from: Path | None = None
    """A run folder, or one checkpoint, whose weights a new run begins with; its optimizer begins anew. Ignored where the run has a checkpoint of its own."""
    start_stage: str | None = None
    """Name of the stage at whose first step a new run begins; the stages before it are passed over."""
    time_limit: SecondsField | None = None
    """Time after which the run saves and leaves, counted from each start: `3h50m`, `90 minutes`, `3:50:00`, or seconds. It leaves early
    enough for a save to end in time. The end of a SLURM job (SLURM_JOB_END_TIME) is heeded in any case."""

    _keep_every_in_steps = field_validator("keep_every")(_counted_in_steps)


class LoggingConfig(Section):
    """Where the run's metrics go besides `metrics.jsonl`."""

    every: int = Field(1, ge=1)
    """Optimizer steps between lines on the console and in the metrics."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run folder."""
    wandb: bool = False
    """Send metrics to Weights & Biases (needs the `wandb` extra)."""


class RunConfig(Section):
    """Everything that describes a run."""

    name: str = Field("run", min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the run; the default run folder is `runs/<name>-<time>`."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of weights, order and draws."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of weights and activations; master weights and accumulated gradients are fp32. `auto`: bf16 on GPUs, fp32 on CPU."""
    model: ModelConfig
    """The model."""
    data: DataConfig = DataConfig()
    """The data."""
    curriculum: tuple[StageConfig, ...] = Field(min_length=1)
    """The stages, in order."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    zero: ZeroConfig = ZeroConfig()
    """DeepSpeed ZeRO."""
    batch: BatchConfig = BatchConfig()
    """Batch sizes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics."""

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        faults = [
            *_repeated_names(self.curriculum),
            *_missing_encoders(self),
            *_learning_behind_features(self),
            *_adapters_on_added_rows(self),
            *_unknown_start(self),
            *_stages_without_recompute(self),
        ]
        if self.batch.micro_batch_tokens < self.data.max_sample_tokens:
            faults.append(
                SectionFault(
                    ("batch", "micro_batch_tokens"),
                    f"{self.batch.micro_batch_tokens} is less than data.max_sample_tokens {self.data.max_sample_tokens}, "
                    "but the longest sample must fit into one pack.",
                    "Raise the one or lower the other.",
                    also=(("data", "max_sample_tokens"),),
                )
            )
        if faults:
            raise SectionFaults(faults)
        return self


def _unknown_start(config: RunConfig) -> list[SectionFault]:
    wanted, names = config.checkpoint.start_stage, [stage.name for stage in config.curriculum]
    if wanted is None or wanted in names:
        return []
    return [
        SectionFault(
            ("checkpoint", "start_stage"), f"{wanted!r} is the name of no stage.", f"Stages are {', '.join(names)}."
        )
    ]


def _stages_without_recompute(config: RunConfig) -> list[SectionFault]:
    listed, stages = config.model.recompute, len(config.curriculum)
    if not isinstance(listed, tuple) or len(listed) == stages:
        return []
    message = f"{list(listed)} has {len(listed)} numbers, but the curriculum has {stages} stages."
    hint = "Give one for each stage, one number for all, or auto."
    return [SectionFault(("model", "recompute"), message, hint, also=(("curriculum",),))]


def _repeated_names(curriculum: tuple[StageConfig, ...]) -> list[SectionFault]:
    names = [stage.name for stage in curriculum]
    return [
        SectionFault(("curriculum", index, "name"), f"{name!r} is already the name of stage {names.index(name)}.")
        for index, name in enumerate(names)
        if name in names[:index]
    ]


def _adapters_on_added_rows(config: RunConfig) -> list[SectionFault]:
    """Embedding and head learn their added rows themselves; an adapter on them would stand in the way."""
    lora = config.model.language.lora
    if config.data.codec != "tokens" or lora is None:
        return []
    named = [target for target in lora.target_modules if target.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens")]
    if not named:
        return []
    return [
        SectionFault(
            ("model", "language", "lora", "target_modules"),
            f"found {', '.join(named)}, whose rows for the added tokens learn without an adapter where data.codec is tokens.",
            "Take it out, or use `data.codec: compact`.",
            also=(("data", "codec"),),
        )
    ]


def _missing_encoders(config: RunConfig) -> list[SectionFault]:
    faults = []
    for index, stage in enumerate(config.curriculum):
        for modality, encoder in (("image", config.model.image), ("point", config.model.point)):
            drawn = [key for key in stage.probabilities() if modality in key.split("+")]
            if drawn and encoder is None:
                faults.append(
                    SectionFault(
                        ("curriculum", index, "modalities", drawn[0]),
                        f"stage {stage.name!r} draws {modality} samples, but model.{modality} is null.",
                        f"Give `model.{modality}` or take the set out.",
                        also=(("model", modality),),
                    )
                )
    return faults


def _learning_behind_features(config: RunConfig) -> list[SectionFault]:
    """Stored features are those of an encoder that stays what it was."""
    if config.data.features is None:
        return []
    faults = []
    for modality, encoder in (("image", config.model.image), ("point", config.model.point)):
        if encoder is not None and encoder.trainable:
            faults.append(
                SectionFault(
                    ("model", modality, "trainable"),
                    "found true, but with data.features the encoder is never run, so it cannot learn.",
                    "Set it to false, or take data.features out.",
                    also=(("data", "features"),),
                )
            )
        component = f"{modality}_encoder"
        for index, stage in enumerate(config.curriculum):
            rates = {str(name): rate for name, rate in stage.multipliers.items()}
            if rates.get(component, 0.0) > 0:
                faults.append(
                    SectionFault(
                        ("curriculum", index, "multipliers", component),
                        f"{rates[component]:g} is a learning rate for an encoder that data.features stands in for.",
                        "Take it out, or take data.features out.",
                        also=(("data", "features"),),
                    )
                )
    return faults
