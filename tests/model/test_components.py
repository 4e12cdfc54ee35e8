"""Parameters by component, weight decay, and the layers that are gathered as one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cadtrain.errors import UsageError
from cadtrain.model import (
    component_of,
    decay_parameters,
    decoder_layer_classes,
    encoder_block_classes,
    trainable_components,
)
from tests.model.tiny import make_model, model_config


def test_every_parameter_has_its_component() -> None:
    model = make_model(model_config(trainable=True))
    names = {component_of(name) for name, _ in model.named_parameters()}
    assert names == {"language", "image_encoder", "image_projector", "point_encoder", "point_projector"}
    assert component_of("module.language.model.norm.weight") == "language"
    with pytest.raises(UsageError, match=r"'head\.weight' belongs to no component"):
        component_of("head.weight")


def test_only_what_learns_is_listed_in_a_fixed_order() -> None:
    frozen = trainable_components(make_model(model_config(lora=True)))
    assert list(frozen) == ["language", "image_projector", "point_projector"]
    assert all("lora_" in name for name, _ in frozen["language"])
    model = make_model(model_config(trainable=True))
    listed = [name for parameters in trainable_components(model).values() for name, _ in parameters]
    assert sorted(listed) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert list(trainable_components(model)) == [
        "language",
        "image_encoder",
        "image_projector",
        "point_encoder",
        "point_projector",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_decay_leaves_out_biases_norms_and_embeddings(tied: bool) -> None:
    model = make_model(model_config(lora=True, fields={"tie_word_embeddings": tied}))
    decayed = decay_parameters(model)
    assert "language.model.layers.0.mlp.up_proj.lora_A.default.weight" in decayed
    assert "image_projector.up.weight" in decayed
    assert ("language.lm_head.weight" in decayed) == (not tied)
    for name, parameter in model.named_parameters():
        bare = name.endswith((".query", ".cls_token"))  # learned tokens; some releases call a linear layer query
        if parameter.dim() < 2 or bare or "norm" in name or "embed_tokens" in name:
            assert name not in decayed, name
    assert "image_encoder.model.embeddings.position_embeddings" not in decayed


def test_decay_reads_the_true_shape_of_shared_out_weights() -> None:
    model = make_model()
    whole = decay_parameters(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert decay_parameters(model) == whole


def test_layer_classes() -> None:
    model = make_model()
    assert [cls.__name__ for cls in decoder_layer_classes(model)] == ["Qwen3DecoderLayer"]
    blocks = [cls.__name__ for cls in encoder_block_classes(model)]
    assert blocks == ["CrossAttentionBlock", "Dinov2Layer", "SelfAttentionBlock"]
    assert encoder_block_classes(make_model(model_config(image=False, point=False))) == []
    assert all(issubclass(cls, nn.Module) for cls in encoder_block_classes(model))
