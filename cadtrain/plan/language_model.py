"""A language model by its name or its `config.json`: what its shapes say about buckets, and a run that trains all of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cadtrain.errors import UsageError

if TYPE_CHECKING:
    from cadtrain.config.sections import LanguageModelConfig, RunConfig

_NO_SHAPES = ("architectures", "transformers_version", "auto_map", "_name_or_path", "torch_dtype", "dtype", "use_cache")
"""What a `config.json` says of its file rather than of the model."""


@dataclass(frozen=True)
class LanguageModel:
    """A language model's shapes. `run` trains all its weights on text, in packs as by default and with all layers recomputed."""

    run: RunConfig
    hidden_size: int
    layer_params: int
    """Elements of one decoder layer."""


def language_model(model: str, precision: Literal["bf16", "fp32"]) -> LanguageModel:
    """The model called `model`: a hub name, a folder, or the path of a `config.json`. Loads torch; makes no weights.

    Raises `UsageError` for a file that is no such configuration, `ConfigError` for a model that cannot be trained
    here, and `EnvironmentFault` for one that cannot be had from the hub.
    """
    from cadtrain.config.sections import DataConfig, ModelConfig, RunConfig, StageConfig
    from cadtrain.plan.stage import require_shapes

    section = ModelConfig(language=_section(model), recompute="full")
    require_shapes(section)  # before torch is loaded
    from cadtrain.model.census import take_census
    from cadtrain.model.footprint import meta_model
    from cadtrain.units import Duration

    stage = StageConfig(name="text", duration=Duration(1), modalities={"text": 1.0})
    run = RunConfig(precision=precision, model=section, data=DataConfig(), curriculum=(stage,))
    found = meta_model(run.model, codec=run.data.codec, element_bytes=4 if precision == "fp32" else 2)
    census = take_census(found)
    return LanguageModel(run, census.hidden_size, census.decoder_layer)


def _section(model: str) -> LanguageModelConfig:
    from cadtrain.config.sections import LanguageModelConfig

    path = Path(model)
    if path.suffix != ".json":
        return LanguageModelConfig(pretrained=model, tokenizer="bytes")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}.", where=model) from error
    except ValueError as error:
        raise UsageError(f"is no JSON: {error}.", where=model, hint="Give a model's config.json.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise UsageError("has no `model_type`.", where=model, hint="Give a transformers model's config.json.")
    kept = {key: value for key, value in fields.items() if key not in _NO_SHAPES}
    return LanguageModelConfig(config=kept, tokenizer="bytes")
