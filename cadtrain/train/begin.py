"""Where a run begins: at nothing, at its own newest checkpoint, or with the weights of another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cadtrain.checkpoint.layout import ENGINE
from cadtrain.checkpoint.manifest import Manifest
from cadtrain.checkpoint.source import find_checkpoint
from cadtrain.checkpoint.store import CheckpointStore
from cadtrain.config.batch_plan import BatchPlan
from cadtrain.config.sections import RunConfig
from cadtrain.distributed import Place, all_agree, first_verdict
from cadtrain.errors import CheckpointError
from cadtrain.train.engine import Engine
from cadtrain.train.state import TrainState


def begin(
    config: RunConfig, plan: BatchPlan, store: CheckpointStore, engine: Engine, place: Place, facts: Mapping[str, Any], *,
    codec: str, resume: bool,
) -> tuple[TrainState, str]:  # fmt: skip
    """The state that a run begins with and a word on how: its own newest checkpoint, another run's weights, or nothing. Collective.

    `facts` and `codec` are those of `resume_state`.
    """
    resumed = resume_state(store, engine, facts=facts, codec=codec) if resume else None
    if resumed is not None:
        return resumed
    state = first_state(plan, config.checkpoint.start_stage, codec=codec)
    if config.checkpoint.init_from is None:
        return state, ""
    return state, take_weights(config.checkpoint.init_from, engine, place=place)


def first_state(plan: BatchPlan, start_stage: str | None, *, codec: str) -> TrainState:
    """The state of a new run, at its first step or at that of the stage `start_stage`."""
    stage = next((stage for stage in plan.stages if stage.name == start_stage), plan.stages[0])
    return TrainState(step=stage.first_step, codec=codec)


def take_weights(source: Path, engine: Engine, *, place: Place) -> str:
    """Load the weights of another run's checkpoint into `engine`, its optimizer stays new; a word on which. Collective.

    `source` is a run folder (its newest checkpoint) or one checkpoint. Raises `CheckpointError` where it does not verify
    or is of another model, `UsageError` where there is none.
    """
    found = find_checkpoint(source)
    faults = found.manifest.faults(found.shards.parent) if place.is_main and found.manifest is not None else []
    verdict = first_verdict(all_agree("; ".join(faults[:3]) or None, device=engine.device))
    if verdict is not None:
        raise CheckpointError(
            f"does not verify: {verdict}", where=str(found.shards.parent), hint="Take another checkpoint."
        )
    engine.load_weights(found.shards)
    return f"weights of {found.shards.parent if found.shards.name == ENGINE else found.shards}; the optimizer is new"


def resume_state(
    store: CheckpointStore, engine: Engine, *, facts: Mapping[str, Any], codec: str, before: int | None = None
) -> tuple[TrainState, str] | None:
    """Load the newest whole checkpoint (of a step below `before`) into `engine`; its state and a word on how, or None if there
    is none yet. Collective.

    `facts` are this run's `world_size`, `zero_stage`, `precision` and `offload`. DeepSpeed lays its shards out by them and
    would read others' without a word, so where one differs the shards are laid out anew. Raises `CheckpointError` where the
    model learnt to write another `codec` (name and version).
    """
    folder = store.newest(before=before)
    if folder is None:
        return None
    manifest = Manifest.read(folder)
    state = TrainState.read(folder)
    if state.codec != codec:
        name = state.codec.split()[0]
        is_same_name = name == codec.split()[0]
        raise CheckpointError(
            f"is of a model that writes codec {state.codec}, but this run is set to codec {codec}",
            where=str(folder),
            hint=f"Use the cadtrain that has codec {state.codec}."
            if is_same_name
            else f"Set data.codec to {name}, or start a new run.",
        )
    differing = [
        f"{name.replace('_', ' ')} {getattr(manifest, name)} -> {value}"
        for name, value in facts.items()
        if getattr(manifest, name) != value
    ]
    load = engine.load_resharded if differing else engine.load
    load(folder / ENGINE)
    how = f", laid out anew ({', '.join(differing)})" if differing else ""
    return state, f"resumed after step {state.step}{how}"
