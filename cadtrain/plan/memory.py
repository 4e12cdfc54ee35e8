"""Which ZeRO stage fits: an estimate of one rank's memory from the shapes in a configuration.

Pure arithmetic over `ModelConfig`; nothing is built and no device is asked. Legend: P weights, T weights that
learn, N ranks, M tokens of a micro-batch, h hidden width, V vocabulary. Bytes a rank in bf16 with fp32
master weights and fp32 gradient accumulation (Source: ZeRO, arXiv 1910.02054, section 3, with fp32 gradients added):

    stage   weights   gradients   optimizer
    0       2P        6T          12T
    1       2P        6T          12T/N
    2       2P        4T/N        12T/N
    3       2P/N      4T/N        12T/N

Stages 2 and 3 reduce a gradient as soon as it is whole, so only the shares of it and a bucket are held.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cadtrain.units import format_bytes

if TYPE_CHECKING:
    from cadtrain.config.sections import ModelConfig, RunConfig

ZeroStage = Literal[0, 1, 2, 3]
STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)

HEADROOM = 0.90
"""Share of a GPU's memory that may be planned for; the rest goes to fragmentation and to what the estimate misses."""
CONTEXT_BYTES = 2 * 2**30
"""CUDA context, NCCL channels and cuBLAS workspaces of a rank."""
BUCKET_ELEMENTS = 5e8
"""Elements in flight in reduce, gather and prefetch buckets of stages 1 to 3, at 2 bytes each."""

BYTE_VOCABULARY = 512
"""Upper bound of the byte tokenizer's vocabulary, for a configuration that leaves it to the tokenizer."""


@dataclass(frozen=True, slots=True)
class LanguageShapes:
    """The numbers of a decoder that its size follows from."""

    hidden: int
    layers: int
    vocabulary: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear layer of a decoder layer, under its usual name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q), "k_proj": (self.hidden, kv), "v_proj": (self.hidden, kv), "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate), "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }  # fmt: skip

    def num_parameters(self) -> int:
        """All weights, embeddings and norms included."""
        layer = sum(i * o for i, o in self.linear_shapes().values()) + 2 * self.hidden
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden


