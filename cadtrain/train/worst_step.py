"""One rank of a measured step: the run's own model and engine, on the pack that a plan calls the worst.

`cadtrain plan --calibrate` starts it on every rank through the launcher: `python -m cadtrain.train.worst_step --run-dir DIR`.
DIR holds the run's `config.yaml` and `worst_step.json`; each rank writes `rank_NN.json` with the memory that it took. On CUDA
that is what torch's allocator says; on the CPU, which has no such figures, every tensor's bytes are counted from its making
to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from cadtrain.checkpoint.layout import write_atomically
from cadtrain.config.sections import COMPONENTS, Component, RunConfig
from cadtrain.data.collate import Pack
from cadtrain.distributed import Place
from cadtrain.heartbeat import Heartbeat

if TYPE_CHECKING:
    from cadtrain.model.cad_mllm import CadMllm
    from cadtrain.model.encoders.image import ImageEncoder
    from cadtrain.model.encoders.point import PointEncoder
    from cadtrain.model.footprint import PackShape
    from cadtrain.train.engine import DeepSpeedEngine

MODULE = "cadtrain.train.worst_step"
REQUEST_NAME = "worst_step.json"
STEPS = 2
"""Optimizer steps. The states of the optimizer are made in the first; of the four passes that two micro-steps make of them
ZeRO-3 records the order of modules in the first two and gathers ahead from the third."""
MICRO_STEPS = 2
"""Packs a step: from the second on gradients of earlier ones are held."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the ranks are to measure."""

    shape: dict[str, Any]
    """Fields of `model.footprint.PackShape`."""
    learning: tuple[str, ...]
    """Components that take a gradient."""
    recomputed: int = 0
    """Decoder layers that are computed again in the backward pass."""
    steps: int = STEPS
    micro_steps: int = MICRO_STEPS


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """What one rank took, in bytes."""

    has_allocator: bool
    """Whether torch's CUDA allocator was asked; else tensors were counted, and nothing is reserved or outside."""
    setup: int
    """Most that was allocated until the first step."""
    setup_reserved: int
    held: int
    """Allocated before the last forward pass: weights, gradients of the pack before, optimizer states."""
    passes: int
    """Most that was allocated during forward and backward passes."""
    update: int
    """Most that was allocated during the optimizer's steps."""
    reserved: int
    """`torch.cuda.max_memory_reserved` over all steps."""
    outside: int
    """On the device beside what the allocator had reserved at the end: context, libraries, NCCL."""
    device_total: int
    """The device's memory as CUDA shows it."""
    seconds: dict[str, float]
    """Time of `setup` and `steps`."""

    @property
    def allocated(self) -> int:
        """`torch.cuda.max_memory_allocated` over all steps."""
        return max(self.passes, self.update)


