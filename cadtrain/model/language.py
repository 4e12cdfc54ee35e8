"""The causal language model: from a transformers configuration or from pretrained weights, with or without adapters.

Legend: none; the forward pass is the model's own.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cadtrain import hub
from cadtrain.config.recompute import recompute_fault
from cadtrain.config.sections import LanguageModelConfig, LoraConfig
from cadtrain.errors import ConfigError, Fault
from cadtrain.model import attention
from cadtrain.model.pretrained import load_whole
from cadtrain.model.tokenizer import first_added_id, num_ids
from cadtrain.model.vocabulary import ROWS_MULTIPLE

_WHERE = "model.language"
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def language_config(
    config: LanguageModelConfig, tokenizer: PreTrainedTokenizerBase | None, vocabulary: Sequence[str] = ()
) -> PreTrainedConfig:
    """The transformers configuration that `config` describes, checked against what cadtrain can train.

    A left-out `vocab_size` and the ids of special tokens are taken from `tokenizer`. Where that was given `vocabulary`,
    a pretrained model's `vocab_size` grows as far as is needed. Raises ConfigError with every fault found: an unknown
    `model_type` or field, an architecture that packed attention cannot serve, a vocabulary smaller than the tokenizer's.
    """
    if config.config is not None:
        found = _from_fields(dict(config.config), tokenizer, vocabulary)
        faults = _vocabulary_faults(found.vocab_size, 0 if tokenizer is None else num_ids(tokenizer))
    else:
        found = _from_pretrained(str(config.pretrained))
        needed = 0 if tokenizer is None else num_ids(tokenizer)
        old = first_added_id(tokenizer, vocabulary) if tokenizer is not None and vocabulary else needed
        faults = _vocabulary_faults(found.vocab_size, old)
        if old < needed and found.vocab_size < needed:
            found.vocab_size = _rounded_up(needed)
    faults = [*_unsupported(found), *faults]
    if faults:
        raise ConfigError(faults)
    found.use_cache = False
    found._attn_implementation = attention.NAME
    return found


def build_language_model(config: PreTrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The language model of `config` with packed attention; its weights have no values yet."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    model.tie_weights()
    return _checked(model)


def load_language_model(
    source: str, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The pretrained language model in `source` (a folder or hub name), whole, on `device`.

    transformers maps safetensors files and copies weight by weight, so a rank's host memory stays that of one weight;
    where dtype and device are the files' own (bf16 on the CPU) the weights stay in the mapping. Where `config` has a larger vocabulary than the weights, the rows behind theirs have no values yet.
    """
    stored = copy.deepcopy(config)
    stored.vocab_size = _from_pretrained(source).vocab_size
    model: PreTrainedModel = load_whole(
        AutoModelForCausalLM, source, where=f"{_WHERE}.pretrained", config=stored, dtype=dtype,
        attn_implementation=attention.NAME, device_map={"": device},
    )  # fmt: skip
    if config.vocab_size != stored.vocab_size:
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    return _checked(model)


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Put adapters beside the target linear layers, in place; all other weights of `model` are frozen.

    Raises ConfigError naming target modules that the model has none of.
    """
    import peft

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [target for target in lora.target_modules if target.rsplit(".", 1)[-1] not in linear]
    if missing:
        hint = f"Its linear layers are {', '.join(sorted(linear))}."
        raise ConfigError(
            [Fault(f"{_WHERE}.lora.target_modules", f"the language model has no {', '.join(missing)}.", hint)]
        )
    adapters = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # peft multiplies by it; it need not be whole
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        # Values come from `initialize_weights`: peft's own drawing fails on weights that are shared out.
        init_lora_weights=False,
    )
    peft.inject_adapter_in_model(adapters, model)


def set_recompute(model: PreTrainedModel, num_layers: int) -> None:
    """Compute the first `num_layers` decoder layers again in the backward pass instead of keeping their activations; 0 keeps all.

    In place, between steps, for weights whole or shared out. The first ones, because at a layer's turn in the backward
    pass it is what the layers below it keep that is held: with the first ones recomputed that is least at every layer, and
    what the others kept is gone before the first is computed again. Raises ConfigError naming both numbers where the model has fewer layers, or where its layers
    cannot be computed again.
    """
    layers = model.base_model.layers
    if not 0 <= num_layers <= len(layers):
        raise ConfigError([recompute_fault(num_layers, len(layers))])
    if num_layers and not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        message = f"the layers of {model.config.model_type} cannot be computed again: transformers has no way to."
        raise ConfigError([Fault("model.recompute", message, "Set it to none.")])
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    has_dropout = has_dropout or bool(getattr(model.config, "attention_dropout", 0.0))
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=has_dropout)
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < num_layers
        layer._gradient_checkpointing_func = again


def num_recomputed(model: PreTrainedModel) -> int:
    """How many decoder layers `set_recompute` has chosen."""
    return sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in model.base_model.layers)


def _from_fields(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, vocabulary: Sequence[str]
) -> PreTrainedConfig:
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        close = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Examples: qwen3, llama."
        raise ConfigError(
            [Fault(f"{_WHERE}.config.model_type", f"transformers has no causal language model {model_type!r}.", hint)]
        )
    faults = unknown_fields(CONFIG_MAPPING[model_type], fields, f"{_WHERE}.config")
    if faults:
        raise ConfigError(faults)
    if tokenizer is not None:
        fields.setdefault("vocab_size", _rounded_up(num_ids(tokenizer)) if vocabulary else num_ids(tokenizer))
        for token in ("eos_token_id", "pad_token_id", "bos_token_id"):
            fields.setdefault(token, getattr(tokenizer, token))
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError(
            [Fault(f"{_WHERE}.config", f"transformers refuses this {model_type} configuration: {error}")]
        ) from error


def _from_pretrained(source: str) -> PreTrainedConfig:
    hub.require(source, f"{_WHERE}.pretrained", *hub.CONFIG_FILES)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        hint = "Give a local folder or a hub name of a transformers model."
        raise ConfigError(
            [Fault(f"{_WHERE}.pretrained", f"no model could be opened from {source!r}: {error}", hint)]
        ) from error


def unknown_fields(config_class: type[PreTrainedConfig], fields: dict[str, Any], where: str) -> list[Fault]:
    """A fault for each of `fields` that `config_class` does not know; transformers itself would take them silently."""
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    known |= {"rope_theta", "rope_scaling", "torch_dtype"} | set(config_class().to_dict())
    faults = []
    for name in sorted(set(fields) - known):
        close = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"Did you mean {close[0]}?" if close else ""
        faults.append(Fault(f"{where}.{name}", f"{config_class.model_type} has no such field.", hint))
    return faults


def _unsupported(config: PreTrainedConfig) -> list[Fault]:
    where = f"{_WHERE}.config"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return [Fault(_WHERE, f"{config.model_type} is not a causal language model that transformers can build")]
    faults = []
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        hint = "Name the model from which it was made, in bf16 or fp32."
        faults.append(Fault(f"{_WHERE}.pretrained", f"its weights are quantized ({method}), which cannot be trained.", hint))
    layers = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if layers:
        faults.append(
            Fault(f"{where}.layer_types", f"layers of kind {', '.join(layers)} would mix the sequences of a pack")
        )
    for name in _LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            faults.append(
                Fault(
                    f"{where}.{name}",
                    f"{getattr(config, name)} changes the logits after the head, which the loss leaves out",
                )
            )
    return faults


def _rounded_up(num_tokens: int) -> int:
    return -(-num_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE


def _vocabulary_faults(vocab_size: int, needed: int) -> list[Fault]:
    """`needed` is the tokenizer's size; tokens that are about to be added to a pretrained one do not count."""
    if vocab_size >= needed:
        return []
    message = f"the language model has {vocab_size} tokens but its tokenizer {needed}."
    return [Fault(f"{_WHERE}.config.vocab_size", message, "Leave `vocab_size` out, or make it at least as large.")]


def _checked(model: PreTrainedModel) -> PreTrainedModel:
    if not model._supports_attention_backend:
        kind = model.config.model_type
        raise ConfigError(
            [Fault(_WHERE, f"{kind} computes attention in a way of its own, so packed sequences would mix")]
        )
    if (
        not isinstance(getattr(model.base_model, "layers", None), nn.ModuleList)
        or model.get_output_embeddings() is None
    ):
        raise ConfigError([Fault(_WHERE, f"{model.config.model_type} is not a plain decoder with a head on top")])
    return model
