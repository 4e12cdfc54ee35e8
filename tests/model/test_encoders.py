"""The encoders: normalisation, Fourier features, pretrained weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from cadtrain.config.sections import ImageEncoderConfig, PointEncoderConfig
from cadtrain.errors import ConfigError
from cadtrain.model.encoders.image import ImageEncoder
from cadtrain.model.encoders.point import PointEncoder, fourier_features
from cadtrain.model.encoders.pretrained import build_image_encoder, build_point_encoder, load_point_weights

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {"num_latents": 5, "width": 16, "num_heads": 2, "num_layers": 2, "num_frequencies": 4}


def test_fourier_features_are_the_sines_and_cosines_of_doublings() -> None:
    xyz = torch.tensor([[0.3, -0.7, 0.99]])
    features = fourier_features(xyz, 8)[0]
    assert features.shape == (3 * (2 * 8 + 1),)
    assert torch.equal(features[:3], xyz[0])
    angles = [value * 2**k for value in (0.3, -0.7, 0.99) for k in range(8)]
    expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
    torch.testing.assert_close(features[3:], expected, rtol=0, atol=1e-5)


def test_fourier_features_stay_exact_in_a_bf16_model() -> None:
    points = torch.rand(1, 50, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = PointEncoder(**SIZES)
    seen = []
    encoder.input_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
    encoder(points)
    encoder.bfloat16()
    assert encoder(points).dtype == torch.bfloat16
    exact, rounded = seen
    # Rounded once, at the end: at most 2^-9 of each feature's value.
    assert (exact - rounded).abs().max() <= 2**-8
    assert not list(encoder.buffers())


def test_point_encoder_sees_a_set() -> None:
    torch.manual_seed(0)
    encoder = PointEncoder(**SIZES)
    points = torch.randn(2, 30, 6)
    latents = encoder(points)
    assert latents.shape == (2, 5, 16)
    torch.testing.assert_close(encoder(points[:, torch.randperm(30)]), latents, rtol=1e-4, atol=1e-5)
    moved = points.clone()
    moved[0, 0, 3:] *= -1
    changed = (encoder(moved) - latents).abs().amax(dim=(1, 2))
    assert changed[0] > 0
    assert changed[1] == 0


@pytest.mark.parametrize("name", ["points.safetensors", "points.bin"])
@pytest.mark.parametrize("prefix", ["", "model.shape_model.encoder."])
def test_point_weights_are_read(tmp_path: Path, name: str, prefix: str) -> None:
    weights = PointEncoder(**SIZES).state_dict()
    state = {prefix + key: value for key, value in weights.items()}
    if prefix:
        state |= {
            "model.shape_model.pre_kl.weight": torch.zeros(2, 2),
            f"{prefix}fourier_embedder.frequencies": torch.ones(4),
        }
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    encoder = build_point_encoder(PointEncoderConfig(pretrained=str(path), **SIZES))
    assert all(torch.equal(value, weights[key]) for key, value in encoder.state_dict().items())


def test_point_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = PointEncoder(**SIZES).state_dict()
    state["extra"] = torch.zeros(1)
    del state["ln_post.bias"]
    state["query"] = torch.zeros(6, 16)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError) as caught:
        load_point_weights(PointEncoder(**SIZES), tmp_path / "odd.safetensors")
    for part in ("missing keys: ln_post.bias", "unexpected keys: extra", "query is [6, 16] instead of [5, 16]"):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_that_is_no_state_dict_is_named(tmp_path: Path, content: bytes) -> None:
    for name in ("broken.bin", "broken.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            load_point_weights(PointEncoder(**SIZES), tmp_path / name)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"query": Path("x")}, tmp_path / "evil.bin")
    with pytest.raises(ConfigError, match=r"evil\.bin"):
        load_point_weights(PointEncoder(**SIZES), tmp_path / "evil.bin")


def test_image_encoder_normalises_and_drops_the_class_token() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(Dinov2Config(image_size=42, **SMALL), image_size=42)
    views = torch.rand(2, 3, 42, 42)
    tokens = encoder(views)
    assert tokens.shape == (2, 9, 16) == (2, encoder.num_tokens, encoder.width)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (views - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = encoder.model(pixel_values=normalised).last_hidden_state[:, 1:]
    torch.testing.assert_close(tokens, expected)


def test_position_embeddings_of_another_image_size_are_interpolated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(image_size=70, **SMALL)).save_pretrained(tmp_path)
    config = ImageEncoderConfig(pretrained=str(tmp_path), image_size=28)
    encoder = build_image_encoder(config, dtype=torch.float32, device=torch.device("cpu"))
    assert encoder.model.embeddings.position_embeddings.shape[1] == 26
    assert encoder.num_tokens == 4
    assert encoder(torch.rand(1, 3, 28, 28)).shape == (1, 4, 16)
    assert not encoder.model.training


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    config = ImageEncoderConfig(pretrained=str(tmp_path), image_size=224)
    with pytest.raises(ConfigError, match="is a vit, not a dinov2"):
        build_image_encoder(config, dtype=torch.float32, device=torch.device("cpu"))


def test_unknown_dinov2_fields_are_named() -> None:
    config = ImageEncoderConfig(config={"hidden_sizes": 3})
    with pytest.raises(ConfigError, match=r"model\.image\.config\.hidden_sizes: dinov2 has no such field"):
        build_image_encoder(config, dtype=torch.float32, device=torch.device("cpu"))
