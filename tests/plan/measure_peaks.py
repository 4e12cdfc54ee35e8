"""Plan's peaks beside measured ones, over sizes, adapters, ZeRO stages, offload, recomputation and numbers of GPUs.

    python -m tests.plan.measure_peaks --gpus 2 --out peaks.json     # every configuration that two GPUs can hold
    python -m tests.plan.measure_peaks --only 8B --list              # what would be measured, and what plan says
    python -m tests.plan.measure_peaks --tiny --gpus 2               # narrow models on CPU ranks: does the script run?

Each configuration takes two optimizer steps with the real engine on the pack that plan calls the worst, with random weights, in a
process group of its own. Compared are `torch.cuda.max_memory_allocated` and `max_memory_reserved`; on the CPU, where no allocator can
be asked, the bytes of all tensors (not under offload: its host memory is the device's there). The ranks of the next configurations import their libraries while the GPUs are busy, and
configurations that need fewer GPUs run side by side. One that fails is reported and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cadtrain.cli.worst_step import WorstStep, plan_worst_step, take_worst_step
from cadtrain.errors import CadtrainError
from cadtrain.launch.devices import find_gpus
from cadtrain.launch.planning import LaunchRequest
from cadtrain.plan.calibration import Corrections, Measured, calibrate
from cadtrain.plan.memory import Choice, RankMemory
from tests.plan.peak_rank import GO_NAME

GIB = 2**30
CASE_SECONDS = 240.0
"""How long a configuration may take once its GPUs are free."""
CERTAINLY_TOO_LARGE = 1.04
"""Predicted over present memory from which a configuration is not tried."""
READY_AHEAD = 3
"""Configurations whose ranks get ready while others are measured."""
SHAPES: dict[str, tuple[int, int, int, int, int, bool]] = {
    "0.6B": (1024, 28, 3072, 16, 8, True), "1.7B": (2048, 28, 6144, 16, 8, True), "4B": (2560, 36, 9728, 32, 8, True),
    "8B": (4096, 36, 12288, 32, 8, False), "14B": (5120, 40, 17408, 40, 8, False),
}  # fmt: skip
"""Qwen3's: hidden width, layers, width of the MLP, query heads, key heads, whether the head is the embedding."""


@dataclass(frozen=True)
class Case:
    """One configuration."""

    size: str
    lora: bool
    zero: int
    gpus: int
    recompute: str
    tokens: int
    offload: str = ""
    """What lives on the host: nothing, `optimizer`, or `weights` too."""

    @property
    def name(self) -> str:
        """A short name for `--only`."""
        host = f"-{self.offload}" if self.offload else ""
        return f"{self.size}-{'lora' if self.lora else 'all'}-z{self.zero}{host}-{self.recompute}-x{self.gpus}"


CASES = (
    Case("0.6B", False, 0, 1, "none", 8192), Case("1.7B", True, 0, 1, "none", 8192),
    Case("4B", True, 0, 1, "full", 16384), Case("8B", True, 0, 1, "full", 16384),
    Case("1.7B", False, 2, 1, "full", 8192, "optimizer"), Case("1.7B", False, 0, 1, "full", 8192),
    Case("1.7B", False, 3, 1, "full", 8192, "weights"), Case("4B", False, 2, 1, "full", 8192, "optimizer"),
    Case("1.7B", True, 0, 1, "full", 16384), Case("8B", True, 2, 2, "full", 12288),
    Case("0.6B", False, 2, 2, "none", 8192), Case("1.7B", False, 1, 2, "none", 8192), Case("1.7B", False, 3, 2, "none", 8192),
    Case("4B", False, 2, 2, "full", 8192), Case("4B", False, 3, 2, "full", 8192), Case("8B", True, 2, 2, "none", 6144),
    Case("8B", True, 3, 2, "none", 6144), Case("8B", False, 3, 2, "full", 8192), Case("14B", True, 1, 2, "full", 8192),
    Case("14B", True, 3, 2, "full", 8192), Case("8B", False, 2, 4, "full", 8192), Case("14B", False, 3, 4, "full", 8192),
    Case("14B", True, 3, 4, "none", 4096),
)  # fmt: skip


