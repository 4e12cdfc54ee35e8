"""Checkpoints that another ZeRO stage or another number of ranks goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cadtrain.checkpoint.shard_writer import write_shard
from cadtrain.config.sections import COMPONENTS
from cadtrain.errors import CheckpointError
from tests.train.forked import Fault, ForkServer
from tests.train.ranks import RankPool, pool_of
from tests.train.small_runs import final_weights, metrics, output, write_config
from tests.train.tiny import make_engine, make_feed, model_config

MIXTURE = {"text": 0.2, "text+point": 0.3, "text+image": 0.2, "text+point+image": 0.3}
STEPS_BEFORE, STEPS_AFTER = 3, 3


def _go(engine: Any, feed: Any, steps: range) -> list[float]:
    """The losses of these steps; every second component rests in the first step, so that Adam's counts differ."""
    from cadtrain.distributed import Place, all_reduce

    place, losses = Place.from_environment(), []
    for step in steps:
        resting = COMPONENTS[::2] if step == 0 else ()
        engine.set_learning([component for component in COMPONENTS if component not in resting])
        if step == 1:
            engine.start_components(COMPONENTS[::2])
        engine.model.point_projector.is_new_step = True
        engine.set_rates({component: 0.0 if component in resting else 3e-3 for component in COMPONENTS})
        plan = feed.plan_step(step, MIXTURE, world_size=place.world_size)
        orders, total = plan.for_rank(place.rank), torch.zeros(())
        for number, order in enumerate(orders):
            total += engine.micro_step(feed.make_pack(order), num_targets=plan.num_targets, is_last=number == len(orders) - 1)
        assert engine.step().was_applied
        losses.append(float(all_reduce(total)) / plan.num_targets)
    return losses


def with_running_mean(model: Any) -> None:
    """A buffer that training changes and no optimizer knows, as a batch norm has; it acts on what the projector gives."""
    projector = model.point_projector
    projector.register_buffer("running_mean", torch.zeros(3))
    projector.is_new_step = True

    def follow(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # Once a step, by the same amount on every rank: the number of packs depends on the number of ranks.
        if module.training and module.is_new_step:
            module.running_mean.mul_(0.9).add_(torch.tensor([0.1, 0.2, 0.3]))
            module.is_new_step = False
        return output * (1 + module.running_mean.mean())

    projector.register_forward_hook(follow)


def _settings(stage: int, options: dict[str, Any]) -> dict[str, Any]:
    """The engine's options; ZeRO-0 cannot offload, so from and to it offload changes as well."""
    return {key: value for key, value in options.get("engine", {}).items() if stage or key != "offload"}


def _write_shard(path: Path, content: Any) -> None:
    write_shard(path, content)


def _write(stage: int, folder: str, options: dict[str, Any]) -> list[float]:
    """Train, save in between, train on: the losses after the save."""
    config = model_config(lora=options.get("lora", False))
    change = with_running_mean if options.get("buffers") else None
    engine, feed = make_engine(config, stage, change=change, **_settings(stage, options)), make_feed(config)
    _go(engine, feed, range(STEPS_BEFORE))
    target = Path(folder) / "engine"
    engine.save(target, _write_shard)
    _check_estimate(engine, target)
    losses = _go(engine, feed, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER))
    engine.close()
    return losses


def _check_estimate(engine: Any, folder: Path) -> None:
    """What the engine says that a save takes is what it took, give or take the files' own words."""
    from cadtrain.distributed import barrier

    barrier()
    sizes = [path.stat().st_size for path in folder.iterdir() if path.suffix == ".pt"]
    values = sum(sizes) - 40_000 * len(sizes)  # names and shapes weigh much beside so small a model
    assert 0.8 * values < engine.saved_bytes() < 1.2 * sum(sizes), (engine.saved_bytes(), sizes)


def _read(stage: int, folder: str, options: dict[str, Any]) -> list[float]:
    """An engine with other values goes on from the save; the losses, then 1 if frozen weights and buffers are those saved."""
    from cadtrain.checkpoint.zero_shards import ShardedWeights

    config = model_config(lora=options.get("lora", False))
    change = with_running_mean if options.get("buffers") else None
    engine, feed = make_engine(config, stage, seed=7, change=change, **_settings(stage, options)), make_feed(config)
    engine.load_resharded(Path(folder) / "engine")
    saved = ShardedWeights.open(Path(folder) / "engine")
    assert not options.get("buffers") or any(name.endswith("running_mean") and value.any() for name, value in saved.items())
    exact = all(
        torch.equal(value.float(), saved[name].to(value.dtype).float()) for name, value in engine.full_state() if name in saved
    )
    losses = _go(engine, feed, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER))
    engine.close()
    return [*losses, float(exact)]


