"""The engine on real ranks over gloo, every ZeRO stage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cadtrain.config.sections import COMPONENTS
from tests.train.ranks import RankPool
from tests.train.tiny import build, make_engine, make_feed, model_config

STAGE_1 = {"text": 1.0}
STAGE_3 = {"text": 0.2, "text+point": 0.3, "text+image": 0.2, "text+point+image": 0.3}
RATES = dict.fromkeys(COMPONENTS, 1e-3)


def _reference_gradients(probabilities: dict[str, float]) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss over all target tokens, by one process with all samples in one pack each."""
    config = model_config()
    model, feed = build(config), make_feed(config)
    plan = feed.plan_step(0, probabilities, world_size=2)
    for row in plan.packs:
        for order in row:
            output = model(**feed.make_pack(order).model_inputs())
            (output.loss_sum / plan.num_targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _gradients_on_rank(stage: int) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    from cadtrain.distributed import Place

    config = model_config()
    engine, feed = make_engine(config, stage, clipping=0.0), make_feed(config)
    engine.set_learning(COMPONENTS)
    plan = feed.plan_step(0, STAGE_3, world_size=2)
    orders = plan.for_rank(Place.from_environment().rank)
    for number, order in enumerate(orders):
        engine.micro_step(feed.make_pack(order), num_targets=plan.num_targets, is_last=number == len(orders) - 1)
    found = {}
    for name, parameter in engine.model.named_parameters():
        gradient = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
        found[name] = None if gradient is None else gradient.clone()
    engine.close()
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_give_the_gradient_of_one_process(two_ranks: RankPool, stage: int) -> None:
    """Unequal packs on two ranks, several micro-steps: relative error under 1e-5 in fp32 for every parameter."""
    expected = _reference_gradients(STAGE_3)
    feed = make_feed(model_config())
    plan = feed.plan_step(0, STAGE_3, world_size=2)
    targets = [sum(int(feed.lengths.target[d.index]) + 1 for order in plan.for_rank(rank) for d in order.draws) for rank in range(2)]
    assert len(plan.packs) > 1
    assert targets[0] != targets[1], "the packs of the ranks should differ for this test to say anything"
    for found in two_ranks.run(_gradients_on_rank, stage):
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            if name.endswith("k_proj.bias"):
                _assert_is_rounding(name, found[name], expected)
                continue
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"{name}: relative error {error:.2e}"


def _assert_is_rounding(name: str, found: torch.Tensor, expected: dict[str, torch.Tensor]) -> None:
    """A key bias shifts all scores of a query alike, which softmax cancels: its true gradient is 0, what is left is noise."""
    scale = expected[name.replace("k_proj.bias", "q_proj.bias")].norm()
    assert scale > 0
    for gradient in (found, expected[name]):
        assert gradient.norm() < 1e-6 * scale, f"{name}: {gradient.norm():.2e} is no rounding error beside {scale:.2e}"


def _train_on_rank(stage: int, steps: int, options: dict[str, Any]) -> list[float]:
    """A few steps of the last stage's mixture; each rank's own loss sums, reduced."""
    from cadtrain.distributed import Place, all_reduce

    lora = options.pop("lora", False)
    config = model_config(lora=lora, recompute=options.pop("recompute", "full" if lora else "none"))
    engine, feed = make_engine(config, stage, **options), make_feed(config)
    engine.set_learning(COMPONENTS)
    rank, losses = Place.from_environment().rank, []
    for step in range(steps):
        engine.set_rates(RATES)
        plan = feed.plan_step(step, STAGE_3, world_size=Place.from_environment().world_size)
        orders, total = plan.for_rank(rank), torch.zeros(())
        for number, order in enumerate(orders):
            total += engine.micro_step(feed.make_pack(order), num_targets=plan.num_targets, is_last=number == len(orders) - 1)
        result = engine.step()
        assert result.was_applied
        assert math.isfinite(result.grad_norm)
        losses.append(float(all_reduce(total)) / plan.num_targets)
    engine.close()
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_zero_stages_give_the_same_losses(two_ranks: RankPool, precision: str) -> None:
    """ZeRO 0 to 3 differ only in where things are kept."""
    curves = {stage: two_ranks.run(_train_on_rank, stage, 6, {"precision": precision})[0] for stage in range(4)}
    tolerance = 2e-2 if precision == "bf16" else 1e-4
    for stage in (1, 2, 3):
        assert curves[stage] == pytest.approx(curves[0], rel=tolerance), curves
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (2, {"offload": True}),
        (3, {"offload": True}),
        (2, {"lora": True}),
        (3, {"lora": True}),
        (3, {"lora": True, "recompute": "none"}),
    ],
)
def test_offload_and_lora_train(two_ranks: RankPool, stage: int, options: dict[str, Any]) -> None:
    """Offloaded states and LoRA with recompute give finite, falling losses, alike on both ranks."""
    first, second = two_ranks.run(_train_on_rank, stage, 8, options)
    assert first == pytest.approx(second)
    assert first[-1] < first[0]


