"""Where a step goes, on made-up traces whose answer is known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cadtrain.errors import DataError
from cadtrain.metrics.timeline import collective_of, communication_times, read_trace, step_profile, timeline_of

MAIN, AUTOGRAD = 1, 2


def span(name: str, start: float, end: float, *, cat: str = "user_annotation", tid: int = MAIN, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": tid, "ts": start, "dur": end - start, "args": args}


def kernel(name: str, start: float, end: float, *, launched: float, tid: int, number: int, cat: str = "kernel") -> list[dict[str, Any]]:
    return [
        span("cudaLaunchKernel", launched, launched + 1, cat="cuda_runtime", tid=tid, correlation=number),
        span(name, start, end, cat=cat, tid=7, correlation=number, stream=7),
    ]


def gpu_step() -> list[dict[str, Any]]:
    """A step of 1000 us. The GPU runs late: a kernel is its launcher's, whatever the host does meanwhile."""
    return [
        {"ph": "M", "name": "process_name"},
        span("cadtrain/step", 0, 1000),
        span("cadtrain/data", 0, 100),
        span("cadtrain/micro_step", 100, 700),
        span("cadtrain/forward", 110, 300),
        span("cadtrain/attention", 120, 160),
        span("cadtrain/LoRA", 130, 140),
        span("cadtrain/backward", 300, 700),
        span("cadtrain/MLP", 400, 450, tid=AUTOGRAD),
        span("cadtrain/optimizer", 700, 900),
        span("cadtrain/attention", 150, 400, cat="gpu_user_annotation", tid=7),
        *kernel("flash_fwd", 150, 250, launched=125, tid=MAIN, number=1),
        *kernel("gemm", 250, 270, launched=135, tid=MAIN, number=2),
        *kernel("gemm", 270, 350, launched=200, tid=MAIN, number=3),  # in no part: the head, and it runs into the backward pass
        *kernel("ncclDevKernel_AllGather_RING_LL(x)", 340, 450, launched=260, tid=MAIN, number=4),
        *kernel("gemm", 410, 480, launched=420, tid=AUTOGRAD, number=5),  # a forward part on autograd's thread: recomputed
        *kernel("gemm", 480, 600, launched=460, tid=AUTOGRAD, number=6),
        *kernel("ncclDevKernel_ReduceScatter_Sum_bf16", 590, 720, launched=500, tid=AUTOGRAD, number=7),
        *kernel("Memcpy HtoD", 720, 740, launched=710, tid=MAIN, number=8, cat="gpu_memcpy"),
        *kernel("adam", 760, 860, launched=720, tid=MAIN, number=9),
        *kernel("after", 990, 1010, launched=950, tid=MAIN, number=10),  # half of it lies outside of the step
    ]


def test_a_gpu_step_is_divided_without_remainder() -> None:
    found = step_profile(timeline_of(gpu_step()))
    assert found.is_device
    milli = {name: round(value * 1000, 6) for name, value in found.parts.items()}
    assert milli == {
        "attention": 100, "LoRA": 20, "logits and loss": 80, "recompute": 70, "backward": 120, "optimizer": 100, "other": 10,
    }  # fmt: skip
    assert found.communication * 1000 == pytest.approx(60 + 120)  # 350-410 and 600-720
    assert found.overlapped_communication * 1000 == pytest.approx(10 + 40 + 10)
    assert found.copies * 1000 == pytest.approx(20)
    assert found.data_wait * 1000 == pytest.approx(100)
    gaps = {name: round(value * 1000, 6) for name, value in found.gaps.items()}
    assert gaps == {"forward": 40, "backward": 0, "optimizer": 20 + 40, "other": 10 + 90}
    parts = sum(found.parts.values()) + sum(found.gaps.values())
    assert parts + found.communication + found.copies + found.data_wait == pytest.approx(found.step)
    assert found.collectives == pytest.approx({"all-gather": 0.11, "reduce-scatter": 0.13})
    assert found.kernels[0] == ("gemm", pytest.approx(0.29), 4)