def config_of(case: Case, *, is_tiny: bool) -> dict[str, Any]:
    """The run of `case`: text, points and images as in the presets. Tiny: narrow layers, short packs, fp32 as on any CPU."""
    hidden, layers, inner, heads, keys, is_tied = (256, 4, 768, 4, 2, True) if is_tiny else SHAPES[case.size]
    image = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    return {
        "name": "measure-peaks",
        "model": {
            "language": {
                "tokenizer": "bytes",
                "config": {
                    "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner,
                    "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": 64 if is_tiny else 128,
                    "vocab_size": 4096 if is_tiny else 151936, "tie_word_embeddings": is_tied,
                },
                "lora": {"rank": 32, "alpha": 64} if case.lora else None,
            },
            "image": {"image_size": 56 if is_tiny else 224, "config": small if is_tiny else image},
            "point": {"num_latents": 16, "width": 64, "num_heads": 4, "num_layers": 2} if is_tiny else {},
            "recompute": case.recompute,
        },
        "data": {"max_sample_tokens": 1024 if is_tiny else 2048, "synth": {"count": 64}},
        "curriculum": [{"name": "all", "duration": "3 steps", "modalities": {"text": 0.5, "text+point+image": 0.5}}],
        "zero": {"stage": case.zero, "offload_optimizer": bool(case.offload), "offload_parameters": case.offload == "weights"},
        "batch": {"global_batch_size": 64, "micro_batch_tokens": 1024 if is_tiny else case.tokens},
        "checkpoint": {"asynchronous": False},
    }  # fmt: skip


def measure_one(case: Case, folder: Path, gpu_ids: list[str], *, is_tiny: bool) -> dict[str, Any]:
    """Measure `case` in this process's ranks; the row that describes it, with `failure` where it failed."""
    path = folder / "case.yaml"
    path.write_text(json.dumps(config_of(case, is_tiny=is_tiny)), encoding="utf-8")  # JSON is YAML
    request = LaunchRequest(config=str(path), gpus=tuple(gpu_ids) or case.gpus, run_dir=folder / "run")
    row: dict[str, Any] = {"case": case.name, **asdict(case)}
    try:
        step = plan_worst_step(request, worker="tests.plan.peak_rank")
        needed, there = (
            step.pack.option.memory.total,
            min((gpu.memory_total for gpu in step.launch.devices.gpus), default=0),
        )
        if there and needed > CERTAINLY_TOO_LARGE * there:
            return row | {"failure": f"not tried: plan says {needed / GIB:.1f} GiB, there are {there / GIB:.1f}"}
        return row | _row(take_worst_step(step, announce=lambda text: None))
    except CadtrainError as error:
        return row | {"failure": str(error)}


def _row(step: WorstStep) -> dict[str, Any]:
    predicted, worst = step.predicted, step.worst
    reserved = predicted.allocated + (predicted.reserve if worst.has_allocator else 0)
    row = {
        "device": step.device, "predicted": predicted.as_dict(), "predicted_reserved": reserved,
        "ranks": [asdict(found) for found in step.ranks], "allocated": worst.allocated, "reserved": worst.reserved,
        "context": step.context, "learning": list(step.pack.learning), "shape": asdict(step.pack.shape),
    }  # fmt: skip
    if worst.has_allocator or not step.choice.offload_optimizer:
        row["allocated_error"] = predicted.allocated / worst.allocated - 1
        row["reserved_error"] = reserved / worst.reserved - 1
    return row