def check_against_live(folder: Path) -> None:
    """Every weight that the shards give is the one that the ranks held, by the hashes that they left."""
    from cadtrain.convert.verify import CheckedWeights

    weights = CheckedWeights.open(folder)
    for name in weights:
        weights[name]
    assert weights.checked == {name for name, info in weights.info.items() if info.alias_of is None}


def _check(writer: RankPool, reader: RankPool, stages: tuple[int, int], folder: Path, options: dict[str, Any], rel: float) -> None:
    expected = writer.run(_write, stages[0], str(folder), options)[0]
    check_against_live(folder / "engine")
    *found, is_exact = reader.run(_read, stages[1], str(folder), options)[0]
    assert is_exact
    assert found == pytest.approx(expected, rel=rel)


@pytest.fixture(scope="module")
def one_rank() -> Any:
    yield from pool_of(1)


@pytest.mark.parametrize("stages", [pytest.param((1, 3), marks=pytest.mark.slow), (3, 0), (2, 3)])
def test_another_stage_goes_on_with_the_same_losses(two_ranks: RankPool, tmp_path: Path, stages: tuple[int, int]) -> None:
    """In fp32, with LoRA (frozen weights) for one pair; the losses are those of the run that was not interrupted."""
    _check(two_ranks, two_ranks, stages, tmp_path, {"lora": stages == (2, 3)}, rel=1e-5)


@pytest.mark.parametrize("stages", [(3, 3), pytest.param((2, 1), marks=pytest.mark.slow)])
def test_fewer_ranks_go_on_with_the_same_losses(
    two_ranks: RankPool, one_rank: RankPool, tmp_path: Path, stages: tuple[int, int]
) -> None:
    _check(two_ranks, one_rank, stages, tmp_path, {"lora": stages == (3, 3), "buffers": True}, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(3, 3), (2, 2), (1, 3), (3, 1), (0, 3), (3, 0)])
@pytest.mark.parametrize("options", [{}, {"lora": True, "buffers": True}, {"engine": {"precision": "bf16"}}, {"engine": {"offload": True}}])
def test_more_and_fewer_ranks_go_on_with_the_same_losses(
    two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path, stages: tuple[int, int], options: dict[str, Any]
) -> None:
    """2 to 4 and 4 to 2 ranks; in bf16 within its rounding."""
    rel = 2e-2 if options.get("engine", {}).get("precision") else 1e-5
    _check(two_ranks, four_ranks, stages, tmp_path / "up", options, rel)
    _check(four_ranks, two_ranks, stages, tmp_path / "down", options, rel)


def _read_of_another_model(folder: str) -> str:
    engine = make_engine(model_config(lora=True), 3)
    try:
        engine.load_resharded(Path(folder) / "engine")
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "nothing was raised"


def test_a_checkpoint_of_another_model_is_refused_on_all_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(_write, 2, str(tmp_path), {})
    for message in two_ranks.run(_read_of_another_model, str(tmp_path)):
        assert "is of another model" in message
        assert "lora_A" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((2, 1), (1, 3)), ((2, 3), (4, 1)), ((4, 2), (2, 3)), ((2, 0), (2, 2)), ((4, 3), (1, 0))]
)
def test_a_whole_run_goes_on_under_another_layout(
    server: ForkServer, sixteen_parts: Path, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """(ranks, ZeRO stage) before and after a kill in the first of two stages; frozen weights lie in a folder of their own.

    Every step has the samples, tokens and losses of a run that was not interrupted; frozen weights are the same bits.
    """
    for name, (ranks, stage) in {"whole": before, "before": before, "after": after}.items():
        # Dropout is keyed by the rank as well, so another number of ranks draws other zeros.
        options: dict[str, Any] = {"dropout": 0.0, "asynchronous": name != "whole"}
        config = write_config(tmp_path / f"{name}.yaml", sixteen_parts, stage=stage, **options)
        if name == "whole":
            assert server.run(tmp_path / "whole", config, ranks=ranks).is_done
            continue
        fault = Fault(at=3, only=r"os.rename step-\d+\.tmp$") if name == "before" else None
        ended = server.run(tmp_path / "moved", config, ranks=ranks, resume=name == "after", fault=fault)
        assert ended.is_done == (name == "after"), output(tmp_path / "moved")
    whole, moved = metrics(tmp_path / "whole"), metrics(tmp_path / "moved")
    for key in ("step", "stage", "epoch", "samples", "tokens", "target_tokens", "rates"):
        assert [row[key] for row in moved] == [row[key] for row in whole]
    assert [row["loss"] for row in moved] == pytest.approx([row["loss"] for row in whole], rel=2e-5)
    kept, found = final_weights(tmp_path / "whole"), final_weights(tmp_path / "moved")
    frozen = [name for name in kept if "image_encoder" in name or "base_layer" in name]
    assert len(frozen) > 10
    assert {name: kept[name] for name in frozen} == {name: found[name] for name in frozen}
