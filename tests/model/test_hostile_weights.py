"""Pretrained weights that lie about themselves: every place that opens them refuses, says which file, and runs nothing."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cadtrain.config.sections import LanguageModelConfig, PointEncoderConfig
from cadtrain.errors import ConfigError
from cadtrain.model.encoders.pretrained import build_point_encoder
from cadtrain.model.language import language_config, load_language_model
from cadtrain.model.pretrained import fill_from_files
from cadtrain.model.tokenizer import byte_tokenizer
from cadtrain.model.weights import WholeWeights
from tests.model.tiny import make_model, model_config

Header = dict[str, Any]


def lie(path: Path, edit: Callable[[Header, list[str]], object]) -> None:
    """Change the header of a safetensors file; the names of its weights are given in order."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header, [name for name in header if name != "__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def overlap(header: Header, names: list[str]) -> None:
    """A weight whose values are another's."""
    twin = next(n for n in names[1:] if header[n]["shape"] == header[names[-1]]["shape"] and n != names[-1])
    header[names[-1]]["data_offsets"] = header[twin]["data_offsets"]


LIES: dict[str, Callable[[Path], None]] = {
    "ends far behind the file": lambda path: lie(path, lambda h, n: h[n[0]]["data_offsets"].__setitem__(1, 1 << 45)),
    "a shape beyond its bytes": lambda path: lie(path, lambda h, n: h[n[0]].update(shape=[1 << 30, 1 << 30])),
    "a shape that overflows": lambda path: lie(path, lambda h, n: h[n[0]].update(shape=[1 << 62, 1 << 62])),
    "overlapping values": lambda path: lie(path, overlap),
    "a negative offset": lambda path: lie(path, lambda h, n: h[n[0]]["data_offsets"].__setitem__(0, -8)),
    "offsets back to front": lambda path: lie(path, lambda h, n: h[n[0]]["data_offsets"].reverse()),
    "a huge header": lambda path: path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
    "a header longer than the file": lambda path: path.write_bytes(struct.pack("<Q", 1 << 20) + b"{}"),
    "a file that is cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A language model as other tools save it."""
    folder = tmp_path / "base"
    make_model(model_config(image=False, point=False)).language.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def open_whole(folder: Path) -> None:
    config = language_config(LanguageModelConfig(pretrained=str(folder)), byte_tokenizer())
    load_language_model(str(folder), config, dtype=torch.float32, device=torch.device("cpu"))


def open_shared_out(folder: Path) -> None:
    """As under ZeRO-3: tensor by tensor."""
    fill_from_files(make_model(model_config(image=False, point=False)).language, str(folder), WholeWeights())


@pytest.mark.parametrize("open_it", [open_whole, open_shared_out])
def test_the_folder_is_read_where_it_tells_the_truth(base: Path, open_it: Callable[[Path], None]) -> None:
    """Without this, the tests below could not fail."""
    open_it(base)


@pytest.mark.parametrize("kind", LIES)
@pytest.mark.parametrize("open_it", [open_whole, open_shared_out])
def test_a_lying_header_of_a_language_model_is_refused(base: Path, open_it: Callable[[Path], None], kind: str) -> None:
    LIES[kind](base / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.language.*could not be (read|loaded)"):
        open_it(base)


@pytest.mark.parametrize("kind", LIES)
def test_a_lying_header_of_a_point_encoder_is_refused(tmp_path: Path, kind: str) -> None:
    sizes = {"num_latents": 5, "width": 16, "num_heads": 2, "num_layers": 1}
    path = tmp_path / "points.safetensors"
    save_file(build_point_encoder(PointEncoderConfig(**sizes)).state_dict(), path)  # type: ignore[arg-type]
    build_point_encoder(PointEncoderConfig(pretrained=str(path), **sizes))  # type: ignore[arg-type]
    LIES[kind](path)
    with pytest.raises(ConfigError, match=r"points\.safetensors could not be read"):
        build_point_encoder(PointEncoderConfig(pretrained=str(path), **sizes))  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["../outside.safetensors", "{root}/outside.safetensors", "sub/model.safetensors", "..", "weights.bin"])
def test_an_index_that_leads_out_of_its_folder_is_refused(base: Path, file: str) -> None:
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": file.format(root=base.parent)}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="which is no safetensors file of its folder"):
        open_shared_out(base)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_what_is_no_index_is_named(base: Path, content: str) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match="is no index of weights"):
        open_shared_out(base)


class Hostile:
    """Unpickling it runs a shell command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("open_it", [open_whole, open_shared_out])
def test_a_pickled_language_model_runs_nothing(base: Path, tmp_path: Path, open_it: Callable[[Path], None], as_zip: bool) -> None:
    (base / "model.safetensors").unlink()
    torch.save({"a": Hostile(tmp_path / "marker")}, base / "pytorch_model.bin", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ConfigError):
        open_it(base)
    assert not (tmp_path / "marker").exists()
