"""Pretrained language models: the same bits on every way in, each rank its share under ZeRO-3, and faults that name weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cadtrain.config.sections import LanguageModelConfig, ModelConfig
from cadtrain.errors import ConfigError
from cadtrain.model import build_model, build_tokenizer
from cadtrain.model.language import language_config, load_language_model
from cadtrain.model.pretrained import fill_from_files
from cadtrain.model.tokenizer import byte_tokenizer
from cadtrain.model.weights import WholeWeights
from tests.model.pretrained_memory import make_model as make_random_model
from tests.model.pretrained_memory import measure
from tests.model.tiny import make_model, model_config
from tests.train.ranks import RankPool, pool_of

# Sizes that three ranks cannot share out evenly.
FIELDS = {"hidden_size": 40, "head_dim": 10, "intermediate_size": 67}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[RankPool]:
    """An odd number of ranks, so that most weights do not divide."""
    yield from pool_of(3)


def save_model(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, size: str = "30KB") -> State:
    """A language model as other tools save it, in several files; its weights."""
    config = model_config(image=False, point=False, fields={**FIELDS, "tie_word_embeddings": tied})
    language = make_model(config, seed=5).language.to(dtype)
    language.save_pretrained(folder, max_shard_size=size)
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return {name: parameter.detach().clone() for name, parameter in language.named_parameters()}


def _load_on_rank(folder: Path, way: str, dtype: torch.dtype, codec: str, offload: bool) -> tuple[State, list[int]]:
    """The whole weights after a load under ZeRO-3, and [values that this rank keeps, broadcasts of the load]."""
    import deepspeed

    from cadtrain.cad.codec import added_vocabulary, get_codec
    from cadtrain.config.deepspeed_config import build_deepspeed_config
    from cadtrain.train.engine import ZeroSharding, init_process_group

    device = init_process_group()
    config = build_deepspeed_config(
        zero_stage=3, world_size=3, precision="bf16" if dtype == torch.bfloat16 else "fp32", hidden_size=40, offload_parameters=offload,
        offload_optimizer=offload,
    ).to_dict()  # fmt: skip
    sharding = ZeroSharding(config)
    if way == "gather":
        sharding.share = lambda parameter: None  # type: ignore[method-assign]
    section = LanguageModelConfig(pretrained=str(folder), tokenizer="bytes")
    sent = []
    plain = deepspeed.comm.broadcast
    deepspeed.comm.broadcast = lambda *args, **kwargs: sent.append(1) or plain(*args, **kwargs)
    try:
        model = build_model(
            ModelConfig(language=section, image=None, point=None), tokenizer=build_tokenizer(section, added_vocabulary(codec)),
            codec=codec, codec_version=get_codec(codec).version, dtype=dtype, device=device, seed=3, sharding=sharding,
        )  # fmt: skip
    finally:
        deepspeed.comm.broadcast = plain
    parameters = dict(model.language.named_parameters())
    kept = sum(parameter.ds_tensor.numel() for parameter in parameters.values())
    whole = {}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().clone()
    return whole, [kept, len(sent)]


@pytest.mark.parametrize(
    ("tied", "stored", "wanted", "offload"),
    [
        (False, torch.float32, torch.float32, False),
        (True, torch.bfloat16, torch.float32, False),
        (False, torch.float32, torch.bfloat16, False),
        (True, torch.float32, torch.float32, True),
    ],
)
@pytest.mark.parametrize("way", ["share", "gather"])
def test_ranks_that_share_out_the_weights_read_the_files_bits(
    three_ranks: RankPool, tmp_path: Path, way: str, tied: bool, stored: torch.dtype, wanted: torch.dtype, offload: bool
) -> None:
    expected = save_model(tmp_path / "base", tied=tied, dtype=stored)
    numel = sum(tensor.numel() for tensor in expected.values())
    for found, (kept, broadcasts) in three_ranks.run(_load_on_rank, tmp_path / "base", way, wanted, "compact", offload):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.to(wanted)), name
        assert numel / 3 <= kept <= numel / 3 + len(expected)
        # Read by its own rank, nothing is sent; else every weight is, once.
        assert broadcasts == (0 if way == "share" else len(expected))


def test_rows_of_new_tokens_start_alike_whichever_way_the_others_were_read(three_ranks: RankPool, tmp_path: Path) -> None:
    """The files have 258 rows; the codec's words make it 557, and the model 576."""
    expected = save_model(tmp_path / "base")
    arguments = (torch.float32, "tokens", False)
    shared, _ = three_ranks.run(_load_on_rank, tmp_path / "base", "share", *arguments)[2]
    sent, _ = three_ranks.run(_load_on_rank, tmp_path / "base", "gather", *arguments)[0]
    for name, tensor in expected.items():
        assert torch.equal(shared[name][: len(tensor)], tensor), name
        assert torch.equal(shared[name], sent[name]), name
    assert shared["lm_head.weight"].shape == (576, 40)
    assert torch.isfinite(shared["lm_head.weight"]).all()


