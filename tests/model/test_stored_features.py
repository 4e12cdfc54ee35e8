"""Frozen encoders as cheap as they can be: no graph, one call a pack, or no call at all where their features are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cadtrain.errors import UsageError
from cadtrain.model import CadMllm
from cadtrain.model.build import build_encoders
from cadtrain.model.encoders.fingerprint import fingerprint
from cadtrain.model.flops import count_flops
from cadtrain.model.footprint import PackShape, meta_model, trace_footprint
from cadtrain.train.worst_step import make_pack
from tests.model.tiny import gradients, make_model, model_config, pack, sample

MIXED = [
    sample(30, 0),
    sample(24, 1, image=True, point=True),
    sample(20, 2, point=True),
    sample(22, 3, image=True),
]
TEXT = [sample(30, 0)]


def encoder_storages(model: CadMllm, batch: dict[str, Any]) -> tuple[set[int], set[int], list[torch.Tensor]]:
    """Addresses that modules inside the encoders gave out but for the last, those that autograd keeps, and what holds them."""
    inner: set[int] = set()
    saved: set[int] = set()
    alive: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        alive.append(tensor)
        inner.add(tensor.untyped_storage().data_ptr())

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    hooks = []
    for encoder in (model.image_encoder, model.point_encoder):
        last = {encoder.model.layernorm} if hasattr(encoder, "model") else {encoder.ln_post}
        hooks += [
            module.register_forward_hook(note)
            for module in encoder.modules()
            if not list(module.children()) and module not in last
        ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch).loss_sum.backward()
    for hook in hooks:
        hook.remove()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return inner - own, saved - own, alive


@pytest.mark.parametrize("trainable", [False, True])
def test_autograd_keeps_nothing_of_a_frozen_encoder(trainable: bool) -> None:
    model = make_model(model_config(trainable=trainable)).train()
    inner, saved, _alive = encoder_storages(model, pack(MIXED))
    assert len(inner) > 10
    assert bool(inner & saved) is trainable


def test_a_frozen_encoder_records_nothing_in_any_mode() -> None:
    model = make_model().train()
    kept: list[torch.Tensor] = []
    for encoder, shown in (
        (model.image_encoder, torch.rand(2, 3, 28, 28)),
        (model.point_encoder, torch.randn(2, 9, 6)),
    ):
        shown.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            tokens = encoder(shown)
        assert tokens.grad_fn is None
        assert not tokens.requires_grad
        assert not tokens.is_inference(), "the projector must be able to save it"
    assert kept == []


def test_a_tensor_of_inference_mode_cannot_feed_a_learning_projector() -> None:
    """Why a frozen encoder runs without gradients rather than in inference mode."""
    model = make_model().train()
    with torch.inference_mode():
        tokens = model.image_encoder(torch.rand(2, 3, 28, 28))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model.image_projector(tokens)
    model.image_projector(tokens.clone()).sum().backward()


def count_calls(model: CadMllm) -> list[tuple[int, ...]]:
    """Shapes that the encoders are shown, as they come."""
    shapes: list[tuple[int, ...]] = []
    for encoder in (model.image_encoder, model.point_encoder):
        encoder.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return shapes


def test_each_encoder_is_called_once_a_pack_with_all_its_views_and_clouds() -> None:
    model = make_model()
    shapes = count_calls(model)
    model(**pack(MIXED))
    assert shapes == [(2, 3, 28, 28), (2, 20, 6)]


def stored(model: CadMllm, batch: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The batch with features in place of views and clouds."""
    told = {key: value for key, value in batch.items() if key not in ("pixel_values", "points")}
    with torch.inference_mode():
        image, point = model.image_encoder(batch["pixel_values"]), model.point_encoder(batch["points"])
    # As they come from a file: no inference tensors.
    return {**told, "image_features": image.to(dtype).clone(), "point_features": point.to(dtype).clone()}


