"""A vocabulary added to a language model: ids, first values, what learns beside adapters, and what an export holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cadtrain.cad import added_vocabulary
from cadtrain.config.sections import LanguageModelConfig, LoraConfig, ModelConfig
from cadtrain.convert.model_folder import export_model, merge_lora
from cadtrain.errors import CheckpointError, ConfigError, UsageError
from cadtrain.model import CadMllm, build_model, build_tokenizer
from cadtrain.model.tokenizer import byte_tokenizer, first_added_id
from cadtrain.model.vocabulary import add_rows
from tests.model.test_build import RecordingSharding
from tests.model.tiny import make_model, model_config, pack, sample

WORDS = added_vocabulary("tokens")
BASE_ROWS = 270
"""Rows of the pretrained model: twelve more than its tokenizer has tokens, as released models have some to spare."""


def tokens_model(config: ModelConfig, *, seed: int = 0, sharding: RecordingSharding | None = None) -> CadMllm:
    return build_model(
        config, tokenizer=build_tokenizer(config.language, WORDS), codec="tokens", codec_version=1, dtype=torch.float32,
        device="cpu", seed=seed, sharding=sharding,
    )  # fmt: skip


def values(config: ModelConfig, *, shared_out: bool) -> dict[str, torch.Tensor]:
    """Every weight by name, whole."""
    sharding = RecordingSharding()
    model = tokens_model(config, sharding=sharding if shared_out else None)
    return {name: sharding.whole.get(id(value), value.detach()) for name, value in model.named_parameters()}


def small(*, tied: bool, lora: bool) -> ModelConfig:
    return model_config(image=False, point=False, lora=lora, fields={"tie_word_embeddings": tied})


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pretrained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder as other tools save language models."""
    fields = {"tie_word_embeddings": request.param, "vocab_size": BASE_ROWS}
    make_model(model_config(image=False, point=False, fields=fields), seed=5).language.save_pretrained(
        tmp_path / "base"
    )
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def from_folder(folder: Path, *, lora: bool) -> ModelConfig:
    config = model_config(image=False, point=False)
    return config.model_copy(
        update={
            "language": LanguageModelConfig(
                pretrained=str(folder), lora=LoraConfig(rank=4, alpha=8.0) if lora else None
            )
        }
    )


@pytest.mark.parametrize("reopened", [False, True])
def test_every_word_is_one_token(tmp_path: Path, reopened: bool) -> None:
    tokenizer = build_tokenizer(LanguageModelConfig(config={"model_type": "llama"}), WORDS)
    if reopened:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
    text = "a <cad:Sa><cad:12> b<cad:.>"
    ids = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    assert [i for i in ids if i >= 258] == tokenizer.convert_tokens_to_ids(["<cad:Sa>", "<cad:12>", "<cad:.>"])
    assert len(tokenizer) == 258 + len(WORDS)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert first_added_id(tokenizer, WORDS) == 258


def test_a_tokenizer_that_lost_a_word_is_refused() -> None:
    config = small(tied=True, lora=False)
    with pytest.raises(UsageError, match="lacks 1 of the codec's 299 tokens, the first is <cad:\\.>"):
        build_model(
            config, tokenizer=build_tokenizer(config.language, WORDS[:-1]), codec="tokens", codec_version=1,
            dtype=torch.float32, device="cpu", seed=0,
        )  # fmt: skip


def test_a_model_of_our_own_is_built_with_room_for_the_words() -> None:
    model = tokens_model(small(tied=True, lora=False))
    assert model.language.config.vocab_size == 576  # 258 + 299, rounded up to a multiple of 64
    fields = {"vocab_size": 300}
    config = model_config(image=False, point=False, fields=fields)
    with pytest.raises(ConfigError, match="has 300 tokens but its tokenizer 557"):
        tokens_model(config)


@pytest.mark.parametrize("shared_out", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_pretrained_rows_stay_and_new_ones_start_near_their_mean(
    pretrained: Path, shared_out: bool, lora: bool
) -> None:
    config = from_folder(pretrained, lora=lora)
    found = values(config, shared_out=shared_out)
    stored = load_file(pretrained / "model.safetensors")
    names = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in stored]
    for name in names:
        inside = name.replace(".weight", ".base_layer.weight") if lora else name
        weight, old = found[f"language.{inside}"], stored[name][:258]
        assert weight.shape[0] == 576
        assert torch.equal(weight[:258], old)
        distance = (weight[258:] - old.mean(0)) / old.std(0)
        assert 0.08 < distance.std() < 0.12
        assert len(torch.unique(weight[258:], dim=0)) == 576 - 258
    rows = [name for name in found if "added_rows" in name]
    assert len(rows) == (len(names) if lora else 0)
    assert all(found[name].shape[0] == 576 - 258 and not found[name].any() for name in rows)


