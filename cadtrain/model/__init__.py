"""The model: language model, encoders, projectors, and how they are built, described and exported.

Importing this package makes `CadMllm` known to transformers, so that `AutoModel.from_pretrained(folder)` opens an export.
It therefore loads torch and transformers; commands import it where they need it, not at their top.
"""

from transformers import AutoConfig, AutoModel

from cadtrain.model.build import ModalityTokens, build_model, modality_tokens
from cadtrain.model.cad_mllm import CadMllm, CadMllmConfig, CadMllmOutput
from cadtrain.model.components import (
    component_of,
    decay_parameters,
    decoder_layer_classes,
    encoder_block_classes,
    trainable_components,
)
from cadtrain.model.tokenizer import build_tokenizer
from cadtrain.model.weights import Sharding, WholeWeights, restore_rotary

AutoConfig.register(CadMllmConfig.model_type, CadMllmConfig, exist_ok=True)
AutoModel.register(CadMllmConfig, CadMllm, exist_ok=True)

__all__ = [
    "CadMllm",
    "CadMllmConfig",
    "CadMllmOutput",
    "ModalityTokens",
    "Sharding",
    "WholeWeights",
    "build_model",
    "build_tokenizer",
    "component_of",
    "decay_parameters",
    "decoder_layer_classes",
    "encoder_block_classes",
    "modality_tokens",
    "restore_rotary",
    "trainable_components",
]
