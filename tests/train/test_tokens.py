"""The tokens codec on real ranks: a pretrained model grown before it is shared out, trained beside adapters, saved, exported, opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cadtrain.cad import added_vocabulary, respelling, token_counter
from cadtrain.config.sections import LanguageModelConfig, LoraConfig, ModelConfig
from tests.train.ranks import RankPool
from tests.train.tiny import CONFIG_FIELDS, MemoryParts, deepspeed_json, model_config

WORDS = added_vocabulary("tokens")
RATES = dict.fromkeys(("language", "image_encoder", "image_projector", "point_encoder", "point_projector"), 1e-2)
PROBABILITIES = {"text": 0.4, "text+point": 0.6}
FIRST, NUM_STEPS = 258, 6


class Designs(MemoryParts):
    """Parts whose stored sequences are designs in the compact grammar."""

    def sequence(self, index: int) -> str:
        return f"Sa{60 + index},92,122,120L223,128L223,{150 + index}L128,185L128,128;C176,156,{5 + index}ENO140."


def pretrained_config(folder: str, *, lora: bool) -> ModelConfig:
    """The tiny model with its language model read from `folder`, and without images."""
    adapters = LoraConfig(rank=4, alpha=8.0) if lora else None
    language = LanguageModelConfig(pretrained=folder, tokenizer="bytes", lora=adapters)
    return model_config().model_copy(update={"language": language, "image": None})


def build_tokens_model(config: ModelConfig, **options: Any) -> Any:
    from cadtrain.model.build import build_model
    from cadtrain.model.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(config.language, WORDS)
    return build_model(
        config, tokenizer=tokenizer, codec="tokens", codec_version=1, dtype=torch.float32, seed=0, **options
    )


def tokens_feed(config: ModelConfig) -> Any:
    from cadtrain.data.examples import ExampleBuilder, ExampleShape, count_tokens
    from cadtrain.data.feed import Feed
    from cadtrain.model.tokenizer import build_tokenizer

    tokenizer, parts, respell = build_tokenizer(config.language, WORDS), Designs(16), respelling("compact", "tokens")
    shape = ExampleShape(0, 1, 28, config.point.num_latents if config.point else 0, 16)
    lengths = count_tokens(
        tokenizer,
        "Make it.",
        parts.captions(),
        parts.column("sequence"),
        respell=respell,
        count=token_counter("tokens"),
    )
    by_tokenizer = count_tokens(tokenizer, "Make it.", parts.captions(), parts.column("sequence"), respell=respell)
    assert lengths.target.tolist() == by_tokenizer.target.tolist() == [25] * 16, "one token a word"
    return Feed(
        parts, lengths, ExampleBuilder(tokenizer, "Make it.", shape, 0, respell), global_batch_size=8, micro_batch_tokens=200,  # type: ignore[arg-type]
        max_sample_tokens=200, modality_sets=("text", "text+point"),
    )  # fmt: skip


def _engine_on_rank(config: ModelConfig, stage: int) -> Any:
    from cadtrain.config.sections import OptimConfig
    from cadtrain.train.engine import DeepSpeedEngine, ZeroSharding, init_process_group

    device, json = init_process_group(), deepspeed_json(stage)
    # Everything is cut up, however small: rows that stayed whole would prove nothing.
    json["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    model = build_tokens_model(config, device=device, sharding=ZeroSharding(json) if stage == 3 else None)
    return DeepSpeedEngine(model, config=json, optim=OptimConfig(), device=device)


def _step_on_rank(engine: Any, feed: Any, step: int) -> float:
    from cadtrain.distributed import Place

    plan = feed.plan_step(step, PROBABILITIES, world_size=2)
    orders, total = plan.for_rank(Place.from_environment().rank), torch.zeros(())
    for number, order in enumerate(orders):
        total += engine.micro_step(
            feed.make_pack(order), num_targets=plan.num_targets, is_last=number == len(orders) - 1
        )
    assert engine.step().was_applied
    torch.distributed.all_reduce(total)
    return float(total) / plan.num_targets


def _train_on_rank(stage: int, folder: str, lora: bool, run_dir: str) -> dict[str, Any]:
    """Some steps and a checkpoint; another step, and back to the checkpoint. Losses, weights on the way, logits of a pack."""
    from cadtrain.checkpoint.retention import Retention
    from cadtrain.checkpoint.store import CheckpointStore
    from cadtrain.config.load import to_yaml
    from cadtrain.config.sections import RunConfig
    from cadtrain.distributed import Place

    config = pretrained_config(folder, lora=lora)
    engine, feed = _engine_on_rank(config, stage), tokens_feed(config)
    before = dict(engine.full_state())
    engine.set_learning(RATES)
    engine.set_rates(RATES)
    losses = [_step_on_rank(engine, feed, step) for step in range(NUM_STEPS)]
    facts = {"zero_stage": stage, "precision": "fp32", "versions": {}}
    store = CheckpointStore(Path(run_dir), place=Place.from_environment(), retention=Retention(1), facts=facts)
    stages = ({"name": "one", "duration": 1, "modalities": PROBABILITIES},)
    run = RunConfig(model=config, data={"codec": "tokens"}, curriculum=stages)  # type: ignore[arg-type]
    saved = store.save(NUM_STEPS, {}, config_text=to_yaml(run), write_engine=engine.save).path
    inputs = feed.make_pack(feed.plan_step(0, PROBABILITIES, world_size=1).packs[0][0]).model_inputs()
    engine._engine.eval()
    with torch.no_grad():
        logits = engine._engine(**{**inputs, "labels": None, "target_positions": None}).logits
    engine._engine.train()
    after = dict(engine.full_state())
    _step_on_rank(engine, feed, NUM_STEPS)
    changed = dict(engine.full_state())
    engine.load(saved / "engine")
    reloaded = dict(engine.full_state())
    engine.close()
    return {
        "losses": losses,
        "before": before,
        "after": after,
        "changed": changed,
        "reloaded": reloaded,
        "logits": logits,
    }


@pytest.fixture(scope="module", params=["tied", "untied"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a language model that knows nothing of the words."""
    from tests.train.tiny import build

    tied = request.param == "tied"
    language = LanguageModelConfig(config={**CONFIG_FIELDS, "tie_word_embeddings": tied}, tokenizer="bytes")
    folder = tmp_path_factory.mktemp("pretrained")
    build(model_config().model_copy(update={"language": language}), seed=4).language.save_pretrained(folder)
    return str(folder)


