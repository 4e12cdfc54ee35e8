"""Train to the end, going back to an earlier checkpoint where the configuration says so."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from cadtrain.train.begin import resume_state
from cadtrain.train.state import TrainState
from cadtrain.train.trainer import RollBack, Trainer, TrainerParts

log = logging.getLogger(__name__)


def train_to_the_end(parts: TrainerParts, state: TrainState, *, facts: Mapping[str, Any], codec: str) -> TrainState:
    """Run the trainer from `state`, again after each roll-back; the final state. Collective.

    `facts` and `codec` are those of `resume_state`. Raises what `Trainer.fit` raises, and the error behind a roll-back that
    finds no checkpoint.
    """
    while True:
        try:
            return Trainer(parts, state).fit()
        except RollBack as wish:
            state = roll_back(wish, state, parts, facts=facts, codec=codec)
        except BaseException:
            # Not on all ranks perhaps, so nothing is agreed on any more: a save behind stays unfinished, and untorn.
            parts.store.abandon()
            raise


def roll_back(
    wish: RollBack, state: TrainState, parts: TrainerParts, *, facts: Mapping[str, Any], codec: str
) -> TrainState:
    """Load the newest checkpoint before the bad steps, which the state that comes back says to pass over. Collective."""
    found = resume_state(parts.store, parts.engine, facts=facts, codec=codec, before=wish.bad_steps[0] + 1)
    if found is None:
        raise wish.why
    back, _ = found
    back = dataclasses.replace(
        back,
        passed_over=sorted({*back.passed_over, *state.passed_over, *wish.bad_steps}),
        rollbacks=state.rollbacks + 1,
        order=state.order,
    )
    steps = ", ".join(str(step + 1) for step in wish.bad_steps)
    how = f"{wish.why.message}; back to step {back.step}, passing over the samples of step {steps}"
    log.warning("%s", how)
    parts.sink.rewind(back.step)
    parts.sink.note(how)
    return back
