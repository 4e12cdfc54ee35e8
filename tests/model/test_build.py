"""Models from configurations: values from the seed, faults that name themselves, meta, shared-out weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cadtrain.config.sections import ImageEncoderConfig, LanguageModelConfig, ModelConfig
from cadtrain.errors import ConfigError
from cadtrain.model import build_model, build_tokenizer, modality_tokens
from tests.model.tiny import LANGUAGES, make_model, model_config, pack, sample


def _state(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return make_model(config, seed=seed).state_dict()


def test_values_depend_on_the_seed_and_on_nothing_around() -> None:
    torch.manual_seed(1)
    first = _state(model_config())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = _state(model_config())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = _state(model_config(), seed=1)
    assert not torch.equal(first["point_encoder.query"], other["point_encoder.query"])
    torch.manual_seed(1)
    make_model(model_config())
    assert torch.equal(torch.get_rng_state(), state)


def test_values_of_a_part_do_not_depend_on_the_others_or_on_adapters() -> None:
    whole = _state(model_config())
    text = _state(model_config(image=False, point=False))
    assert all(torch.equal(whole[name], text[name]) for name in text)
    adapted = _state(model_config(lora=True))
    for name, tensor in adapted.items():
        if "lora_" not in name:
            assert torch.equal(tensor, whole[name.replace(".base_layer", "")]), name
        elif "lora_B" in name:
            assert torch.count_nonzero(tensor) == 0
        else:
            assert tensor.std() > 0.02


def test_adapters_change_nothing_at_the_start() -> None:
    batch = pack([sample(12, 1), sample(9, 2, point=True)])
    plain, adapted = make_model(model_config()), make_model(model_config(lora=True))
    assert torch.equal(plain(**batch).loss_sum, adapted(**batch).loss_sum)
    trainable = {name for name, p in adapted.language.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in adapted.language.named_parameters() if "lora_" in name}
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in dict(adapted.language.named_parameters())


def test_meta_models_have_shapes_and_no_values(tmp_path: Path) -> None:
    config = model_config(lora=True, recompute="full")
    with torch.device("meta"):
        census = make_model(config)
    real = make_model(config)
    assert all(parameter.is_meta for parameter in census.parameters())
    assert {n: (p.shape, p.requires_grad) for n, p in census.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in real.named_parameters()
    }


def test_dtype_is_that_of_every_weight_but_not_of_rotary_frequencies() -> None:
    config = model_config(lora=True)
    model = build_model(
        config,
        tokenizer=build_tokenizer(config.language),
        codec="compact",
        codec_version=1,
        dtype=torch.bfloat16,
        device="cpu",
        seed=0,
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.language.base_model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(model(**pack([sample(12, 1, image=True, point=True)])).loss_sum)


def test_modality_tokens_are_those_of_the_encoders() -> None:
    config = model_config()
    tokens = modality_tokens(config)
    model = make_model(config)
    assert tokens.image_tokens_per_view == model.image_encoder(torch.rand(1, 3, 28, 28)).shape[1] == 4
    assert tokens.point_tokens == model.point_encoder(torch.rand(1, 9, 6)).shape[1] == 3
    without = modality_tokens(model_config(image=False, point=False))
    assert (without.image_tokens_per_view, without.point_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen33"}, "no causal language model 'qwen33'.*Did you mean qwen3"),
        ({"model_type": "dinov2"}, "no causal language model 'dinov2'"),
        ({"hidden_sise": 3}, "config.hidden_sise: qwen3 has no such field. Did you mean hidden_size?"),
        ({"vocab_size": 200}, "200 tokens but its tokenizer 258"),
        ({"num_key_value_heads": 2.5}, "refuses this qwen3 configuration"),
    ],
)
def test_faults_of_a_language_configuration(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_model(model_config(fields=fields))


def test_unknown_lora_targets_are_named_with_what_there_is() -> None:
    config = model_config(lora=True)
    lora = config.language.lora.model_copy(update={"target_modules": ("q_proj", "qkv")})
    language = config.language.model_copy(update={"lora": lora})
    with pytest.raises(ConfigError, match=r"has no qkv\. Its linear layers are .*q_proj"):
        make_model(config.model_copy(update={"language": language}))


def test_a_logit_transform_after_the_head_is_refused() -> None:
    fields = {**LANGUAGES["llama"], "model_type": "granite", "logits_scaling": 4.0}
    config = model_config(image=False, point=False).model_copy(update={"language": LanguageModelConfig(config=fields)})
    with pytest.raises(ConfigError, match=r"logits_scaling: 4\.0 changes the logits"):
        make_model(config)


def test_image_size_must_be_a_multiple_of_the_patch_size() -> None:
    config = model_config().model_copy(update={"image": ImageEncoderConfig(image_size=30)})
    with pytest.raises(ConfigError, match=r"30 is not a multiple of the patch size 14\. Use 28 or 42"):
        modality_tokens(config)


class RecordingSharding:
    """Keeps language weights empty outside `gather`, as ZeRO-3 does."""

    def __init__(self, is_source: bool = True) -> None:
        self.is_source = is_source
        self.whole: dict[int, torch.Tensor] = {}
        self._known: list[nn.Parameter] = []
        """Held, since the id of a weight that went (a tied head's own) would be given to a later one."""

    @contextmanager
    def construct(self) -> Iterator[None]:
        plain = nn.Module.register_parameter

        def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            plain(module, name, parameter)
            if parameter is not None and id(parameter) not in self.whole:
                parameter.ds_shape = parameter.shape
                self._known.append(parameter)
                self.whole[id(parameter)] = torch.full_like(parameter.data, float("nan"))

        nn.Module.register_parameter = register
        try:
            yield
        finally:
            nn.Module.register_parameter = plain

    @contextmanager
    def gather(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = self.whole[id(parameter)]
        yield
        for parameter in parameters:
            self.whole[id(parameter)] = parameter.data
            parameter.data = torch.empty(0)

    def share(self, parameter: nn.Parameter) -> None:
        return None


def _build_shared_out(config: ModelConfig, sharding: RecordingSharding) -> dict[str, torch.Tensor]:
    model = build_model(
        config,
        tokenizer=build_tokenizer(config.language),
        codec="compact",
        codec_version=1,
        dtype=torch.float32,
        device="cpu",
        seed=0,
        sharding=sharding,
    )
    return {name: sharding.whole.get(id(p), p.data) for name, p in model.named_parameters()}


@pytest.mark.parametrize("lora", [False, True])
def test_shared_out_weights_get_the_same_values(lora: bool) -> None:
    config = model_config(lora=lora)
    whole = dict(make_model(config).named_parameters())
    shared = _build_shared_out(config, RecordingSharding())
    assert shared.keys() == whole.keys()
    for name in whole:
        assert torch.equal(shared[name], whole[name]), name


def test_a_rank_that_is_not_the_source_leaves_shared_out_weights_alone() -> None:
    shared = _build_shared_out(model_config(lora=True), RecordingSharding(is_source=False))
    for name, tensor in shared.items():
        is_shared = name.startswith("language.") and "lora_" not in name
        assert bool(torch.isnan(tensor).all()) == is_shared, name


@pytest.fixture(params=["one file", "several files"])
def pretrained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder as other tools save language models, and its weights."""
    language = make_model(model_config(image=False, point=False, fields={"tie_word_embeddings": True}), seed=5).language
    size = "1GB" if request.param == "one file" else "40KB"
    language.save_pretrained(tmp_path / "base", max_shard_size=size)
    build_tokenizer(LanguageModelConfig(config=LANGUAGES["qwen3"])).save_pretrained(tmp_path / "base")
    return tmp_path / "base", language.state_dict()


@pytest.mark.parametrize("shared_out", [False, True])
def test_pretrained_weights_are_loaded(pretrained: tuple[Path, dict[str, torch.Tensor]], shared_out: bool) -> None:
    folder, weights = pretrained
    config = model_config(lora=True)
    language = LanguageModelConfig(pretrained=str(folder), lora=config.language.lora)
    config = config.model_copy(update={"language": language})
    if shared_out:
        found = _build_shared_out(config, RecordingSharding())
    else:
        found = dict(make_model(config).named_parameters())
    for name, tensor in found.items():
        if name.startswith("language.") and "lora_" not in name:
            stripped = name.removeprefix("language.").replace(".base_layer", "")
            assert torch.equal(tensor, weights[stripped]), name
    assert found["language.model.layers.0.mlp.up_proj.lora_A.default.weight"].std() > 0.02
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for n, p in found.items() if "language" in n and "lora" not in n) == plain.num_parameters()


def test_a_folder_that_is_none_is_named() -> None:
    config = model_config(image=False, point=False)
    language = LanguageModelConfig(pretrained="./no/such/folder", tokenizer="bytes")
    with pytest.raises(ConfigError, match="no/such/folder"):
        make_model(config.model_copy(update={"language": language}))


def test_tokenizer_vocabulary_is_the_default() -> None:
    model = make_model(model_config())
    assert model.language.config.vocab_size == 258
    assert model.language.config.eos_token_id == 257


def test_generation_with_a_cache_agrees_with_packed_logits() -> None:
    model = make_model().eval()
    batch = pack([sample(12, 1, image=True, point=True)])
    del batch["labels"]
    expected = model(**batch).logits[-1].argmax()
    keys = ("input_ids", "pixel_values", "image_positions", "points", "point_positions")
    model.language.set_attn_implementation("sdpa")
    embeddings = model.embed(**{key: batch[key] for key in keys})
    tokens = model.language.generate(inputs_embeds=embeddings[None], max_new_tokens=2, do_sample=False, use_cache=True)
    assert tokens[0, 0] == expected


def test_tokenizers_are_the_fast_kind() -> None:
    assert isinstance(build_tokenizer(LanguageModelConfig(config=LANGUAGES["llama"])), PreTrainedTokenizerFast)
