"""What a measurement is to do: the same words on the command line, in the launcher and in the ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cadtrain.config.sections import RunConfig
from cadtrain.errors import UsageError

REPORT_NAME = "bench.json"
PROFILE_NAME = "profile"
"""The folder of traces in a run folder."""
SUMMARY_NAME = "summary.json"
SUMMARY_TEXT_NAME = "summary.txt"


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Packs of `sequences` rows of `length` random tokens, every position a target; one pack a rank and step."""

    length: int
    sequences: int

    @classmethod
    def parse(cls, text: str) -> TokenRows:
        """`4096x2`: two sequences of 4096 tokens. Raises `UsageError`."""
        match = re.fullmatch(r"(\d+)[xX](\d+)", text.strip())
        if match is None or int(match[1]) < 16 or int(match[2]) < 1:
            raise UsageError(
                f"{text!r} is not LENGTHxSEQUENCES with at least 16 tokens a sequence.",
                where="--bench-tokens",
                hint="E.g. 4096x2: packs of two sequences of 4096 tokens.",
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def tokens(self) -> int:
        """Tokens of a pack."""
        return self.length * self.sequences

    def __str__(self) -> str:
        return f"{self.length}x{self.sequences}"


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """Steps to time and to profile; the run saves nothing and ends behind them."""

    steps: int = 0
    """Timed optimizer steps; 0 for a profile alone."""
    warmup: int = 3
    stage: str | None = None
    """None: the stage that the run would begin with."""
    rows: TokenRows | None = None
    """None: the run's own data."""
    profile_steps: int = 0
    """Steps of the profile that is kept; 0 keeps none."""
    profiles_all_ranks: bool = False

    def stage_index(self, config: RunConfig) -> int:
        """Number of the stage to measure; raises `UsageError` for a name that no stage has."""
        name = self.stage if self.stage is not None else config.checkpoint.start_stage
        names = [stage.name for stage in config.curriculum]
        if name is None:
            return 0
        if name not in names:
            raise UsageError(
                f"no stage is called {name!r}.", where="--bench-stage", hint=f"Stages: {', '.join(names)}."
            )
        return names.index(name)

    def argv(self) -> list[str]:
        """The options of `cadtrain train` that mean this."""
        words = ["--bench-warmup", str(self.warmup)]
        words += ["--bench", str(self.steps)] if self.steps else []
        words += ["--bench-stage", self.stage] if self.stage is not None else []
        words += ["--bench-tokens", str(self.rows)] if self.rows is not None else []
        words += ["--profile", "--profile-steps", str(self.profile_steps)] if self.profile_steps else []
        return [*words, "--profile-ranks", "all"] if self.profiles_all_ranks else words

    def overrides(self) -> tuple[str, ...]:
        """What it changes in the configuration, so that memory is predicted for the packs that it makes."""
        if self.rows is None:
            return ()
        return (f"data.max_sample_tokens={self.rows.length}", f"batch.micro_batch_tokens={self.rows.tokens}")