def _curve_on_rank(stage: int, lora: bool, recompute: tuple[int, ...]) -> tuple[list[float], list[list[float]]]:
    """Two steps with each number of recomputed layers in turn, over text first and then over everything.

    Loss sums and gradient norms; and for each number how often each layer's MLP ran for one training micro-step.
    """
    from cadtrain.distributed import Place, all_reduce

    engine, feed = make_engine(model_config(lora=lora), stage), make_feed(model_config(lora=lora))
    rank, found, runs = Place.from_environment().rank, [], []
    ran = [0, 0]
    for number, layer in enumerate(engine.model.language.base_model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, number=number: ran.__setitem__(number, ran[number] + module.training))
    for step in range(2 * len(recompute)):
        is_text = step < len(recompute)
        if step % 2 == 0:
            engine.set_learning(["language"] if is_text else COMPONENTS)
            engine.set_recompute(recompute[step // 2])
            ran[:], micro_steps = [0, 0], 0
        engine.set_rates({**RATES, **({c: 0.0 for c in COMPONENTS if c != "language"} if is_text else {})})
        plan = feed.plan_step(step, STAGE_1 if is_text else STAGE_3, world_size=2)
        orders, total = plan.for_rank(rank), torch.zeros(())
        for number, order in enumerate(orders):
            total += engine.micro_step(feed.make_pack(order), num_targets=plan.num_targets, is_last=number == len(orders) - 1)
        micro_steps += len(orders)
        if step % 2:
            runs.append([count / micro_steps for count in ran])
        result = engine.step()
        assert result.was_applied
        engine.evaluate(feed.make_pack(orders[0]))
        found += [float(all_reduce(total)), result.grad_norm]
    engine.close()
    return found, runs


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_recomputed_layers_change_between_steps_and_no_number_does(two_ranks: RankPool, stage: int, lora: bool) -> None:
    """To the last bit, in place, whole or shared out, also where a stage of the curriculum changes what learns."""
    kept = two_ranks.run(_curve_on_rank, stage, lora, (0, 0, 0, 0))
    turned = two_ranks.run(_curve_on_rank, stage, lora, (1, 0, 2, 1))
    for (numbers, runs), (plain, once) in zip(turned, kept, strict=True):
        assert numbers == plain
        assert once == [[1, 1]] * 4
        assert runs == [[2, 1], [1, 1], [2, 2], [2, 1]]
    assert kept[0][0] == kept[1][0]


def _mixed_modalities_on_rank(micro_steps: int) -> int:
    """Each rank draws other modality sets than its peers in nearly every micro-step."""
    from cadtrain.data.feed import Draw, PackOrder
    from cadtrain.distributed import Place

    config = model_config()
    engine, feed = make_engine(config, 3), make_feed(config)
    engine.set_learning(COMPONENTS)
    engine.set_rates(RATES)
    rank, sets = Place.from_environment().rank, list(STAGE_3)
    for micro in range(micro_steps):
        draws = () if (micro + rank) % 7 == 0 else (Draw(micro % 24, sets[(micro + rank) % 4]), Draw((micro + 5) % 24, sets[(micro * rank) % 4]))
        pack = feed.make_pack(PackOrder(0, draws, use_images=True, use_points=True))
        engine.micro_step(pack, num_targets=60, is_last=micro % 4 == 3)
        if micro % 4 == 3:
            engine.step()
    engine.close()
    return micro_steps


def test_two_ranks_with_different_modalities_do_not_hang(two_ranks: RankPool) -> None:
    """200 micro-steps under ZeRO-3 where ranks hold different modalities, or nothing at all."""
    assert two_ranks.run(_mixed_modalities_on_rank, 200) == [200, 200]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks_with_different_modalities_do_not_hang(four_ranks: RankPool) -> None:
    """The same on four ranks."""
    assert four_ranks.run(_mixed_modalities_on_rank, 200, timeout=600) == [200] * 4


def _late_component_on_rank(stage: int) -> dict[str, Any]:
    """Text only first, with the projectors at rest; then everything learns."""
    from cadtrain.distributed import Place

    config = model_config()
    engine, feed = make_engine(config, stage), make_feed(config)
    rank = Place.from_environment().rank
    snapshots = []

    def watch() -> None:
        snapshots.append({n: t for n, t in engine.full_state() if n.startswith(("point_projector", "image_encoder", "language.model.layers.0"))})

    def steps(numbers: range, probabilities: dict[str, float], rates: dict[Any, float]) -> None:
        for step in numbers:
            engine.set_rates(rates)
            plan = feed.plan_step(step, probabilities, world_size=2)
            orders = plan.for_rank(rank)
            for number, order in enumerate(orders):
                engine.micro_step(feed.make_pack(order), num_targets=plan.num_targets, is_last=number == len(orders) - 1)
            engine.step()

    engine.set_learning(["language"])
    engine.start_components(["language"])
    watch()
    steps(range(3), STAGE_1, {**dict.fromkeys(COMPONENTS, 0.0), "language": 1e-3})
    watch()
    engine.set_learning(COMPONENTS)
    engine.start_components([c for c in COMPONENTS if c != "language"])
    steps(range(3, 4), STAGE_3, RATES)
    watch()
    state = engine._inner_optimizer().state
    counts = {component: float(state[tensor]["step"]) for component, tensor in engine._optimizer_tensors() if tensor in state}
    engine.close()
    return {"snapshots": snapshots, "counts": counts}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_component_starts_when_its_stage_does(two_ranks: RankPool, stage: int) -> None:
    """It is untouched before, learns after, and Adam counts its steps from its own start."""
    outcome = two_ranks.run(_late_component_on_rank, stage)[0]
    before, after_text, after_all = outcome["snapshots"]
    for name in before:
        is_language = name.startswith("language")
        assert torch.equal(before[name], after_text[name]) != is_language, name
    assert any(not torch.equal(after_text[n], after_all[n]) for n in before if n.startswith("point_projector"))
    assert any(not torch.equal(after_text[n], after_all[n]) for n in before if n.startswith("image_encoder"))
    # The first Adam step moves a weight by the whole rate: with a stale step count it would move by about a third.
    moved = max(float((after_all[n] - after_text[n]).abs().max()) for n in before if n.startswith("point_projector"))
    assert moved == pytest.approx(1e-3, rel=0.05)
    assert outcome["counts"]["language"] == 4
    assert outcome["counts"]["point_projector"] == 1


def _bad_step_on_rank(stage: int, offload: bool) -> dict[str, Any]:
    """A step with a NaN gradient, then the projectors at rest, then everything again."""
    from cadtrain.distributed import Place

    config = model_config()
    engine, feed = make_engine(config, stage, precision="bf16", offload=offload), make_feed(config)
    rank, applied = Place.from_environment().rank, []

    def step(number: int, scale: float = 1.0) -> None:
        engine.set_rates(RATES)
        plan = feed.plan_step(number, STAGE_3, world_size=2)
        orders = plan.for_rank(rank)
        for micro, order in enumerate(orders):
            # A target count that is not a number gives gradients that are not either.
            engine.micro_step(feed.make_pack(order), num_targets=plan.num_targets * scale, is_last=micro == len(orders) - 1)  # type: ignore[arg-type]
        applied.append(engine.step().was_applied)

    def projectors() -> dict[str, torch.Tensor]:
        return {name: value.float() for name, value in engine.full_state() if "projector" in name}

    engine.set_learning(COMPONENTS)
    step(0)
    before = projectors()
    step(1, math.nan)
    engine.set_learning(["language"])
    engine.set_rates({**dict.fromkeys(COMPONENTS, 0.0), "language": 1e-3})
    after_bad = projectors()
    step_rates = dict(RATES)
    RATES.update({component: 0.0 for component in COMPONENTS if component != "language"})
    step(2)
    RATES.update(step_rates)
    after_rest = projectors()
    engine.set_learning(COMPONENTS)
    step(3)
    after = projectors()
    engine.close()
    return {"applied": applied, "before": before, "after_bad": after_bad, "after_rest": after_rest, "after": after}


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, True), (3, True)])
def test_a_bad_step_leaves_no_trace(two_ranks: RankPool, stage: int, offload: bool) -> None:
    """It is not applied, the next ones are, and what rests meanwhile stays as it was."""
    found = two_ranks.run(_bad_step_on_rank, stage, offload)[0]
    assert found["applied"] == [True, False, True, True]
    for name, value in found["before"].items():
        assert torch.equal(found["after_bad"][name], value), name
        assert torch.equal(found["after_rest"][name], value), name
        assert torch.isfinite(found["after"][name]).all(), name
    assert any(not torch.equal(found["after"][name], value) for name, value in found["before"].items())
