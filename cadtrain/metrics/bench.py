"""What a measurement found: rates, work, memory, waits; and the arithmetic from measured steps to them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1
"""Raised when a field of the report changes its meaning."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One timed optimizer step over all ranks."""

    seconds: float
    """Of the slowest rank, between two moments at which its device had nothing left to do."""
    samples: int
    tokens: int
    target_tokens: int
    rank_tokens: tuple[tuple[int, ...], ...]
    """Tokens of each pack: `[micro-step][rank]`."""
    flops: float
    """What the step's samples need; see `cadtrain.model.flops`."""
    data_wait_seconds: tuple[float, ...]
    """Of each rank: how long it waited for packs."""

    @property
    def imbalance(self) -> float:
        """Tokens of the fullest pack over the mean of all ranks' packs, each micro-step weighted by its fullest pack.

        1.2 means that 1 - 1/1.2 = 17 % of the ranks' time goes into waiting for the fullest rank, if time follows tokens.
        """
        fullest = sum(max(row) for row in self.rank_tokens)
        mean = sum(sum(row) / len(row) for row in self.rank_tokens)
        return fullest / mean if mean else 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Units a second, over all ranks."""

    tokens: float
    target_tokens: float
    samples: float
    flops: float

    def to_json(self, num_ranks: int) -> dict[str, float]:
        """Of one rank and of all."""
        return {
            "tokens_per_second_per_gpu": self.tokens / num_ranks,
            "target_tokens_per_second_per_gpu": self.target_tokens / num_ranks,
            "samples_per_second_per_gpu": self.samples / num_ranks,
            "tokens_per_second": self.tokens,
            "target_tokens_per_second": self.target_tokens,
            "samples_per_second": self.samples,
        }


@dataclass(frozen=True, slots=True)
class Communication:
    """Collectives in the steps behind the timed ones, which the profiler watched. Means over ranks."""

    steps: int
    step_seconds: float
    """Of such a step: with the profiler it takes longer than the timed ones."""
    share: float
    """Of a step's time, collectives' kernels ran, waiting for other ranks included."""
    exposed_share: float
    """Of a step's time, they ran and nothing that computes did."""
    kinds: Mapping[str, float]
    """Share by kind of collective; kinds may overlap."""


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Everything that a measurement found, and of what."""

    facts: Mapping[str, Any]
    """What was measured: workload, hardware, versions, configuration."""
    num_ranks: int
    steps: tuple[MeasuredStep, ...]
    warmup_seconds: tuple[float, ...]
    micro_batch_tokens: int
    peak_flops: float | None
    """Of one GPU in bf16; None where the device is in no table or the run computes in another precision."""
    no_flops: str
    """Why there is no count of operations; empty where there is one."""
    memory_allocated_gib: float | None
    """Peak of the rank that needed most; None on the CPU."""
    memory_reserved_gib: float | None
    losses: tuple[float, float]
    """Of the first and the last timed step."""
    communication: Communication | None
    no_communication: str
    """Why `communication` is None; empty where it is not."""

    @property
    def seconds(self) -> float:
        """Of all timed steps."""
        return sum(step.seconds for step in self.steps)

    def mean_rates(self) -> Rates:
        """All timed steps' units over all their time."""
        return self._rates(lambda values: sum(values) / self.seconds)

    def median_rates(self) -> Rates:
        """The median over steps of each step's own rate: what one slow step does not move."""
        seconds = [step.seconds for step in self.steps]
        return self._rates(lambda values: statistics.median(v / s for v, s in zip(values, seconds, strict=True)))

    def _rates(self, rate: Any) -> Rates:
        return Rates(
            rate([step.tokens for step in self.steps]),
            rate([step.target_tokens for step in self.steps]),
            rate([step.samples for step in self.steps]),
            rate([step.flops for step in self.steps]),
        )

    def mfu(self, rates: Rates) -> float | None:
        """Share of the GPUs' peak that the counted operations use; None where either is unknown."""
        if self.peak_flops is None or self.no_flops:
            return None
        return rates.flops / (self.num_ranks * self.peak_flops)

    @property
    def pack_fill(self) -> float:
        """Tokens in packs over the room in them."""
        packs = sum(len(row) for step in self.steps for row in step.rank_tokens)
        return sum(step.tokens for step in self.steps) / (packs * self.micro_batch_tokens)

    def data_wait_shares(self) -> tuple[float, float]:
        """Share of the time in which ranks waited for packs: their mean, and that of the rank that waited longest."""
        waits = [sum(step.data_wait_seconds[rank] for step in self.steps) for rank in range(self.num_ranks)]
        return statistics.fmean(waits) / self.seconds, max(waits) / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Plain values; what could not be measured is null, with a reason beside it."""
        seconds = [step.seconds for step in self.steps]
        mean, median = self.mean_rates(), self.median_rates()
        wait_mean, wait_max = self.data_wait_shares()
        micro_steps = [len(step.rank_tokens) for step in self.steps]
        counted = not self.no_flops
        return {
            "schema": SCHEMA,
            **self.facts,
            "num_ranks": self.num_ranks,
            "warmup_steps": len(self.warmup_seconds),
            "steps": len(self.steps),
            "step_seconds": {
                "median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "total": sum(seconds),
            },
            "mean": {**mean.to_json(self.num_ranks), "mfu": self.mfu(mean)},
            "median": {**median.to_json(self.num_ranks), "mfu": self.mfu(median)},
            "model_flops_per_step": statistics.fmean(step.flops for step in self.steps) if counted else None,
            "model_flops_per_token": mean.flops / mean.tokens if counted else None,
            "peak_teraflops_per_gpu": None if self.peak_flops is None else self.peak_flops / 1e12,
            "no_mfu": self.no_flops or ("" if self.peak_flops else "no peak is known of this device in this precision"),
            "pack_fill": self.pack_fill,
            "micro_steps": {"mean": statistics.fmean(micro_steps), "max": max(micro_steps)},
            "imbalance": {
                "mean": statistics.fmean(step.imbalance for step in self.steps),
                "max": max(step.imbalance for step in self.steps),
            },
            "memory": {"allocated_gib": self.memory_allocated_gib, "reserved_gib": self.memory_reserved_gib},
            "data_wait_share": {"mean": wait_mean, "max": wait_max},
            "communication": None if self.communication is None else asdict(self.communication),
            "no_communication": self.no_communication,
            "loss": {"first": self.losses[0], "last": self.losses[1]},
            "warmup_seconds": list(self.warmup_seconds),
            "each_step": [_step_json(step) for step in self.steps],
        }  # fmt: skip


def _step_json(step: MeasuredStep) -> dict[str, Any]:
    return {
        "seconds": step.seconds, "samples": step.samples, "tokens": step.tokens, "target_tokens": step.target_tokens,
        "flops": step.flops, "imbalance": step.imbalance, "rank_tokens": [list(row) for row in step.rank_tokens],
        "data_wait_seconds": list(step.data_wait_seconds),
    }  # fmt: skip
