"""The forward pass: packs, targets, dummies, frozen parts, recomputation."""

from __future__ import annotations

import pytest
import torch

from cadtrain.errors import UsageError
from cadtrain.model import CadMllm
from tests.model.tiny import assert_same_gradients, gradients, make_model, model_config, pack, sample

MIXED = [
    sample(12, 1),
    sample(17, 2, image=True),
    sample(9, 3, point=True),
    sample(20, 4, image=True, point=True),
]


def _loss(model: CadMllm, samples: list[dict[str, object]]) -> torch.Tensor:
    loss = model(**pack(samples)).loss_sum
    assert loss is not None
    return loss


@pytest.mark.parametrize("language", ["qwen3", "llama"])
def test_a_pack_equals_its_samples_alone(language: str) -> None:
    model = make_model(model_config(language))
    together = _loss(model, MIXED)
    together.backward()
    packed = gradients(model)
    model.zero_grad()

    alone = [_loss(model, [item]) for item in MIXED]
    for loss in alone:
        loss.backward()
    single = gradients(model)

    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-6, atol=1e-5)
    assert_same_gradients(packed, single, relative=2e-5)


def test_layouts_of_the_same_samples_have_the_same_total() -> None:
    model = make_model()
    first = _loss(model, MIXED[:1]) + _loss(model, MIXED[1:])
    second = _loss(model, [MIXED[3], MIXED[0]]) + _loss(model, [MIXED[2], MIXED[1]])
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-5)


def test_a_change_in_one_sequence_never_reaches_another() -> None:
    model = make_model().eval()
    before, after = pack(MIXED), pack(MIXED)
    for batch in (before, after):
        del batch["labels"]
    after["input_ids"][14] = (after["input_ids"][14] + 1) % 256
    after["pixel_values"] = after["pixel_values"].clone()
    after["pixel_values"][0] += 0.3  # the view of the second sequence
    with torch.no_grad():
        left, right = model(**before).logits, model(**after).logits
    same = (left == right).all(dim=1)
    assert same[:12].all()
    assert same[29:].all()
    assert not same[12:29].any()


def test_labels_are_shifted_already() -> None:
    model = make_model().eval()
    batch = pack([MIXED[0], MIXED[3]])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
        out = model(**batch, labels=labels)
    assert logits.shape == (32, 258)
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-6, atol=1e-5)
    assert out.num_targets == int((labels != -100).sum())
    assert out.loss_sum.dtype == torch.float32
    assert out.logits is None


def test_given_target_positions_change_nothing() -> None:
    model = make_model()
    batch = pack(MIXED)
    positions = (batch["labels"] != -100).nonzero().squeeze(1)
    given, found = model(**batch, target_positions=positions), model(**batch)
    assert torch.equal(given.loss_sum, found.loss_sum)
    assert given.num_targets == found.num_targets


@pytest.mark.parametrize("lora", [False, True])
def test_dummy_inputs_change_nothing_and_give_zero_gradients(lora: bool) -> None:
    model = make_model(model_config(lora=lora))
    text = [MIXED[0]]
    with_dummies = model(**pack(text)).loss_sum
    with_dummies.backward()
    assert torch.equal(with_dummies, model(**pack(text, dummies=False)).loss_sum)
    found = gradients(model)
    for name, parameter in model.named_parameters():
        if "projector" in name:
            assert torch.count_nonzero(found[name]) == 0, name
        elif parameter.requires_grad:
            assert name in found, f"{name} has no gradient"


def test_a_trainable_encoder_sees_zero_gradients_from_a_dummy() -> None:
    model = make_model(model_config(trainable=True))
    _loss(model, [MIXED[0]]).backward()
    found = gradients(model)
    encoders = [name for name, p in model.named_parameters() if "encoder" in name and p.requires_grad]
    assert encoders
    for name in encoders:
        assert torch.count_nonzero(found[name]) == 0, name
    model.zero_grad()
    _loss(model, [MIXED[3]]).backward()
    assert torch.count_nonzero(gradients(model)["image_encoder.model.embeddings.position_embeddings"]) > 0


def test_a_pack_without_targets_gives_a_finite_zero_with_a_graph() -> None:
    model = make_model()
    batch = pack(MIXED)
    batch["labels"].fill_(-100)
    out = model(**batch)
    assert out.loss_sum.item() == 0
    assert out.num_targets == 0
    out.loss_sum.backward()
    found = gradients(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.count_nonzero(found[name]) == 0, name


def test_frozen_encoders_stay_in_eval_mode_and_take_no_gradient() -> None:
    model = make_model().train()
    assert model.language.training
    assert model.image_projector.training
    for encoder in (model.image_encoder, model.point_encoder):
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not model.image_encoder(torch.rand(1, 3, 28, 28)).requires_grad
    trainable = make_model(model_config(trainable=True)).train()
    assert all(module.training for module in trainable.image_encoder.modules())
    assert trainable.image_encoder(torch.rand(1, 3, 28, 28)).requires_grad


@pytest.mark.parametrize("lora", [False, True])
def test_recomputation_changes_no_gradient(lora: bool) -> None:
    results = []
    for recompute in ("none", "full"):
        model = make_model(model_config(lora=lora, recompute=recompute), stir=True)
        assert model.language.is_gradient_checkpointing == (recompute == "full")
        loss = _loss(model, MIXED)
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (plain, kept), (again, recomputed) = results
    assert torch.equal(plain, again)
    assert_same_gradients(recomputed, kept, relative=1e-6)


def test_one_call_of_the_head_whatever_the_targets() -> None:
    model = make_model()
    calls = []
    model.language.get_output_embeddings().register_forward_hook(lambda *args: calls.append(args[1][0].shape[0]))
    batch = pack(MIXED)
    model(**batch)
    batch["labels"].fill_(-100)
    model(**batch)
    assert calls == [int((pack(MIXED)["labels"] != -100).sum()), 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_positions": torch.arange(12)}, "12 image placeholder positions but 2 image inputs of 4 tokens give 8"),
        ({"point_positions": torch.arange(4)}, "4 point placeholder positions, not a multiple of the 3 tokens"),
        ({"pixel_values": None}, "8 image placeholder positions but no image inputs"),
    ],
)
def test_placeholders_and_features_are_counted(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_model()(**{**pack(MIXED), **change})


def test_inputs_of_a_modality_the_model_lacks_are_refused() -> None:
    model = make_model(model_config(image=False))
    assert model.image_encoder is None
    assert model.image_projector is None
    with pytest.raises(UsageError, match="without an encoder for them"):
        model(**pack(MIXED))


def test_rotary_frequencies_survive_casts() -> None:
    model = make_model()
    rotary = model.language.base_model.rotary_emb
    before = rotary.inv_freq.clone()
    model.bfloat16()
    assert model.language.base_model.embed_tokens.weight.dtype == torch.bfloat16
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, before)


def test_a_bf16_model_learns() -> None:
    model = make_model().bfloat16()
    loss = _loss(model, MIXED)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    reference = _loss(make_model(), MIXED)
    torch.testing.assert_close(loss, reference, rtol=2e-2, atol=0)
