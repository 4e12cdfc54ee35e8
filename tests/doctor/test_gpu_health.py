"""What `nvidia-smi` and the kernel's log say, read from outputs in their layout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cadtrain.doctor import gpu_health, measure
from cadtrain.doctor.collective import _judge
from cadtrain.doctor.finding import Finding, Verdict
from cadtrain.doctor.gpu_health import (
    check_health,
    check_topology,
    check_visible,
    parse_health,
    parse_topology,
    read_health,
)
from cadtrain.launch.devices import Gpu

OUTPUTS = Path(__file__).parent / "outputs"
HEALTH = parse_health((OUTPUTS / "two_gpus.xml").read_text())
GPUS = tuple(Gpu(str(item.index), item.uuid, item.name, 80 << 30, 79 << 30) for item in HEALTH)


def by_name(findings: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}  # type: ignore[attr-defined]


def test_a_healthy_gpu_is_read() -> None:
    first = HEALTH[0]
    assert (first.index, first.name, first.has_persistence, first.has_mig) == (0, "NVIDIA H100 80GB HBM3", True, False)
    assert (first.uncorrected_errors, first.needs_reset, first.slowdowns) == (0, (), ())
    assert first.link_width == (16, 16)
    assert first.pcie_bytes == pytest.approx(63e9, rel=0.01)
    assert [f.verdict for f in check_health(GPUS[:1], HEALTH, [])] == [Verdict.OK]


def test_everything_wrong_with_a_gpu_is_told_with_a_remedy() -> None:
    found = by_name(check_health(GPUS, HEALTH, []))
    assert found["GPU 1 memory errors"].evidence == "2 uncorrected since the driver started"
    assert "nvidia-smi -r -i 1" in found["GPU 1 memory errors"].remedy
    assert found["GPU 1 clocks"].evidence == "slowed down now: it is too hot (hardware)"
    assert found["GPU 1 slot"].evidence == "8 of 16 PCIe lanes"
    assert found["GPU persistence"].remedy == "sudo nvidia-smi -pm 1"
    assert all(finding.remedy for finding in found.values())


def test_rows_that_failed_stop_a_run() -> None:
    text = (OUTPUTS / "two_gpus.xml").read_text().replace("<remapped_row_failure>No", "<remapped_row_failure>Yes", 1)
    found = by_name(check_health(GPUS[:1], parse_health(text), []))
    assert found["GPU 0 memory errors"].verdict is Verdict.FAIL


def test_older_drivers_call_the_reasons_otherwise() -> None:
    text = (OUTPUTS / "two_gpus.xml").read_text().replace("clocks_event_reason", "clocks_throttle_reason")
    assert parse_health(text)[1].slowdowns == ("it is too hot (hardware)",)


def test_only_grave_xids_of_this_gpu_are_told() -> None:
    lines = [
        "3,1,2,-;NVRM: Xid (PCI:0000:19:00): 79, pid=12, GPU has fallen off the bus.",
        "3,1,3,-;NVRM: Xid (PCI:0000:19:00): 79, pid=12, GPU has fallen off the bus.",
        "3,1,4,-;NVRM: Xid (PCI:0000:19:00): 43, pid=77, name=python",
        "3,1,5,-;NVRM: Xid (PCI:0000:AF:00): 48, pid=77",
    ]
    found = by_name(check_health(GPUS[:1], HEALTH, lines))
    assert list(found) == ["GPU 0 Xid"]
    assert found["GPU 0 Xid"].evidence.startswith("Xid 79 × 2 in the kernel's log: the GPU has fallen off the bus")


@pytest.mark.parametrize("text", ["", "no devices were found", "<nvidia_smi_log/>", "<nvidia_smi_log><gpu id='x'/></nvidia_smi_log>"])
def test_other_output_is_no_crash(text: str) -> None:
    for item in parse_health(text):
        assert list(check_health((Gpu("0", item.uuid, "x", 1, 1),), [item], ["NVRM: Xid (PCI:0000:19:00): 79, x"]))
        assert (item.link_width, item.pcie_bytes, item.uncorrected_errors) == (None, None, 0)
    assert parse_topology(text) == {}


@pytest.mark.parametrize(
    ("mask", "verdict", "words"),
    [
        ("0,1", Verdict.OK, "0,1"),
        ("GPU-00aa,1", Verdict.OK, "GPU-00aa"),
        ("0,7", Verdict.FAIL, "no GPU is called 7"),
        ("GPU-ffff", Verdict.FAIL, "no GPU is called GPU-ffff"),
        ("MIG-5f1e", Verdict.FAIL, "device numbers only"),
        ("", Verdict.OK, "hidden"),
    ],
)
def test_visible_devices(mask: str, verdict: Verdict, words: str) -> None:
    (finding,) = check_visible({"CUDA_VISIBLE_DEVICES": mask}, HEALTH)
    assert finding.verdict is verdict
    assert words in finding.evidence
    assert verdict is Verdict.OK or finding.remedy


def test_a_gpu_that_is_divided_is_told() -> None:
    (finding,) = check_visible({}, HEALTH)
    assert (finding.name, finding.verdict) == ("MIG", Verdict.WARN)
    assert list(check_visible({}, HEALTH[:1])) == []


def test_links() -> None:
    nvlink = parse_topology((OUTPUTS / "topology_nvlink.txt").read_text())
    assert nvlink == {(a, b): "NV18" for a in range(4) for b in range(a + 1, 4)}
    four = tuple(Gpu(str(i), f"GPU-{i}", "x", 0, 0) for i in range(4))
    assert next(check_topology(four, nvlink)).evidence == "NV18 (NVLink) × 6"
    pcie = parse_topology((OUTPUTS / "topology_pcie.txt").read_text())
    assert (pcie[0, 1], pcie[0, 2], len(pcie)) == ("PIX", "SYS", 6)
    finding = next(check_topology(four, pcie))
    assert finding.verdict is Verdict.WARN
    assert "both processors" in finding.evidence
    assert next(check_topology(four[:2], pcie)).verdict is Verdict.OK
    assert next(check_topology(four, {**nvlink, (0, 1): "PHB"})).verdict is Verdict.WARN


def test_an_nvidia_smi_that_hangs_or_fails_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for body in ("sleep 60", "exit 9"):
        smi.write_text(f"#!/bin/sh\n{body}\n")
        smi.chmod(0o755)
        assert read_health(seconds=1.0) is None
    smi.write_text(f"#!/bin/sh\ncat {OUTPUTS / 'two_gpus.xml'}\n")
    assert [item.uuid for item in gpu_health.read_health() or []] == [gpu.uuid for gpu in GPUS]


def test_bandwidth_is_judged_by_the_link() -> None:
    def verdict(rate: float, links: int, slot: float | None) -> Verdict:
        return next(_judge({"all-reduce": {"1048576": 1e9, "268435456": rate}}, "NCCL over 4 ranks: sum right", links, slot)).verdict

    assert verdict(360e9, 18, 63e9) is Verdict.OK
    assert verdict(20e9, 18, 63e9) is Verdict.WARN
    assert verdict(20e9, 0, 63e9) is Verdict.OK
    assert verdict(5e9, 0, 63e9) is Verdict.WARN
    assert verdict(0.4e9, 0, None) is Verdict.OK


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40", 181e12),
     ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA H200", 989e12), ("Tesla K80", None)],
)  # fmt: skip
def test_peaks(name: str, peak: float | None) -> None:
    assert measure.peak_flops(name) == peak


def test_rates_are_compared_with_chip_and_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = '{"gpus": [{"name": "NVIDIA L40", "flops": 1.2e14, "to_device": 2.5e10, "to_host": 2.6e10}, {"name": "NVIDIA L40", "flops": 4e13, "to_device": 3e9, "to_host": 2.6e10}]}'
    (tmp_path / "doctor_test_rates.py").write_text(f"print('facts', {facts!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = by_name(measure.check_rates(pcie_bytes=31.5e9, module="doctor_test_rates"))
    assert found["GPU 0 matrix product"].evidence == "120 TFLOP/s in bf16, 66% of a NVIDIA L40's peak"
    assert [found[f"GPU {i} {what}"].verdict for i in (0, 1) for what in ("matrix product", "copies")] == ["ok", "ok", "warn", "warn"]


@pytest.mark.slow
def test_rates_on_a_cpu() -> None:
    (finding,) = measure.check_rates(pcie_bytes=None)
    assert finding.verdict is Verdict.OK, finding
    assert "GFLOP/s in fp32" in finding.evidence
