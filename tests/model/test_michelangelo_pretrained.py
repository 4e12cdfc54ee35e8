"""Michelangelo's published checkpoints: names, the layout of heads, and files that are not what they claim.

The reference below computes the encoder from its formulas in float64, one head at a time, and shares no code with the package.
Source: Zhao et al. 2023, arXiv 2306.17115, section 3.1, and the names and layouts of its released `CrossAttentionEncoder`.
"""

from __future__ import annotations

import os
import sys
import types
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax

from cadtrain.config.sections import PointEncoderConfig
from cadtrain.errors import ConfigError
from cadtrain.model.encoders.point import PointEncoder
from cadtrain.model.encoders.pretrained import build_point_encoder, load_point_weights

LATENTS, WIDTH, HEADS, LAYERS, FREQUENCIES = 5, 24, 3, 2, 8
SIZES = {"num_latents": LATENTS, "width": WIDTH, "num_heads": HEADS, "num_layers": LAYERS, "num_frequencies": FREQUENCIES}
PREFIX = "model.shape_model.encoder."
Array = np.ndarray[Any, Any]


def published_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of the released checkpoint: the whole aligned shape model's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"query": (LATENTS, WIDTH), "input_proj.weight": (WIDTH, 3 * (2 * FREQUENCIES + 1) + 3), "input_proj.bias": (WIDTH,)}

    def block(prefix: str, projections: dict[str, int], norms: int) -> None:
        for name, times in projections.items():
            shapes[f"{prefix}.attn.{name}.weight"] = (times * WIDTH, WIDTH)
        shapes.update({f"{prefix}.attn.c_proj.weight": (WIDTH, WIDTH), f"{prefix}.attn.c_proj.bias": (WIDTH,)})
        shapes.update({f"{prefix}.mlp.c_fc.weight": (4 * WIDTH, WIDTH), f"{prefix}.mlp.c_fc.bias": (4 * WIDTH,)})
        shapes.update({f"{prefix}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH), f"{prefix}.mlp.c_proj.bias": (WIDTH,)})
        for number in range(1, norms + 1):
            shapes.update({f"{prefix}.ln_{number}.weight": (WIDTH,), f"{prefix}.ln_{number}.bias": (WIDTH,)})

    block("cross_attn", {"c_q": 1, "c_kv": 2}, norms=3)
    for layer in range(LAYERS):
        block(f"self_attn.resblocks.{layer}", {"c_qkv": 3}, norms=2)
    shapes.update({"ln_post.weight": (WIDTH,), "ln_post.bias": (WIDTH,)})
    around = {
        "model.shape_projection": (WIDTH, 8), "model.shape_model.pre_kl.weight": (16, WIDTH),
        "model.shape_model.transformer.resblocks.0.attn.c_qkv.weight": (3 * WIDTH, WIDTH),
        "model.shape_model.geo_decoder.query_proj.weight": (WIDTH, 51),
    }  # fmt: skip
    names = {**{PREFIX + name: shape for name, shape in shapes.items()}, **around}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in names.items()}


class Reference:
    """The encoder in float64 from the arrays of a state dict."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.arrays = {n.removeprefix(PREFIX): t.double().numpy() for n, t in state.items() if n.startswith(PREFIX)}

    def __call__(self, cloud: Array) -> Array:
        """[L, D] latents of one cloud [P, 6]."""
        data = self.linear("input_proj", np.concatenate([self.embed(cloud[:, :3]), cloud[:, 3:]], axis=1))
        x = self.arrays["query"]
        x = x + self.cross(self.norm("cross_attn.ln_1", x), self.norm("cross_attn.ln_2", data))
        x = x + self.mlp("cross_attn.mlp", self.norm("cross_attn.ln_3", x))
        for layer in range(LAYERS):
            at = f"self_attn.resblocks.{layer}"
            x = x + self.attend_to_itself(f"{at}.attn", self.norm(f"{at}.ln_1", x))
            x = x + self.mlp(f"{at}.mlp", self.norm(f"{at}.ln_2", x))
        return self.norm("ln_post", x)

    def embed(self, xyz: Array) -> Array:
        """gamma(x) = [x, sin(2^0 x_1) … sin(2^7 x_1), sin(2^0 x_2) …, the cosines in the same order], without a factor pi."""
        columns = [xyz[:, axis] for axis in range(3)]
        for wave in (np.sin, np.cos):
            columns += [wave(xyz[:, axis] * 2.0**k) for axis in range(3) for k in range(FREQUENCIES)]
        return np.stack(columns, axis=1)

    def cross(self, x: Array, data: Array) -> Array:
        size, outputs = WIDTH // HEADS, []
        for head in range(HEADS):
            rows_q, rows_kv = head * size, head * 2 * size  # each head has its keys, then its values
            query = x @ self.arrays["cross_attn.attn.c_q.weight"][rows_q : rows_q + size].T
            key = data @ self.arrays["cross_attn.attn.c_kv.weight"][rows_kv : rows_kv + size].T
            value = data @ self.arrays["cross_attn.attn.c_kv.weight"][rows_kv + size : rows_kv + 2 * size].T
            outputs.append(softmax(query @ key.T / np.sqrt(size), axis=1) @ value)
        return self.linear("cross_attn.attn.c_proj", np.concatenate(outputs, axis=1))

    def attend_to_itself(self, at: str, x: Array) -> Array:
        size, outputs = WIDTH // HEADS, []
        for head in range(HEADS):
            weight = self.arrays[f"{at}.c_qkv.weight"][head * 3 * size : (head + 1) * 3 * size]
            query, key, value = (x @ weight[part * size : (part + 1) * size].T for part in range(3))
            outputs.append(softmax(query @ key.T / np.sqrt(size), axis=1) @ value)
        return self.linear(f"{at}.c_proj", np.concatenate(outputs, axis=1))

    def mlp(self, at: str, x: Array) -> Array:
        hidden = self.linear(f"{at}.c_fc", x)
        return self.linear(f"{at}.c_proj", hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))))

    def linear(self, at: str, x: Array) -> Array:
        return x @ self.arrays[f"{at}.weight"].T + self.arrays[f"{at}.bias"]

    def norm(self, at: str, x: Array) -> Array:
        centred = x - x.mean(axis=1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * self.arrays[f"{at}.weight"] + self.arrays[f"{at}.bias"]


def encoder_from(path: Path) -> PointEncoder:
    return build_point_encoder(PointEncoderConfig(pretrained=str(path), **SIZES))  # type: ignore[arg-type]


def test_a_published_checkpoint_gives_the_published_function(tmp_path: Path) -> None:
    state = published_state()
    torch.save({"epoch": 3, "global_step": 7, "state_dict": state}, tmp_path / "shapevae.ckpt")
    clouds = np.random.default_rng(0).uniform(-1, 1, (2, 40, 6))
    encoder = encoder_from(tmp_path / "shapevae.ckpt").double()
    # Fourier features are fp32 in the package whatever the weights are.
    found = encoder(torch.from_numpy(clouds)).detach().numpy()
    reference = Reference(state)
    expected = np.stack([reference(cloud.astype(np.float32).astype(np.float64)) for cloud in clouds])
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
@pytest.mark.parametrize("as_zip", [True, False])
def test_every_kind_of_torch_file_is_read(tmp_path: Path, suffix: str, as_zip: bool) -> None:
    state = published_state()
    torch.save({"state_dict": state}, tmp_path / f"weights{suffix}", _use_new_zipfile_serialization=as_zip)
    found = encoder_from(tmp_path / f"weights{suffix}").state_dict()
    assert len(found) == sum(name.startswith(PREFIX) for name in state)
    assert all(torch.equal(tensor, state[PREFIX + name]) for name, tensor in found.items())


def test_the_hint_says_what_the_file_is_of(tmp_path: Path) -> None:
    """The published encoder has 256 latents and a global one: people will write 256."""
    torch.save(published_state(), tmp_path / "weights.pt")
    config = PointEncoderConfig(pretrained=str(tmp_path / "weights.pt"), **{**SIZES, "num_latents": 4})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"query is \[5, 24\] instead of \[4, 24\]") as caught:
        build_point_encoder(config)
    assert "The file is of num_latents: 5, width: 24, num_layers: 2, num_frequencies: 8;" in str(caught.value)


def test_an_encoder_with_biases_on_its_queries_is_named(tmp_path: Path) -> None:
    state = published_state()
    state[f"{PREFIX}cross_attn.attn.c_q.bias"] = torch.zeros(WIDTH)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"unexpected keys: cross_attn\.attn\.c_q\.bias.*`qkv_bias: true`"):
        load_point_weights(PointEncoder(**SIZES), tmp_path / "weights.pt")


def _foreign(module: str, name: str) -> Any:
    """An object of a class that exists while it is pickled and not when it is read."""
    package = module.split(".")[0]
    kind = type(name, (), {"__module__": module, "__init__": lambda self: None})
    for part in {package, module}:
        sys.modules.setdefault(part, types.ModuleType(part))
    setattr(sys.modules[module], name, kind)
    item = kind()
    item.__dict__.update(_content={"lr": 1e-4}, _metadata=defaultdict(dict, key=1))
    return item


@pytest.fixture
def lightning_records() -> Any:
    """Hyper-parameters and callbacks as Lightning writes them, of packages that are not installed here."""
    before = set(sys.modules)
    yield lambda: {"hyper_parameters": _foreign("omegaconf.dictconfig", "DictConfig"), "kinds": [dict, int],
                   "callbacks": {"best": _foreign("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")}}  # fmt: skip
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_records_of_lightning_beside_the_weights_are_passed_over(tmp_path: Path, lightning_records: Any) -> None:
    state = published_state()
    torch.save({"state_dict": state, **lightning_records()}, tmp_path / "lightning.ckpt")
    for name in [name for name in sys.modules if name.startswith(("omegaconf", "pytorch_lightning"))]:
        del sys.modules[name]
    encoder = encoder_from(tmp_path / "lightning.ckpt")
    assert torch.equal(encoder.query, state[f"{PREFIX}query"])
    assert not any(name.startswith(("omegaconf", "pytorch_lightning")) for name in sys.modules)


class Shell:
    """Unpickling it runs a shell command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class Import(Shell):
    """Unpickling it calls an imported function that is no class of Lightning's."""

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", [Shell, Import])
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_checkpoint_that_would_run_something_is_refused(tmp_path: Path, kind: type[Shell], as_zip: bool) -> None:
    content = {"state_dict": published_state(), "hyper_parameters": kind(tmp_path / "marker")}
    torch.save(content, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ConfigError, match=r"evil\.ckpt could not be read.*it asks for \S+, which.*Nothing of it was run"):
        encoder_from(tmp_path / "evil.ckpt")
    assert not (tmp_path / "marker").exists()


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    torch.save(published_state(), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record))
    with pytest.raises(ConfigError, match=r"compressed, which torch\.save never does"):
        encoder_from(tmp_path / "packed.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and nothing else", b"\x80\x02}q\x00."])
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"odd\.pt"):
        encoder_from(tmp_path / "odd.pt")
