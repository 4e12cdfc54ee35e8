"""From `data encode` to a trained model: features are the encoders' own, hold for one model and one dataset, and train the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cadtrain.checkpoint.zero_shards import ShardedWeights
from cadtrain.cli.data import app
from cadtrain.config.load import load_run_config
from cadtrain.config.sections import RunConfig
from cadtrain.data.features.manifest import FeatureManifest
from cadtrain.data.features.store import FeatureStore, SplitFeatures
from cadtrain.data.manifest import SPLITS
from cadtrain.data.order import draw_points
from cadtrain.data.sample import decode_image
from cadtrain.data.shards import PartDataset
from cadtrain.errors import ConfigError, DataError, EnvironmentFault, UsageError
from cadtrain.launch.planning import LaunchRequest, plan_launch
from cadtrain.model.build import build_encoders
from cadtrain.train import encode as encode_module
from cadtrain.train.encode import EncodeOptions, EncodeProgress, encode
from cadtrain.train.encoded import check_encoders, open_features, rest_encoders
from tests.train.forked import Fault, ForkServer
from tests.train.small_runs import final_weights, metrics, output, write_config


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen parts with two views each."""
    from cadtrain.data.synth.make import synthesize

    folder = tmp_path_factory.mktemp("parts") / "dataset"
    synthesize(16, folder, num_points=32, num_views=2, image_size=56, workers=2, difficulty="simple", captions="short")
    return folder


def config_file(path: Path, parts: Path, **data: Any) -> Path:
    """A run of two stages in which both encoders are frozen."""
    write_config(path, parts, stage=3, dropout=0.0)
    told = json.loads(path.read_text())
    told["model"]["point"]["trainable"] = False
    told["data"].update(data)
    path.write_text(json.dumps(told))
    return path


def load(path: Path, *overrides: str) -> RunConfig:
    return load_run_config(path, overrides).config