CASES = [
    (3, True),
    *(
        pytest.param(stage, lora, marks=pytest.mark.slow)
        for stage, lora in ((0, True), (1, True), (2, True), (2, False), (3, False))
    ),
]


@pytest.mark.parametrize(("stage", "lora"), CASES)
def test_grown_trained_saved_exported_and_opened(
    two_ranks: RankPool, pretrained: str, tmp_path: Path, stage: int, lora: bool
) -> None:
    first, second = two_ranks.run(_train_on_rank, stage, pretrained, lora, str(tmp_path))
    assert first["losses"] == pytest.approx(second["losses"])
    assert first["losses"][-1] < 0.9 * first["losses"][0]
    _check_what_learnt(first["before"], first["after"], lora=lora)
    for name, tensor in first["after"].items():
        assert torch.equal(tensor, second["after"][name]), name
        assert torch.equal(tensor, first["reloaded"][name]), name
    name = f"language.model.embed_tokens.{'added_rows.' if lora else ''}weight"
    assert not torch.equal(first["changed"][name], first["after"][name])
    _check_export(tmp_path, first["logits"], pretrained, lora=lora)


def _check_what_learnt(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], *, lora: bool) -> None:
    """Rows of new tokens move; pretrained ones stay beside adapters, bit for bit, and learn without."""
    embedding = "language.model.embed_tokens.base_layer.weight" if lora else "language.model.embed_tokens.weight"
    assert before[embedding].shape[0] == 576
    assert torch.equal(before[embedding][FIRST:], after[embedding][FIRST:]) == lora
    assert torch.equal(before[embedding][:FIRST], after[embedding][:FIRST]) == lora
    if not lora:
        return
    rows = after["language.model.embed_tokens.added_rows.weight"]
    used = (
        FIRST + torch.tensor([WORDS.index(f"<cad:{word}>") for word in ("Sa", "L", "223", "128", "ENO", ".")]) - FIRST
    )
    assert not before["language.model.embed_tokens.added_rows.weight"].any()
    assert (rows[used].abs().sum(1) > 1e-3).all()
    frozen = [
        name for name in before if name.startswith("language.") and "lora_" not in name and "added_rows" not in name
    ]
    assert len(frozen) > 10
    for name in frozen:
        assert torch.equal(before[name], after[name]), name


def _check_export(run_dir: Path, live: torch.Tensor, pretrained: str, *, lora: bool) -> None:
    from transformers import AutoTokenizer

    from cadtrain.convert.service import convert_checkpoint
    from cadtrain.model import CadMllm

    checkpoint = run_dir / "checkpoints" / f"step-{NUM_STEPS:08d}"
    convert_checkpoint(checkpoint, run_dir / "folder")
    opened = CadMllm.from_pretrained(run_dir / "folder").eval()
    assert (opened.config.codec, opened.config.language["vocab_size"]) == ("tokens", 576)
    assert opened.language.get_input_embeddings().weight.shape[0] == 576
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "folder")
    assert tokenizer.convert_tokens_to_ids(list(WORDS)) == list(range(FIRST, FIRST + len(WORDS)))
    config = pretrained_config(pretrained, lora=lora)
    feed = tokens_feed(config)
    inputs = feed.make_pack(feed.plan_step(0, PROBABILITIES, world_size=1).packs[0][0]).model_inputs()
    with torch.no_grad():
        logits = opened(**{**inputs, "labels": None, "target_positions": None}).logits
    torch.testing.assert_close(logits, live, rtol=1e-4, atol=1e-4)

    if lora:
        result = convert_checkpoint(checkpoint, run_dir / "adapter", adapter=True, verify=True)
        beside = load_file(run_dir / "adapter" / "projectors.safetensors")
        embedding = opened.language.get_input_embeddings().weight
        rows = beside["language.model.embed_tokens.new_rows.weight"]
        torch.testing.assert_close(rows.to(embedding.dtype), embedding[-rows.shape[0] :])
        assert any("rows of their own" in note for note in result.notes)
        assert AutoTokenizer.from_pretrained(run_dir / "adapter").get_vocab() == tokenizer.get_vocab()

    convert_checkpoint(checkpoint, run_dir / "apart.bin")
    state = torch.load(run_dir / "apart.bin", weights_only=True)
    assert any("added_rows" in name for name in state) == lora
    model = build_tokens_model(config, device="cpu").eval()
    outcome = model.load_state_dict(state, strict=False)
    assert not outcome.unexpected_keys
    with torch.no_grad():
        logits = model(**{**inputs, "labels": None, "target_positions": None}).logits
    torch.testing.assert_close(logits, live, rtol=1e-5, atol=1e-5)
