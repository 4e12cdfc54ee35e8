"""What a measured step teaches later plans, kept in a small JSON file in the cache folder.

A key is the kind of device, torch's version and the model's counts. Under it lies one record for each way to share weights out
(ZeRO stage and offload). What lies outside of the allocator, and what the allocator holds in reserve, is taken for every choice of the
key; what was held between and during passes is a matter of the stage, and corrects choices of that stage alone.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadtrain.config.recompute import NO_RECOMPUTE
from cadtrain.errors import EnvironmentFault

if TYPE_CHECKING:
    from cadtrain.model.census import Census
    from cadtrain.plan.memory import Choice, RankMemory
    from cadtrain.plan.predict import Option

FILE_NAME = "plan_calibration.json"
SMALLEST, LARGEST = 0.4, 2.5
"""Factors outside of this correct nothing: something else was measured than predicted."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of the rank that took most."""

    held: int
    """Allocated before a forward pass: weights, gradients of earlier packs, optimizer states."""
    allocated: int
    reserved: int
    context: int
    """Outside of the allocator."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """One measured step against its prediction."""

    key: str
    sharing: str
    """ZeRO stage and offload, as `sharing_of` writes it."""
    states: float
    """Measured over predicted, of weights, gradients and optimizer states."""
    passes: float
    """Measured over predicted, of all else that is allocated."""
    reserve: float
    """What the allocator held beside what it handed out, as a share of that."""
    context: int
    """Bytes outside of the allocator."""
    num_ranks: int
    tokens: int
    """Of the measured pack."""
    when: str


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What one measured step showed."""

    calibration: Calibration
    choice: Choice
    stage: str
    """The curriculum stage whose pack it was."""
    predicted: RankMemory
    """Of the measured pack."""
    measured: Measured
    corrected: RankMemory
    """`predicted`, as a plan that knows of the measurement has it."""
    path: Path | None
    """The file that it was kept in; None on the CPU, where nothing is reserved and nothing is planned for."""
    seconds: float

    @property
    def is_kept(self) -> bool:
        """Whether later plans will know of it."""
        return self.path is not None


@dataclass(frozen=True, slots=True)
class Corrections:
    """All records of one key."""

    records: Mapping[str, Calibration]
    """By `sharing`."""

    @property
    def newest(self) -> Calibration | None:
        """The one that was measured last."""
        return max(self.records.values(), key=lambda record: record.when, default=None)

    def memory(self, choice: Choice, memory: RankMemory) -> RankMemory:
        """`memory` of `choice`, corrected as far as is known."""
        own = self.records.get(sharing_of(choice))
        record = own or self.newest
        if record is None:
            return memory
        if own is not None:
            memory = _scaled(memory, own.states, own.passes)
        return replace(memory, reserve=round(record.reserve * memory.allocated), context=record.context)

    def options(self, options: Iterable[Option], memory_bytes: int) -> list[Option]:
        """`options` with corrected memory on devices of `memory_bytes`."""
        corrected = [(option, self.memory(option.choice, option.memory)) for option in options]
        return [replace(option, memory=memory, fits=memory.total <= memory_bytes) for option, memory in corrected]


NOTHING_KNOWN = Corrections({})


def sharing_of(choice: Choice) -> str:
    """`ZeRO-3, optimizer and weights on the host`: what a record's states and passes hold for."""
    return replace(choice, recompute=NO_RECOMPUTE).describe()


def key_of(device: str, census: Census, *, element_bytes: int, num_ranks: int) -> str:
    """What a calibration holds for: the kind of device, torch, the model, and whether there are other ranks."""
    from importlib.metadata import version

    from cadtrain.plan.rates import find_gpu

    known = find_gpu(device)
    torch = ".".join(version("torch").split(".")[:2])
    ranks = "one rank" if num_ranks == 1 else "several ranks"
    counts = f"{census.total:.3g} weights, {census.trainable:.3g} learn"
    return f"{known.name if known else device}, torch {torch}, {counts}, {8 * element_bytes} bits, {ranks}"


def calibrate(
    key: str, choice: Choice, predicted: RankMemory, measured: Measured, *, num_ranks: int, tokens: int
) -> Calibration:
    """The correction that makes `predicted` equal `measured`. Raises `EnvironmentFault` where they are too far apart to be the same thing."""
    states = predicted.weights + predicted.gradients + predicted.optimizer
    passes = predicted.allocated - states
    found = Calibration(
        key, sharing_of(choice), states=measured.held / max(1, states),
        passes=(measured.allocated - measured.held) / max(1, passes),
        reserve=measured.reserved / measured.allocated - 1, context=measured.context, num_ranks=num_ranks, tokens=tokens,
        when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    for name, ratio, bytes_ in (("states", found.states, states), ("passes", found.passes, passes)):
        # A part that is small beside the whole may be far off and yet correct it.
        if not SMALLEST <= ratio <= LARGEST and abs(ratio - 1) * bytes_ > 0.25 * predicted.allocated:
            raise EnvironmentFault(
                f"the {name} of the measured step took {ratio:.2f} times the predicted {bytes_ / 2**30:.2f} GiB:"
                " too far apart for a correction.", where=f"{choice.describe()}, {key}",
                hint="Is DeepSpeed's configuration another one (zero.config_file)? Else please report it as a fault of plan.",
            )  # fmt: skip
    return found


def store(found: Calibration, folder: Path) -> Path:
    """Add `found` to the file in `folder` in place of an older one of its kind; the path of the file."""
    from cadtrain.checkpoint.layout import write_atomically

    path = folder / FILE_NAME
    rows = _read(path)
    kept = rows.get(found.key)
    rows[found.key] = {**(kept if isinstance(kept, dict) else {}), found.sharing: asdict(found)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(rows, indent=2) + "\n")
    except OSError as error:
        raise EnvironmentFault(
            f"cannot be written: {error.strerror or error}.", where=str(path), hint="Set CADTRAIN_CACHE to a folder of yours.",
        ) from error  # fmt: skip
    return path


def corrections_for(key: str, folder: Path | None = None) -> Corrections:
    """What is known under `key`; records of another version of cadtrain, and a damaged file, are as none.

    `folder` defaults to the cache folder.
    """
    if folder is None:
        from cadtrain.data.synth.make import cache_folder

        folder = cache_folder()
    rows = _read(folder / FILE_NAME).get(key)
    names = {field.name for field in fields(Calibration)}
    records = [row for row in rows.values() if isinstance(row, dict)] if isinstance(rows, dict) else []
    found = [Calibration(**row) for row in records if set(row) == names]
    return Corrections({record.sharing: record for record in found})


def _scaled(memory: RankMemory, states: float, passes: float) -> RankMemory:
    def times(factor: float, *names: str) -> dict[str, Any]:
        return {name: round(factor * getattr(memory, name)) for name in names}

    return replace(
        memory,
        **times(states, "weights", "gradients", "optimizer"),
        **times(passes, "activations", "buckets", "gathered"),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return rows if isinstance(rows, dict) else {}