@pytest.fixture(scope="module")
def made(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration, and the features that two draws of its encoders give."""
    folder = tmp_path_factory.mktemp("encoded")
    config = config_file(folder / "run.yaml", parts)
    encode(load(config), EncodeOptions(folder / "features", device="cpu", batch=5, variants=2))
    return config, folder / "features"


def test_features_are_what_the_encoders_give(made: tuple[Path, Path], parts: Path) -> None:
    config = load(made[0])
    store = FeatureStore.open(made[1])
    model = build_encoders(config.model, dtype=torch.float32, device="cpu", seed=config.seed)
    seen = 0
    for split in SPLITS:
        dataset = PartDataset.open(parts, split)
        features = SplitFeatures(store, dataset)
        for index in range(len(dataset)):
            sample = dataset[index]
            assert features.num_views(index) == len(sample.images) == 2
            for view, png in enumerate(sample.images):
                shown = torch.from_numpy(decode_image(png, 28))[None]
                torch.testing.assert_close(
                    features.views(index, [view]), model.image_encoder(shown), rtol=1e-4, atol=1e-5
                )
            for epoch in (0, 1) if split == "train" else (-1,):
                drawn = torch.from_numpy(draw_points(config.seed, epoch, index, sample.checked_points(), 16))[None]
                torch.testing.assert_close(
                    features.cloud(index, epoch), model.point_encoder(drawn), rtol=1e-4, atol=1e-5
                )
            seen += 1
    assert seen == 16
    clouds = SplitFeatures(store, PartDataset.open(parts, "train"))
    assert not torch.equal(clouds.cloud(0, 0), clouds.cloud(0, 1))
    assert torch.equal(clouds.cloud(0, 0), clouds.cloud(0, 2))


def test_an_interrupted_encoding_goes_on_and_ends_the_same(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "FILE_BYTES", 3 * 4 * 24 * 4)  # three rows a file
    options = EncodeOptions(tmp_path / "whole", device="cpu", batch=2, variants=2)
    whole = encode(load(made[0]), options)
    assert whole.resumed == 0
    assert len(whole.manifest.files) > 15

    def stop(state: EncodeProgress) -> None:
        if state.done >= 20:
            raise KeyboardInterrupt

    halved = dataclasses.replace(options, out=tmp_path / "halved")
    with pytest.raises(KeyboardInterrupt):
        encode(load(made[0]), halved, progress=stop)
    assert not halved.out.exists()
    told: list[EncodeProgress] = []
    summary = encode(load(made[0]), halved, progress=told.append)
    assert 15 <= summary.resumed <= 20
    assert (told[0].done, told[-1].done) == (summary.resumed, summary.manifest.total_rows)
    assert summary.manifest == whole.manifest
    for name in whole.manifest.files:
        assert (halved.out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_features_are_stored_in_the_type_that_is_asked_for(made: tuple[Path, Path], tmp_path: Path, dtype: Any) -> None:
    encode(load(made[0]), EncodeOptions(tmp_path / "small", device="cpu", dtype=dtype))
    small, full = FeatureStore.open(tmp_path / "small"), FeatureStore.open(made[1])
    assert small.manifest.encoded == full.manifest.encoded, "the encoders ran in the run's precision all the same"
    rows = full.rows("train", "image", [0, 3])
    assert torch.equal(small.rows("train", "image", [0, 3]), rows.to(small.dtype))


def test_a_feature_that_is_not_finite_names_the_part(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = encode_module.RowSource.read

    def spoilt(self: Any, split: str, kind: Any, rows: Any) -> np.ndarray:
        shown = plain(self, split, kind, rows)
        if (split, kind) == ("train", "point"):
            shown[list(rows).index(3)] = np.inf
        return shown

    monkeypatch.setattr(encode_module.RowSource, "read", spoilt)
    name = PartDataset.open(load(made[0]).data.path, "train").texts(3).id  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"{name} \(draw of points 0\): its features are not finite in float32"):
        encode(load(made[0]), EncodeOptions(tmp_path / "spoilt", device="cpu"))


def test_what_cannot_be_encoded_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    options = EncodeOptions(tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match=r"model.point.trainable: true: the features of an encoder that learns"):
        encode(load(made[0], "model.point.trainable=true"), options)
    without = (
        "model.image=null",
        "model.point=null",
        'curriculum=[{"name": "a", "duration": 1, "modalities": {"text": 1}}]',
    )
    with pytest.raises(UsageError, match=r"nothing to encode: model.image and model.point are null"):
        encode(load(made[0], *without), options)
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentFault, match="no CUDA device"):
            encode(load(made[0]), dataclasses.replace(options, device="cuda"))
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_with_features_has_no_encoder_that_learns(made: tuple[Path, Path]) -> None:
    config, features = made
    with pytest.raises(ConfigError) as caught:
        load(
            config, f"data.features={features}", "model.image.trainable=true",
            "curriculum.1.multipliers.point_encoder=0.5", "curriculum.1.multipliers.image_encoder=0",
        )  # fmt: skip
    assert [(fault.where.split()[-1], fault.message.split(",")[0].rstrip(".")) for fault in caught.value.faults] == [
        ("model.image.trainable", "found true"),
        (
            "curriculum.1.multipliers.point_encoder",
            "0.5 is a learning rate for an encoder that data.features stands in for",
        ),
    ]


def test_features_of_other_data_are_refused_before_ranks_start(made: tuple[Path, Path], sixteen_parts: Path) -> None:
    config, features = made
    cases = {
        f"data.path={sixteen_parts}": "the features are of the dataset",
        "data.num_points=17": "each draw has 16 points, but data.num_points is 17",
    }
    for override, message in cases.items():
        settings = (override, f"data.features={features}")
        with pytest.raises(DataError, match=message):
            plan_launch(LaunchRequest(config=str(config), gpus=1, overrides=settings), environ={})
        run = load(config, *settings)
        with pytest.raises(DataError, match=message):
            open_features(run, features, run.data.path)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no such folder"):
        plan_launch(LaunchRequest(config=str(config), gpus=1, overrides=("data.features=nowhere",)), environ={})


def test_a_kind_that_is_lacking_is_named(made: tuple[Path, Path], tmp_path: Path, parts: Path) -> None:
    stages = 'curriculum=[{"name": "a", "duration": 1, "modalities": {"point": 1}}]'
    encode(load(made[0], "model.image=null", stages), EncodeOptions(tmp_path / "points", device="cpu"))
    open_features(load(made[0], "model.image=null", stages), tmp_path / "points", parts)
    with pytest.raises(DataError, match="the curriculum shows image samples, but there are no image features"):
        open_features(load(made[0]), tmp_path / "points", parts)


def test_features_of_another_encoder_are_refused_with_both_named(made: tuple[Path, Path]) -> None:
    config, store = load(made[0]), FeatureStore.open(made[1])
    stored = store.manifest.encoded["image"].weights

    def model(seed: int, dtype: torch.dtype = torch.float32) -> Any:
        return build_encoders(config.model, dtype=dtype, device="cpu", seed=seed)

    check_encoders(store, model(config.seed))
    with pytest.raises(
        DataError, match=rf"the image encoder is \w+, the features are of {stored} \(the same sizes, other weights\)"
    ):
        check_encoders(store, model(config.seed + 1))
    with pytest.raises(DataError, match=r"\(dtype bfloat16 here, float32 there\)") as caught:
        check_encoders(store, model(config.seed, torch.bfloat16))
    assert "cadtrain data encode" in str(caught.value)
    assert "the point encoder is" in str(caught.value)


def test_encoders_rest_in_host_memory_where_each_rank_has_them_whole() -> None:
    for stage, expected in ((0, ["cpu", "cpu"]), (2, ["cpu", "cpu"]), (3, ["meta", "meta"])):
        moved = SimpleNamespace(image_encoder=Recorder(), point_encoder=Recorder())
        rest_encoders(moved, zero_stage=stage)  # type: ignore[arg-type]
        assert [moved.image_encoder.device, moved.point_encoder.device] == expected
    rest_encoders(SimpleNamespace(image_encoder=None, point_encoder=None), zero_stage=1)  # type: ignore[arg-type]


class Recorder:
    """Notes where it is moved."""

    device = "meta"

    def to(self, device: str) -> None:
        self.device = device


def test_the_command_says_sizes_first_and_finds_damage(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "features"
    arguments = ["encode", str(made[0]), "--out", str(out), "--device", "cpu", "--json"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.exception
    report = json.loads(shown.stdout)
    assert report["manifest"]["rows"]["train"] == {"image": 28, "point": 14}
    assert "32 views of 4 tokens of 24: 384 B each" in shown.stderr
    assert "in fp32 altogether, encoded on cpu" in shown.stderr
    by_config = ["encode", str(made[0]), "--set", f"data.features={out}", "--check"]
    assert "files of" in CliRunner().invoke(app, by_config).stdout
    path = out / "test" / "point-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    damaged = CliRunner().invoke(app, [*by_config, "--json"])
    assert damaged.exit_code == 2
    assert [line.split(":")[0] for line in json.loads(damaged.stdout)["damaged"]] == [str(path)]
    with pytest.raises(UsageError, match="no folder to write to"):
        CliRunner().invoke(app, ["encode", str(made[0])], catch_exceptions=False)


def test_a_run_with_features_is_the_run_without(
    server: ForkServer, made: tuple[Path, Path], parts: Path, tmp_path: Path
) -> None:
    """Two ranks under ZeRO-3, six steps in two epochs, two stored draws: the same samples, views and points.

    A kill and a resume change nothing, and checkpoints hold the encoders.
    """
    live = config_file(tmp_path / "live.yaml", parts)
    read = config_file(tmp_path / "read.yaml", parts, features=str(made[1]))
    assert server.run(tmp_path / "live", live).is_done, output(tmp_path / "live")
    assert server.run(tmp_path / "read", read).is_done, output(tmp_path / "read")
    expected, found = metrics(tmp_path / "live"), metrics(tmp_path / "read")
    for key in ("step", "epoch", "samples", "tokens", "target_tokens"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-6)
    assert validations(tmp_path / "read") == pytest.approx(validations(tmp_path / "live"), rel=1e-6)
    trained, of_live = final_weights(tmp_path / "read"), final_weights(tmp_path / "live")
    assert trained.keys() == of_live.keys()
    encoders = [name for name in trained if "_encoder." in name]
    assert len(encoders) > 20
    assert {name: trained[name] for name in encoders} == {name: of_live[name] for name in encoders}
    fault = Fault(at=4, only=r"os.rename step-\d+\.tmp$")
    assert not server.run(tmp_path / "killed", read, fault=fault).is_done
    assert server.run(tmp_path / "killed", read, resume=True).is_done, output(tmp_path / "killed")
    assert final_weights(tmp_path / "killed") == trained


def validations(run_dir: Path) -> list[float]:
    """Every validation loss of a run."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [loss for row in rows if row.get("validation") for _, loss in sorted(row["losses"].items())]


@pytest.mark.slow
def test_weights_from_elsewhere_are_checked_once_they_are_there(
    server: ForkServer, made: tuple[Path, Path], parts: Path, tmp_path: Path
) -> None:
    """A run that begins with another run's checkpoint has that one's encoders, whatever its configuration builds."""
    other = config_file(tmp_path / "other.yaml", parts)
    told = json.loads(other.read_text()) | {"seed": 1}
    other.write_text(json.dumps(told))
    assert server.run(tmp_path / "other", other).is_done, output(tmp_path / "other")
    read = config_file(tmp_path / "read.yaml", parts, features=str(made[1]))
    told = json.loads(read.read_text())
    read.write_text(json.dumps({**told, "seed": 1}))
    assert not server.run(tmp_path / "seed", read).is_done
    assert "not the features of this run's configuration" in output(tmp_path / "seed")
    told["checkpoint"]["init_from"] = str(tmp_path / "other")
    read.write_text(json.dumps(told))
    assert not server.run(tmp_path / "begun", read).is_done
    assert "not the features of the checkpoint that this run begins with: the image encoder is" in output(
        tmp_path / "begun"
    )


def test_the_export_of_a_run_with_features_has_its_encoders(
    server: ForkServer, made: tuple[Path, Path], parts: Path, tmp_path: Path
) -> None:
    """Under ZeRO-2, where the encoders rest in host memory."""
    from cadtrain.model.encoders.fingerprint import fingerprint

    read = config_file(tmp_path / "read.yaml", parts, features=str(made[1]))
    told = json.loads(read.read_text()) | {"zero": {"stage": 2}}
    read.write_text(json.dumps(told))
    assert server.run(tmp_path / "read", read).is_done, output(tmp_path / "read")
    saved = ShardedWeights.open(tmp_path / "read" / "checkpoints" / "step-00000006" / "engine")
    config = load(read)
    model = build_encoders(config.model, dtype=torch.float32, device="cpu", seed=99)
    for name in ("image_encoder", "point_encoder"):
        encoder = getattr(model, name)
        encoder.load_state_dict(
            {key.removeprefix(f"{name}."): saved[key] for key in saved if key.startswith(f"{name}.")}
        )
        assert fingerprint(encoder).weights == FeatureManifest.read(made[1]).encoded[name.split("_")[0]].weights
