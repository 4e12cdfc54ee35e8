"""An adapter folder opens in peft on the plain language model, and nothing that was learnt is left out."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cadtrain.config.load import load_run_config
from cadtrain.convert.service import convert_checkpoint
from cadtrain.errors import UsageError
from cadtrain.model.language import language_config


@pytest.fixture(scope="module")
def adapter(lora_run: tuple[Path, dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("adapter") / "out"
    result = convert_checkpoint(lora_run[0], target, adapter=True)
    assert result.kind == "adapter"
    assert not result.merged_lora
    assert result.num_parameters == sum(t.numel() for name, t in lora_run[1].items() if "lora_" in name or name.startswith("point_"))
    assert any("learnt weights that are no adapter (point_encoder, point_projector)" in note for note in result.notes)
    return target


def plain_language_model(source: Path, live: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The language model as it was before adapters were added: the base weights alone."""
    section = load_run_config(source / "config.yaml").config.model.language
    fields = language_config(section, AutoTokenizer.from_pretrained(source.parent / "tokenizer")).to_dict()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), attn_implementation="eager")
    state = {
        name.removeprefix("language.").replace(".base_layer.", "."): tensor
        for name, tensor in live.items()
        if name.startswith("language.") and ".lora_" not in name
    }
    model.load_state_dict(state)
    return model.eval()


def test_peft_opens_it_with_the_logits_of_the_merged_model(
    lora_run: tuple[Path, dict[str, torch.Tensor]], adapter: Path, tmp_path: Path
) -> None:
    source, live = lora_run
    AutoTokenizer.from_pretrained(adapter).save_pretrained(source.parent / "tokenizer")
    tokens = torch.arange(40).view(2, 20)
    base = plain_language_model(source, live)
    with torch.no_grad():
        before = base(tokens).logits
        opened = peft.PeftModel.from_pretrained(base, adapter).eval()
        found = opened(tokens).logits
    convert_checkpoint(source, tmp_path / "merged.bin", merge_lora=True)
    merged = torch.load(tmp_path / "merged.bin", weights_only=True)
    whole = plain_language_model(source, merged)
    with torch.no_grad():
        expected = whole(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (before - found).abs().max() > 0.01, "the adapter should change something"


def test_every_adapter_weight_is_in_it_under_pefts_name(lora_run: tuple[Path, dict[str, torch.Tensor]], adapter: Path) -> None:
    live = {name: tensor for name, tensor in lora_run[1].items() if ".lora_" in name}
    state = load_file(adapter / "adapter_model.safetensors")
    assert len(state) == len(live) > 0
    for name, tensor in live.items():
        inside = "base_model.model." + name.removeprefix("language.").replace(".default.", ".")
        assert torch.equal(state[inside], tensor), name
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["task_type"], settings["r"], settings["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 8.0)


def test_what_is_learnt_beside_adapters_is_in_projectors(lora_run: tuple[Path, dict[str, torch.Tensor]], adapter: Path) -> None:
    """Together with the language model's base the folder holds the whole model."""
    live = lora_run[1]
    state = load_file(adapter / "projectors.safetensors")
    expected = {name for name in live if not name.startswith("language.")}
    assert set(state) == expected
    assert {name.split(".")[0] for name in expected} == {"point_encoder", "point_projector"}
    for name, tensor in state.items():
        assert torch.equal(tensor, live[name]), name
    facts = json.loads((adapter / "preprocessor_config.json").read_text())
    assert facts["codec"] == {"name": "compact", "version": 1}


def test_a_run_without_adapters_has_none_to_write(deepspeed_checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.yaml"):
        convert_checkpoint(deepspeed_checkpoints / "zero2-bf16", tmp_path / "out", adapter=True)


def test_options_that_contradict_an_adapter(lora_run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="writes a folder"):
        convert_checkpoint(lora_run[0], tmp_path / "out.bin", adapter=True)
    with pytest.raises(UsageError, match="merged is gone"):
        convert_checkpoint(lora_run[0], tmp_path / "out", adapter=True, merge_lora=True)
    assert list(tmp_path.iterdir()) == []