def test_kernels_at_once_count_once() -> None:
    rows = [
        span("cadtrain/step", 0, 100),
        span("cadtrain/forward", 0, 20),
        span("cadtrain/MLP", 10, 20),
        *kernel("a", 0, 60, launched=5, tid=MAIN, number=1),
        *kernel("b", 20, 80, launched=15, tid=MAIN, number=2),
        *kernel("c", 30, 50, launched=16, tid=MAIN, number=3),
    ]
    assert step_profile(timeline_of(rows)).parts == pytest.approx({"logits and loss": 0.06, "MLP": 0.02})


def test_times_are_those_of_one_step() -> None:
    rows = gpu_step()
    later = [{**row, "ts": row["ts"] + 2000} for row in rows if row["ph"] == "X"]
    for row in later:
        if "correlation" in row["args"]:
            row["args"] = {**row["args"], "correlation": row["args"]["correlation"] + 100}
    one, two = step_profile(timeline_of(rows)), step_profile(timeline_of([*rows, *later]))
    assert two.steps == 2
    assert two.parts == pytest.approx(one.parts)
    assert two.step == pytest.approx(one.step)
    assert two.communication == pytest.approx(one.communication)


def test_without_a_gpu_operators_and_gloo_are_the_timeline() -> None:
    rows = [
        span("cadtrain/step", 0, 100),
        span("cadtrain/forward", 10, 40),
        span("cadtrain/attention", 20, 40),
        span("aten::linear", 20, 38, cat="cpu_op"),
        span("aten::mm", 22, 36, cat="cpu_op"),
        span("autograd::engine::evaluate_function: MmBackward0", 50, 95, cat="cpu_op"),
        span("c10d::allreduce_", 50, 55, cat="cpu_op"),
        span("gloo:all_reduce", 52, 80, tid=3),
        span("aten::add", 70, 75, cat="cpu_op", tid=4),
    ]
    found = step_profile(timeline_of(rows))
    assert not found.is_device
    assert found.parts == pytest.approx({"attention": 0.018, "other": 0.005})
    assert found.communication == pytest.approx(0.023)
    assert found.overlapped_communication == pytest.approx(0.005)
    assert sum(found.gaps.values()) == pytest.approx(0.1 - 0.018 - 0.028)


def test_communication_alone_needs_no_ranges() -> None:
    """What `--bench` records: the device's side of a trace."""
    rows = [row for row in gpu_step() if row.get("cat") in ("kernel", "gpu_memcpy")]
    found = communication_times(timeline_of(rows))
    assert (found.total, found.exposed, found.is_device) == (110 + 130, 180, True)
    assert found.kinds == {"all-gather": 110, "reduce-scatter": 130}


def test_collectives_have_one_name_whoever_runs_them() -> None:
    names = {
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "all-gather",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL": "reduce-scatter",
        "ncclKernel_AllReduce_RING_LL_Sum_float": "all-reduce",
        "ncclDevKernel_Broadcast_RING_LL": "broadcast",
        "ncclDevKernel_Reduce_Sum_f32_RING_LL": "reduce",
        "ncclDevKernel_SendRecv": "send-recv",
        "gloo:all_gather": "all-gather",
        "gloo:reduce_scatter": "reduce-scatter",
        "gloo:all_to_all": "all-to-all",
        "ncclSomethingNew": "other",
    }
    assert {name: collective_of(name) for name in names} == names


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="cadtrain/step"):
        step_profile(timeline_of([span("aten::mm", 0, 1, cat="cpu_op")]))


def test_trace_files_are_read_plain_and_packed(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": gpu_step()})
    (tmp_path / "a.json").write_text(text)
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write(text)
    (tmp_path / "b.json").write_text(text[:100])
    with pytest.raises(DataError, match=r"b\.json: is no Chrome trace"):
        read_trace(tmp_path / "b.json")
    assert read_trace(tmp_path / "a.json") == read_trace(tmp_path / "a.json.gz") == timeline_of(gpu_step())