def _placed(cases: list[Case], places: list[str]) -> list[tuple[Case, list[str]]]:
    """Each case with the GPUs that have fewest cases before it."""
    load = dict.fromkeys(places, 0)
    placed = []
    for case in cases:
        chosen = sorted(places, key=load.__getitem__)[: case.gpus]
        load.update({place: load[place] + 1 for place in chosen})
        placed.append((case, sorted(chosen, key=places.index)))
    return placed


class Queue:
    """Runs cases in children of this process: in order on each GPU, as many as the GPUs allow at once."""

    def __init__(self, cases: list[Case], folder: Path, gpu_ids: list[str], *, is_tiny: bool, budget: float) -> None:
        self._folder, self._is_tiny = folder, is_tiny
        self._end = time.monotonic() + budget
        # CPU ranks share the cores: one case at a time, and none gets ready meanwhile.
        self._places = gpu_ids or ["cpu"]
        self._ahead = READY_AHEAD if gpu_ids else 0
        self._waiting = _placed(cases, self._places)
        self._has_gpus = bool(gpu_ids)
        self._started: list[_Child] = []

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each case's row as it comes."""
        while self._waiting or self._started:
            self._start_some()
            self._let_go()
            for child in [child for child in self._started if child.is_over()]:
                self._started.remove(child)
                yield child.row()
            time.sleep(0.05)

    def _start_some(self) -> None:
        ready = sum(not child.is_going for child in self._started)
        if time.monotonic() > self._end:
            self._waiting.clear()
            for child in [child for child in self._started if not child.is_going]:
                child.kill()
        while self._waiting and ready < max(1, self._ahead) and (self._has_gpus or not self._started):
            case, places = self._waiting.pop(0)
            ids = places if self._has_gpus else []
            self._started.append(_Child(case, places, ids, self._folder, is_tiny=self._is_tiny))
            ready += 1

    def _let_go(self) -> None:
        taken: set[str] = set()
        for child in self._started:  # in order
            if not child.is_going and not taken & set(child.places):
                child.go()
            taken |= set(child.places)