@dataclass(frozen=True, slots=True)
class ParameterCensus:
    """Weights by whether they learn."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.trainable + self.frozen


@dataclass(frozen=True, slots=True)
class StageChoice:
    """The stage that was taken, why, and what a rank needs under each (bytes; empty where nothing was estimated)."""

    stage: ZeroStage
    reason: str
    needed: dict[ZeroStage, float]
    fits: bool = True


def language_shapes(config: ModelConfig) -> LanguageShapes | None:
    """The decoder's shapes from `model.language`; None where they cannot be known without a download."""
    language = config.language
    fields: dict[str, Any] | None = (
        dict(language.config) if language.config is not None else _pretrained_fields(str(language.pretrained))
    )
    if fields is None:
        return None
    fields = {**fields, **fields.get("text_config", {})}
    if language.config is not None and language.tokenizer in (None, "bytes"):
        fields.setdefault("vocab_size", BYTE_VOCABULARY)
    required = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")
    if any(fields.get(name) is None for name in required):
        fields = _with_defaults(fields)
        if fields is None:
            return None
    heads = int(fields["num_attention_heads"])
    return LanguageShapes(
        hidden=int(fields["hidden_size"]),
        layers=int(fields["num_hidden_layers"]),
        vocabulary=int(fields["vocab_size"]),
        intermediate=int(fields["intermediate_size"]),
        heads=heads,
        kv_heads=int(fields.get("num_key_value_heads") or heads),
        head_dim=int(fields.get("head_dim") or int(fields["hidden_size"]) // heads),
        tied=bool(fields.get("tie_word_embeddings", False)),
    )


def _pretrained_fields(name: str) -> dict[str, Any] | None:
    folder = Path(name)
    path = folder / "config.json"
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _with_defaults(fields: dict[str, Any]) -> dict[str, Any] | None:
    """`fields` completed by the defaults of its model type."""
    from transformers import AutoConfig

    rest = {key: value for key, value in fields.items() if key != "model_type"}
    try:
        full = AutoConfig.for_model(fields["model_type"], **rest).to_dict()
    except (ValueError, KeyError, TypeError):
        return None
    return (
        full
        if all(full.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"))
        else None
    )


def count_parameters(config: ModelConfig, shapes: LanguageShapes) -> ParameterCensus:
    """Weights of the whole model, encoders and projectors included."""
    trainable, frozen = 0, 0
    base = shapes.num_parameters()
    lora = config.language.lora
    if lora is None:
        trainable += base
    else:
        frozen += base
        widths = [shapes.linear_shapes().get(name, (0, 0)) for name in lora.target_modules]
        trainable += shapes.layers * lora.rank * sum(i + o for i, o in widths)
    for count, width, learns in _encoders(config):
        trainable += config.projector_width * (width + shapes.hidden)
        trainable, frozen = (trainable + count, frozen) if learns else (trainable, frozen + count)
    return ParameterCensus(trainable, frozen)


def _encoders(config: ModelConfig) -> list[tuple[int, int, bool]]:
    """Weights, output width and whether it learns, of each encoder."""
    found = []
    if config.image is not None:
        fields = config.image.config
        if config.image.pretrained is not None:
            fields = _pretrained_fields(config.image.pretrained) or fields
        width, layers = int(fields.get("hidden_size", 768)), int(fields.get("num_hidden_layers", 12))
        found.append((layers * 12 * width * width, width, config.image.trainable))
    if config.point is not None:
        width, layers = config.point.width, config.point.num_layers + 1
        found.append((layers * 12 * width * width, width, config.point.trainable))
    return found


def activation_bytes(shapes: LanguageShapes, tokens: int, *, recompute: str, element_bytes: int) -> float:
    """Activations of the decoder and its logits for one micro-batch of `tokens` tokens.

    A layer keeps about 10 widths of hidden and 4 of intermediate a token for its backward pass (Source: Korthikanti et
    al., arXiv 2205.05198, without the attention matrix that fused kernels never store); with recompute every layer
    keeps its input only, and one layer at a time the rest. Logits are held in the model's precision and once in fp32,
    with their gradient.
    """
    layer = tokens * (10 * shapes.hidden + 4 * shapes.intermediate) * element_bytes
    inputs = tokens * shapes.hidden * element_bytes
    kept = shapes.layers * inputs + layer if recompute == "full" else shapes.layers * layer
    return kept + tokens * shapes.vocabulary * (element_bytes + 8)


def rank_bytes(
    census: ParameterCensus, stage: ZeroStage, num_ranks: int, *, activations: float, element_bytes: int = 2,
    offload_optimizer: bool = False, offload_parameters: bool = False,
) -> float:  # fmt: skip
    """Bytes that one rank needs on its device under `stage` (the module's table, with buckets and context)."""
    n = num_ranks
    weights = census.total * element_bytes / (n if stage == 3 else 1)
    gradients = census.trainable * (4 / n if stage >= 2 else element_bytes + 4)
    optimizer = census.trainable * 12 / (n if stage >= 1 else 1)
    if offload_optimizer and stage >= 1:
        optimizer, gradients = 0.0, 0.0 if stage >= 2 else gradients
    if offload_parameters and stage == 3:
        weights = 0.0
    buckets = 0.0 if stage == 0 else 2 * min(BUCKET_ELEMENTS, census.total)
    return weights + gradients + optimizer + activations + buckets + CONTEXT_BYTES


def choose_stage(config: RunConfig, num_ranks: int, memory_bytes: int | None) -> StageChoice:
    """The stage for `config` on `num_ranks` devices of `memory_bytes` each (None: CPU ranks).

    A stage that the configuration names is kept. `auto` takes the lowest that fits: DeepSpeed is fastest there. On the
    CPU it takes 2, which shares memory on one host and gathers no weights.
    """
    offload = config.zero.offload_optimizer or config.zero.offload_parameters
    if config.zero.stage != "auto":
        return StageChoice(config.zero.stage, "as configured", {})
    if memory_bytes is None:
        stage: ZeroStage = 3 if config.zero.offload_parameters else 2
        return StageChoice(stage, "CPU ranks share one host's memory", {})
    shapes = language_shapes(config.model)
    if shapes is None or memory_bytes == 0:
        unknown = "the model's shapes are" if shapes is None else "the device's memory is"
        return StageChoice(
            3 if num_ranks > 1 or offload else 0, f"{unknown} not known, so the stage that needs least", {}
        )
    width = 4 if config.precision == "fp32" else 2
    activations = activation_bytes(
        shapes, config.batch.micro_batch_tokens, recompute=config.model.recompute, element_bytes=width
    )
    census = count_parameters(config.model, shapes)
    needed: dict[ZeroStage, float] = {
        stage: rank_bytes(
            census, stage, num_ranks, activations=activations, element_bytes=width,
            offload_optimizer=config.zero.offload_optimizer, offload_parameters=config.zero.offload_parameters,
        )
        for stage in _candidates(config, num_ranks)
    }  # fmt: skip
    room = HEADROOM * memory_bytes
    for stage, count in needed.items():
        if count <= room:
            return StageChoice(stage, f"the lowest that fits: {format_bytes(count)} of {format_bytes(room)}", needed)
    last = max(needed)
    text = f"none fits by estimate: {format_bytes(needed[last])} needed of {format_bytes(room)}"
    return StageChoice(last, text, needed, fits=False)


def _candidates(config: RunConfig, num_ranks: int) -> tuple[ZeroStage, ...]:
    if config.zero.offload_parameters:
        return (3,)
    if config.zero.offload_optimizer:
        return (2, 3)
    return STAGES if num_ranks > 1 else (0,)