def test_values_do_not_depend_on_how_they_are_shared_out(pretrained: Path) -> None:
    config = from_folder(pretrained, lora=True)
    whole, shared = values(config, shared_out=False), values(config, shared_out=True)
    assert whole.keys() == shared.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, shared[name]), name


def test_a_pretrained_model_that_has_the_words_keeps_its_rows(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    learnt = tokens_model(small(tied=True, lora=False), seed=3).language
    learnt.save_pretrained(folder)
    build_tokenizer(LanguageModelConfig(config={"model_type": "qwen3"}), WORDS).save_pretrained(folder)
    again = tokens_model(from_folder(folder, lora=False)).language
    assert torch.equal(again.get_input_embeddings().weight, learnt.get_input_embeddings().weight)


def _pack_with_words() -> dict[str, torch.Tensor]:
    batch = pack([sample(14, 1), sample(9, 2)], dummies=False)
    batch["input_ids"][5:12] = torch.arange(300, 307)
    batch["labels"] = torch.where(batch["labels"] == -100, batch["labels"], batch["labels"] + 290)
    return batch


@pytest.mark.parametrize("tied", [True, False])
def test_beside_adapters_only_the_rows_of_new_tokens_learn(tied: bool) -> None:
    model = tokens_model(small(tied=tied, lora=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(**_pack_with_words()).loss_sum.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    embedding, head = ("language.model.embed_tokens.added_rows.weight", "language.lm_head.added_rows.weight")
    assert learning == ({embedding} if tied else {embedding, head})
    parameters = dict(model.named_parameters())
    seen = parameters[embedding].grad.abs().sum(1) > 0
    assert seen[300 - 258 : 307 - 258].all()
    assert tied or seen.sum() == 7, "of an untied embedding only rows of tokens in the pack take a gradient"
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("lora_B" in name or "added_rows" in name for name in changed)
    assert embedding in changed


@pytest.mark.parametrize("tied", [True, False])
def test_rows_beside_adapters_take_the_gradient_of_whole_embeddings(tied: bool) -> None:
    adapted, whole = tokens_model(small(tied=tied, lora=True)), tokens_model(small(tied=tied, lora=False))
    for model in (adapted, whole):
        model(**_pack_with_words()).loss_sum.backward()
    found = adapted.language.get_input_embeddings().added_rows.weight.grad
    torch.testing.assert_close(found, whole.language.get_input_embeddings().weight.grad[258:])
    found = adapted.language.get_output_embeddings().added_rows.weight.grad
    torch.testing.assert_close(found, whole.language.get_output_embeddings().weight.grad[258:])


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_has_the_tokens_and_the_logits(tmp_path: Path, tied: bool) -> None:
    config = small(tied=tied, lora=True)
    model = tokens_model(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "added_rows" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    export_model(model, tmp_path / "out", tokenizer=build_tokenizer(config.language, WORDS))
    opened = CadMllm.from_pretrained(tmp_path / "out").eval()
    batch = {name: value for name, value in _pack_with_words().items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(opened(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    assert (opened.config.codec, opened.config.codec_version) == ("tokens", 1)
    assert opened.config.language["vocab_size"] == 576
    assert not [name for name, _ in opened.named_parameters() if "added_rows" in name or "base_layer" in name]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<cad:Sa><cad:." + ">")["input_ids"] == [258, 556]


def test_rows_that_fit_no_end_are_named() -> None:
    weights = {"e.base_layer.weight": torch.zeros(4, 2), "e.added_rows.weight": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError, match=r"added rows of e are \[2, 3\], they fit no end of \[4, 2\]"):
        dict(merge_lora(weights, alpha=1.0, rank=1))
    with pytest.raises(CheckpointError, match=r"fit no layer, the first is f\.added_rows"):
        dict(merge_lora({"f.added_rows.weight": torch.zeros(1, 1)}, alpha=1.0, rank=1))


def test_scaled_embeddings_are_refused_beside_adapters() -> None:
    class Scaled(torch.nn.Embedding):
        pass

    model = tokens_model(small(tied=False, lora=False)).language
    model.set_input_embeddings(Scaled(576, 32))
    with pytest.raises(ConfigError, match="embeddings of kind Scaled and Linear"):
        add_rows(model, 258)