class _Child:
    """One case under way."""

    def __init__(self, case: Case, places: list[str], gpu_ids: list[str], folder: Path, *, is_tiny: bool) -> None:
        self.case, self.places, self.is_going = case, places, False
        self._folder = folder / case.name
        self._folder.mkdir()
        command = [sys.executable, "-m", "tests.plan.measure_peaks", "--case", case.name, "--folder", str(self._folder)]
        command += ["--gpu-ids", ",".join(gpu_ids)] if gpu_ids else []
        command += ["--tiny"] if is_tiny else []
        self._log = open(self._folder / "log.txt", "wb")  # noqa: SIM115, closed when the child is over
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)
        self._since = self._started = time.monotonic()

    def go(self) -> None:
        (self._folder / GO_NAME).touch()
        self.is_going, self._since = True, time.monotonic()

    def is_over(self) -> bool:
        if self.is_going and time.monotonic() - self._since > CASE_SECONDS:
            self.kill()
        return self._process.poll() is not None

    def kill(self) -> None:
        """A launcher passes a first signal on and kills its ranks at a second."""
        for _ in range(2):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()

    def row(self) -> dict[str, Any]:
        self._process.wait()
        self._log.close()
        seconds = {
            "seconds": round(time.monotonic() - self._since, 1),
            "since_start": round(time.monotonic() - self._started, 1),
        }
        try:
            return json.loads((self._folder / "row.json").read_text(encoding="utf-8")) | seconds
        except OSError:
            tail = (self._folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            why = " / ".join(tail) or f"ended with {self._process.returncode}"
            return {"case": self.case.name, **asdict(self.case), "failure": why, **seconds}


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{row['case']:<30}"
    if "failure" in row:
        return f"{head} {row['seconds']:>5.0f} s  FAILED: {' '.join(row['failure'].split())[:300]}"
    worst = max(row["ranks"], key=lambda found: found["reserved"])
    columns = []
    for name, planned in (("allocated", row["predicted"]["allocated"]), ("reserved", row["predicted_reserved"])):
        error = f"{row[f'{name}_error']:>+7.1%}" if f"{name}_error" in row else f"{'':>7}"
        columns.append(f"{planned / GIB:>8.3f} {row[name] / GIB:>8.3f} {error}")
    peaks = ", ".join(f"{name} {worst[name] / GIB:.2f}" for name in ("setup", "held", "passes", "update"))
    return f"{head} {' '.join(columns)} {row['context'] / GIB:>7.2f} {row['seconds']:>6.0f}  {peaks}"


def after_calibration(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Errors of reserved memory, by case, corrected by another case of the same model, stage and offload."""
    errors = {}
    for row in rows:
        for other in rows:
            if other is row or any("failure" in one for one in (row, other)) or _class(row) != _class(other):
                continue
            choice = Choice(row["zero"], bool(row["offload"]), row["offload"] == "weights")
            worst = max(other["ranks"], key=lambda found: found["reserved"])
            measured = Measured(worst["held"], other["allocated"], other["reserved"], other["context"])
            try:
                found = calibrate("", choice, _memory(other), measured, num_ranks=other["gpus"], tokens=other["tokens"])
            except CadtrainError as error:
                print(f"{other['case']}: {error}")
                continue
            corrected = Corrections({found.sharing: found}).memory(choice, _memory(row))
            errors[f"{row['case']} by {other['case']}"] = (corrected.allocated + corrected.reserve) / row[
                "reserved"
            ] - 1
    return errors


def _class(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["size"], row["lora"], row["zero"], row["offload"], row["gpus"] > 1


def _memory(row: dict[str, Any]) -> RankMemory:
    return RankMemory(**{name: count for name, count in row["predicted"].items() if name not in ("allocated", "total")})


def summary(rows: list[dict[str, Any]]) -> str:
    """Means and the largest errors, and what a calibration with another case leaves of them."""
    lines = []
    for what in ("allocated_error", "reserved_error"):
        errors = [abs(row[what]) for row in rows if what in row]
        if errors:
            lines.append(
                f"{what[:9]}: mean {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}, {len(errors)} configurations"
            )
    lines += [f"reserved, calibrated: {name} {error:+.1%}" for name, error in after_calibration(rows).items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.plan.measure_peaks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--gpus", type=int, help="GPUs to use at most (CPU ranks with --tiny)")
    parser.add_argument(
        "--only", default="", help="regular expressions, comma between them; cases that one of them finds"
    )
    parser.add_argument("--tiny", action="store_true", help="narrow models on CPU ranks")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which no further case is begun")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after each case")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gpu-ids", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.case:
        case = next(case for case in CASES if case.name == options.case)
        row = measure_one(case, options.folder, [i for i in options.gpu_ids.split(",") if i], is_tiny=options.tiny)
        (options.folder / "row.json").write_text(json.dumps(row), encoding="utf-8")
        return 0
    gpus = find_gpus()
    if not gpus and not options.tiny and not options.list:
        parser.error("this machine has no GPU; try --tiny")
    limit = options.gpus or (2 if options.tiny else len(gpus))
    wanted = [text for text in options.only.split(",") if text]
    chosen = [case for case in CASES if not wanted or any(re.search(text, case.name) for text in wanted)]
    chosen = [case for case in chosen if case.gpus <= limit]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    ids = [] if options.tiny else [gpu.id for gpu in gpus[:limit]]
    started, rows = time.monotonic(), []
    print(
        f"{'configuration':<30} {'allocated: plan, measured':<25} {'reserved: plan, measured':<26} context seconds, peaks (GiB)"
    )
    with tempfile.TemporaryDirectory(prefix="cadtrain-peaks-") as name:
        for row in Queue(chosen, Path(name), ids, is_tiny=options.tiny, budget=options.budget).rows():
            rows.append(row)
            print(show(row), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"{summary(rows)}\n{time.monotonic() - started:.0f} s in all")
    return 0 if any("failure" not in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
