"""Adapters that add in place give what peft's own forward pass gives."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from cadtrain.config.sections import LoraConfig
from cadtrain.model import CadMllm
from tests.model.tiny import assert_same_gradients, gradients, make_model, model_config, pack, sample


def _models(**options: object) -> tuple[CadMllm, CadMllm]:
    lean = make_model(model_config(lora=True, **options), stir=True)
    plain = make_model(model_config(lora=True, kernels="plain", **options), stir=True)
    return lean, plain


def _lean_layers(model: CadMllm) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A") and "forward" in vars(module)]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_pefts_own_pass(recompute: str, bias: bool) -> None:
    lean, plain = _models(recompute=recompute, fields={"attention_bias": bias})
    assert _lean_layers(lean)
    assert not _lean_layers(plain)
    batch = pack([sample(12, 1), sample(20, 2, image=True, point=True)])
    left, right = lean(**batch).loss_sum, plain(**batch).loss_sum
    torch.testing.assert_close(left, right)
    left.backward()
    right.backward()
    assert_same_gradients(gradients(lean), gradients(plain), 1e-5)


def test_base_weights_that_learn_take_their_gradient() -> None:
    lean, plain = _models()
    for model in (lean, plain):
        model.language.base_model.layers.requires_grad_(True)  # the base learns beside its adapters
        model(**pack([sample(12, 1), sample(20, 2)])).loss_sum.backward()
    found = gradients(lean)
    assert "language.model.layers.0.self_attn.q_proj.base_layer.weight" in found
    assert_same_gradients(found, gradients(plain), 1e-5)


def test_dropout_drops_what_pefts_own_pass_drops() -> None:
    config = model_config(lora=True)
    language = config.language.model_copy(update={"lora": LoraConfig(rank=4, alpha=6.0, dropout=0.5)})
    lean = make_model(config.model_copy(update={"language": language}), stir=True)
    plain = make_model(config.model_copy(update={"language": language, "kernels": "plain"}), stir=True)
    batch = pack([sample(12, 1), sample(20, 2)])
    losses = []
    for seed, model in ((0, lean), (0, plain), (1, plain)):
        model.zero_grad()
        torch.manual_seed(seed)
        loss = model(**batch).loss_sum
        loss.backward()
        losses.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert not torch.allclose(losses[1][0], losses[2][0])
    assert_same_gradients(losses[0][1], losses[1][1], 1e-5)
    for model in (lean, plain):
        model.eval()
    torch.testing.assert_close(lean(**batch).loss_sum, plain(**batch).loss_sum)


def test_switched_off_adapters_are_off() -> None:
    lean, plain = _models()
    batch = pack([sample(12, 1)])
    for model in (lean, plain):
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
    off = lean(**batch).loss_sum
    assert torch.equal(off, plain(**batch).loss_sum)
    assert off != _models()[0](**batch).loss_sum