@pytest.mark.parametrize("samples", [MIXED, TEXT], ids=["mixed", "dummies"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_with_features_is_the_step_without(samples: list[dict[str, Any]], lora: bool) -> None:
    model = make_model(model_config(lora=lora), stir=True).train()
    batch = pack(samples)
    expected = model(**batch).loss_sum
    expected.backward()
    wanted = gradients(model)
    model.zero_grad()
    told = stored(model, batch)
    shapes = count_calls(model)
    found = model(**told).loss_sum
    found.backward()
    assert torch.equal(found, expected)
    assert shapes == []
    got = gradients(model)
    assert got.keys() == wanted.keys()
    assert any("projector" in name for name in got)
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize(("dtype", "relative"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_features_of_half_the_size_are_near(dtype: torch.dtype, relative: float) -> None:
    model = make_model()
    batch = pack(MIXED)
    expected, found = model(**batch).loss_sum, model(**stored(model, batch, dtype)).loss_sum
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=relative)
    assert found.item() != expected.item()


def test_a_dummy_feature_is_finite_and_gives_zero_gradients() -> None:
    model = make_model()
    batch = {key: value for key, value in pack(TEXT).items() if key not in ("pixel_values", "points")}
    model(**batch, image_features=torch.zeros(1, 4, 16), point_features=torch.zeros(1, 3, 16)).loss_sum.backward()
    found = gradients(model)
    for name in (name for name, _ in model.named_parameters() if "projector" in name):
        assert torch.count_nonzero(found[name]) == 0, name


def test_wrong_features_are_refused() -> None:
    model = make_model()
    batch = pack(MIXED)
    told = stored(model, batch)
    with pytest.raises(UsageError, match="image inputs and image features"):
        model(**told, pixel_values=batch["pixel_values"])
    with pytest.raises(UsageError, match=r"point features of shape \[2, 3, 15\], but the encoder gives \[\*, 3, 16\]"):
        model(**{**told, "point_features": told["point_features"][..., :-1]})
    with pytest.raises(UsageError, match="built without an encoder"):
        make_model(model_config(image=False))(**told)


def test_encoders_alone_are_those_of_the_model() -> None:
    for language, lora in (("qwen3", False), ("llama", True)):
        model = make_model(model_config(language, lora=lora), seed=3)
        alone = build_encoders(model_config("qwen3"), dtype=torch.float32, device="cpu", seed=3)
        assert {parameter.device.type for parameter in alone.language.parameters()} == {"meta"}
        for name in ("image_encoder", "point_encoder"):
            assert fingerprint(getattr(model, name)) == fingerprint(getattr(alone, name))
            assert not getattr(alone, name).training


def test_a_fingerprint_changes_with_all_that_decides_on_the_tokens() -> None:
    config = model_config()

    def prints(seed: int = 0, dtype: torch.dtype = torch.float32, **image: Any) -> tuple[str, str]:
        changed = config.model_copy(update={"image": config.image.model_copy(update=image)})  # type: ignore[union-attr]
        model = build_encoders(changed, dtype=dtype, device="cpu", seed=seed)
        return fingerprint(model.image_encoder).weights, fingerprint(model.point_encoder).weights  # type: ignore[arg-type]

    image, point = prints()
    assert prints() == (image, point)
    for changed in (prints(seed=1), prints(dtype=torch.bfloat16)):
        assert image not in changed
        assert point not in changed
    assert prints(image_size=56)[0] != image
    assert prints(config={**config.image.config, "layer_norm_eps": 1e-5})[0] != image  # type: ignore[union-attr]
    model = build_encoders(config, dtype=torch.float32, device="cpu", seed=0)
    with torch.no_grad():
        next(reversed(list(model.point_encoder.parameters()))).view(-1)[-1] += 1e-3  # type: ignore[union-attr]
    assert fingerprint(model.point_encoder).weights != point  # type: ignore[arg-type]


def test_a_plan_with_features_sees_no_encoder() -> None:
    model = meta_model(model_config(), codec="compact", element_bytes=2)
    sizes = {"tokens": 64, "targets": 20, "sequences": 2, "views": 40, "clouds": 40, "points": 2048}
    sizes["tokens"] = 64 + 40 * 7
    runs = trace_footprint(model, PackShape(**sizes))
    reads = trace_footprint(model, PackShape(**sizes, stored=True))
    assert any("encoder" in part for part in runs.peak)
    assert not any("encoder" in part for part in reads.peak)
    assert reads.peak["image projector"] > 0
    assert reads.saved["image projector"] == runs.saved["image projector"]


def test_the_work_of_a_view_is_then_its_projector_alone() -> None:
    model = meta_model(model_config(), codec="compact", element_bytes=2)
    runs = count_flops(model, ["language", "image_projector", "point_projector"], num_points=64)
    reads = count_flops(model, ["language", "image_projector", "point_projector"], num_points=64, stored=True)
    for what, tokens, projector in (("view", 4, model.image_projector), ("cloud", 3, model.point_projector)):
        weights = sum(parameter.numel() for parameter in projector.parameters() if parameter.dim() == 2)
        work = getattr(reads, what)
        assert work.forward == 2 * tokens * weights
        assert work.backward == getattr(runs, what).backward
        assert getattr(runs, what).forward > 2 * work.forward
    assert reads.token == runs.token


def test_a_measured_worst_step_reads_features_where_the_run_does() -> None:
    model = make_model(model_config())
    shapes = count_calls(model)
    sizes = {"tokens": 40, "targets": 10, "sequences": 2, "views": 3, "clouds": 2, "points": 20}
    for stored, expected in ((True, []), (False, [(3, 3, 28, 28), (2, 20, 6)])):
        pack = make_pack(model, PackShape(**sizes, stored=stored))  # type: ignore[arg-type]
        loss = model(**pack.model_inputs()).loss_sum
        assert torch.isfinite(loss)
        assert shapes == expected