def write_request(folder: Path, request: Request) -> None:
    """Write what the ranks will read."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / REQUEST_NAME, json.dumps(asdict(request)) + "\n")


def read_results(folder: Path) -> list[MeasuredMemory]:
    """What the ranks wrote, in their order."""
    paths = sorted(folder.glob("rank_*.json"))
    return [MeasuredMemory(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def measure(config: RunConfig, request: Request) -> MeasuredMemory:
    """Build the model and engine of `config`, take the requested steps, and say what they took. Collective.

    The process group is up when this returns.
    """
    from cadtrain.model.footprint import PackShape
    from cadtrain.train.engine import init_process_group
    from cadtrain.train.interrupt import StopRequest
    from cadtrain.train.run import Start, assemble

    started = time.perf_counter()
    device = init_process_group()
    meter: Meter = _CudaMeter(device) if device.type == "cuda" else _TensorMeter()
    with meter.counting(), ExitStack() as at_end:
        start = Start(Place.from_environment(), device, None, StopRequest(), Heartbeat(None), at_end)
        made = assemble(config, start)
        pack = make_pack(made.model, PackShape(**request.shape))
        ready = time.perf_counter()
        setup, setup_reserved = meter.peak(), meter.reserved_peak()
        meter.empty()
        held, passes, update, reserved = _take_steps(made.engine, pack, request, meter)
    done = time.perf_counter()
    return MeasuredMemory(
        has_allocator=device.type == "cuda", setup=setup, setup_reserved=setup_reserved, held=held, passes=passes,
        update=update, reserved=reserved, outside=meter.outside(),
        device_total=torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0,
        seconds={"setup": round(ready - started, 2), "steps": round(done - ready, 2)},
    )  # fmt: skip


def _take_steps(engine: DeepSpeedEngine, pack: Pack, request: Request, meter: Meter) -> tuple[int, int, int, int]:
    """Take the steps; (held, passes, update, reserved) as in `MeasuredMemory`."""
    learning: list[Component] = [name for name in COMPONENTS if name in request.learning]
    engine.set_learning(learning)
    engine.set_recompute(request.recomputed)
    engine.set_rates({name: 1e-6 if name in learning else 0.0 for name in COMPONENTS})
    targets = max(1, pack.num_targets * Place.from_environment().world_size * request.micro_steps)
    held = passes = update = reserved = 0
    for _ in range(request.steps):
        for number in range(request.micro_steps):
            held = meter.now()
            meter.reset()
            engine.micro_step(pack, num_targets=targets, is_last=number == request.micro_steps - 1)
            passes, reserved = max(passes, meter.peak()), max(reserved, meter.reserved_peak())
        meter.reset()
        engine.step()
        update, reserved = max(update, meter.peak()), max(reserved, meter.reserved_peak())
    return held, passes, update, reserved


def make_pack(model: CadMllm, shape: PackShape) -> Pack:
    """A pack of `shape` with random tokens: grey views and points on a line in front, the last positions as targets."""
    from cadtrain.data.examples import IGNORED

    borders = torch.linspace(0, shape.tokens, shape.sequences + 1).round().int()
    lengths = borders.diff().tolist()
    words = torch.Generator().manual_seed(0)
    ids = torch.randint(int(model.language.config.vocab_size), (shape.tokens,), generator=words)
    targets = torch.arange(shape.tokens - shape.targets, shape.tokens)
    labels = torch.full((shape.tokens,), IGNORED)
    labels[targets] = ids[targets]
    image, point = model.image_encoder, model.point_encoder
    num_image = shape.views * image.num_tokens if image is not None else 0
    num_point = shape.clouds * point.num_tokens if point is not None else 0
    return Pack(
        input_ids=ids, position_ids=torch.cat([torch.arange(length) for length in lengths]), cu_seqlens=borders,
        labels=labels, target_positions=targets, max_seqlen=max(lengths),
        image_positions=torch.arange(num_image) if shape.views else None,
        point_positions=torch.arange(num_image, num_image + num_point) if shape.clouds else None,
        sample_ids=(), **(_features(model, shape) if shape.stored else _dummies(model, shape)),
    )  # fmt: skip


def _dummies(model: CadMllm, shape: PackShape) -> dict[str, torch.Tensor | None]:
    """Views and clouds of the pack."""
    from cadtrain.data.collate import dummy_cloud, dummy_views
    from cadtrain.data.examples import ExampleShape

    image, point = model.image_encoder, model.point_encoder
    sizes = ExampleShape(
        tokens_per_view=image.num_tokens if image is not None else 0, views=1,
        image_size=image.image_size if image is not None else 14,
        point_tokens=point.num_tokens if point is not None else 0, num_points=shape.points,
    )  # fmt: skip
    return {
        "pixel_values": torch.from_numpy(dummy_views(sizes)).repeat(shape.views, 1, 1, 1) if shape.views else None,
        "points": torch.from_numpy(dummy_cloud(sizes)).repeat(shape.clouds, 1, 1) if shape.clouds else None,
    }


def _features(model: CadMllm, shape: PackShape) -> dict[str, torch.Tensor | None]:
    """What a run that reads features has in place of views and clouds."""

    def rows(encoder: ImageEncoder | PointEncoder | None, count: int) -> torch.Tensor | None:
        if encoder is None or not count:
            return None
        return torch.zeros(count, encoder.num_tokens, encoder.width, dtype=model.language.dtype)

    return {
        "pixel_values": None,
        "points": None,
        "image_features": rows(model.image_encoder, shape.views),
        "point_features": rows(model.point_encoder, shape.clouds),
    }


class Meter(Protocol):
    """Tells how much memory is taken."""

    def counting(self) -> AbstractContextManager[object]:
        """Open while tensors are made that shall count."""
        ...

    def now(self) -> int:
        """Bytes allocated now."""
        ...

    def peak(self) -> int:
        """Most bytes allocated since `reset`."""
        ...

    def reserved_peak(self) -> int:
        """Most bytes that the allocator held since `reset`."""
        ...

    def reset(self) -> None:
        """Begin peaks anew."""
        ...

    def empty(self) -> None:
        """Give back what the allocator holds and nobody uses, and begin peaks anew."""
        ...

    def outside(self) -> int:
        """Bytes of the device that are taken beside what the allocator holds now."""
        ...


class _CudaMeter:
    """What the CUDA allocator of this process says."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def counting(self) -> AbstractContextManager[object]:
        return nullcontext()

    def now(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def reserved_peak(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def empty(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        self.reset()

    def outside(self) -> int:
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)


class _TensorMeter:
    """The bytes of all tensors that live; a pack's own are on the host in any case and count as well."""

    def __init__(self) -> None:
        from cadtrain.model.footprint import Ledger

        class HostLedger(Ledger):
            def _add(self, storage: torch.UntypedStorage) -> None:
                if storage.device.type != "meta":  # DeepSpeed keeps shapes that way
                    super()._add(storage)

        self._ledger = HostLedger()

    def counting(self) -> AbstractContextManager[object]:
        return self._ledger

    def now(self) -> int:
        return sum(self._ledger.held().values())

    def peak(self) -> int:
        return sum(self._ledger.peak.values())

    def reserved_peak(self) -> int:
        return self.peak()

    def reset(self) -> None:
        self._ledger.reset_peak()

    def empty(self) -> None:
        self.reset()

    def outside(self) -> int:
        return 0


def main(arguments: Sequence[str]) -> None:
    """What a rank runs; ends the process with the exit code of its failure, if it fails."""
    from cadtrain.train.failure import write_failure
    from cadtrain.train.interrupt import die_with_parent
    from cadtrain.train.traces import keep_traces

    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("--run-dir", type=Path, required=True)
    folder: Path = parser.parse_args(arguments).run_dir
    rank = Place.from_environment().rank
    die_with_parent()
    keep_traces(folder, rank)
    try:
        found = _measure_in(folder, rank)
    except BaseException as error:
        write_failure(folder, rank, error)
        _end(error)
    write_atomically(folder / f"rank_{rank:02d}.json", json.dumps(asdict(found)) + "\n")


def _measure_in(folder: Path, rank: int) -> MeasuredMemory:
    from cadtrain.config.load import load_run_config
    from cadtrain.logs import start_logging
    from cadtrain.train.engine import leave_process_group

    start_logging(folder, rank)
    request = Request(**json.loads((folder / REQUEST_NAME).read_text(encoding="utf-8")))
    found = measure(load_run_config(str(folder / "config.yaml")).config, request)
    leave_process_group()
    return found


def _end(error: BaseException) -> NoReturn:
    """Without the interpreter's clean-up, which would wait for peers that may be waiting for this rank."""
    from cadtrain.errors import CadtrainError

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, CadtrainError) else 4)


if __name__ == "__main__":
    main(sys.argv[1:])