def test_a_share_in_another_form_is_left_to_deepspeed() -> None:
    """NVMe, quantization, hpZ's second copies, a weight that is gathered: written in place, they would keep old values."""
    from cadtrain.train.engine import ZeroSharding

    def parameter(**changes: Any) -> Any:
        held = torch.zeros(4)
        held.final_location, held.status = None, SimpleNamespace(name="AVAILABLE")  # type: ignore[attr-defined]
        fields = {"ds_tensor": held, "ds_secondary_tensor": None, "ds_status": SimpleNamespace(name="NOT_AVAILABLE")}
        return SimpleNamespace(**{**fields, "ds_zero_partition_rank": 2, **changes})

    sharding = object.__new__(ZeroSharding)
    share = sharding.share(parameter())
    assert share is not None
    assert (share.start, share.held.numel()) == (8, 4)
    assert sharding.share(SimpleNamespace()) is None  # type: ignore[arg-type]
    assert sharding.share(parameter(ds_secondary_tensor=torch.zeros(8))) is None
    assert sharding.share(parameter(ds_status=SimpleNamespace(name="AVAILABLE"))) is None
    for name, value in (("final_location", "nvme"), ("ds_quant_scale", torch.ones(1)), ("status", SimpleNamespace(name="INFLIGHT"))):
        odd = parameter()
        setattr(odd.ds_tensor, name, value)
        assert sharding.share(odd) is None, name


def open_whole(folder: Path) -> State:
    config = language_config(LanguageModelConfig(pretrained=str(folder)), byte_tokenizer())
    model = load_language_model(str(folder), config, dtype=torch.float32, device=torch.device("cpu"))
    return dict(model.named_parameters())


def open_shared_out(folder: Path) -> State:
    config = model_config(image=False, point=False, fields={**FIELDS, "tie_word_embeddings": _is_tied(folder)})
    model = make_model(config).language
    fill_from_files(model, str(folder), WholeWeights())
    return dict(model.named_parameters())


def _is_tied(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])


def change_weights(folder: Path, change: Callable[[State], object]) -> None:
    """One file with all weights, after `change`."""
    state: State = {}
    for path in folder.glob("*.safetensors"):
        state |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(UP), rf"lacks {UP}"),
        (lambda state: [state.pop(name) for name in list(state) if ".0.mlp." in name or ".0.self_attn." in name], r"lacks .* and 6 more"),
        (lambda state: state.update({UP: torch.zeros(3, 40)}), rf"{UP} has shape \[3, 40\], the model wants \[67, 40\]"),
        (lambda state: state.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(67)}), r"the model lacks: model.layers.1.mlp.up_proj.bias"),
    ],
    ids=["missing", "many missing", "other shape", "left over"],
)  # fmt: skip
@pytest.mark.parametrize("open_it", [open_whole, open_shared_out])
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, open_it: Callable[[Path], State], change: Callable[[State], object], message: str
) -> None:
    """transformers alone would go on with uninitialized memory in place of a weight that is missing."""
    save_model(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ConfigError, match=message):
        open_it(tmp_path)


@pytest.mark.parametrize("open_it", [open_whole, open_shared_out])
def test_a_model_saved_without_its_head_has_other_names_and_the_same_weights(
    tmp_path: Path, open_it: Callable[[Path], State]
) -> None:
    def strip(state: State) -> None:
        for name in list(state):
            state[name.removeprefix("model.")] = state.pop(name)

    expected = save_model(tmp_path, tied=True)
    change_weights(tmp_path, strip)
    found = open_it(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_torch_files_are_read_whole_and_named_where_shares_are_wanted(tmp_path: Path) -> None:
    expected = save_model(tmp_path)
    change_weights(tmp_path, lambda state: torch.save(dict(state), tmp_path / "pytorch_model.bin"))
    (tmp_path / "model.safetensors").unlink()
    found = open_whole(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"no model\.safetensors \(it holds pytorch_model\.bin\); ZeRO-3 reads nothing else\. Save the"):
        open_shared_out(tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantized \(gptq\), which cannot be trained"):
        open_whole(tmp_path)


def test_the_model_of_the_memory_measurement_is_what_transformers_reads(tmp_path: Path) -> None:
    tensors = make_random_model(tmp_path / "model", "tiny", shard_bytes=100_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {tensor.name for tensor in tensors}
    for tensor in tensors:
        expected = torch.from_numpy(tensor.values(0, tensor.numel).copy()).view(torch.bfloat16).view(tensor.shape)
        assert torch.equal(parameters[tensor.name], expected)
        assert expected.abs().max() < 2**-4
        assert torch.equal(torch.from_numpy(tensor.values(7, 19).copy()).view(torch.bfloat16), expected.view(-1)[7:19])


@pytest.mark.slow
def test_a_rank_holds_its_share_and_little_more(tmp_path: Path) -> None:
    """0.6 billion weights on two ranks: 568 MiB each, and the tied head's own share while the model is made."""
    tensors = make_random_model(tmp_path / "model", "0.6b", shard_bytes=400_000_000)
    share = sum(tensor.numel for tensor in tensors) / 2**20  # 2 bytes a value over 2 ranks
    head = max(tensor.numel for tensor in tensors) / 2**20
    for row in measure(tmp_path / "model", tensors, 2, zero=3, way="share", offload=False):
        assert row["wrong"] == []
        assert row["anonymous"] < share + head + 60
        assert row["kept"] < share + 60
