"""The doctor's checks: what is fine, what is missing, what crashes and what hangs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cadtrain.doctor import checks, collective, compilers, gpus, machine, packages
from cadtrain.doctor.child import ChildResult, run_all, run_python
from cadtrain.doctor.finding import Finding, Report, Verdict, fail, ok, warn
from cadtrain.host_memory import cgroup_memory_limit
from cadtrain.launch.devices import Gpu, choose_devices

GIB = 2**30
TWO_GPUS = tuple(Gpu(str(i), f"GPU-{i}", "Test GPU", 80 * GIB, 79 * GIB) for i in range(2))


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_report_and_exit_code() -> None:
    assert Report((ok("a", ""),)).exit_code == 0
    report = Report((ok("a", ""), warn("b", "", ""), fail("c", "", ""), fail("c", "", "")))
    assert report.exit_code == 3
    assert report.summary() == "Not ready: c must be mended."
    assert "worth a look: b" in Report((warn("b", "", ""),)).summary()


def test_a_child_that_hangs_is_killed_with_what_it_started() -> None:
    start = time.monotonic()
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    result = run_python(code, seconds=1.0)
    assert time.monotonic() - start < 10
    assert result.status is None
    assert "did not answer" in result.reason()


def test_one_failed_child_ends_the_wait_for_the_others() -> None:
    commands = [[sys.executable, "-c", "raise OSError('broken link')"], [sys.executable, "-c", "import time; time.sleep(60)"]]
    start = time.monotonic()
    broken, waiting = run_all(commands, [{}, {}], seconds=60)
    assert time.monotonic() - start < 20
    assert broken.reason() == "OSError: broken link"
    assert waiting.status is None


def test_a_child_may_write_much() -> None:
    result = run_python("import sys; sys.stderr.write('x' * 500_000); print('done')", seconds=30)
    assert result.is_good
    assert result.stdout == "done\n"


def test_packages_missing_and_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["rich<1", "no-such-package>=2", "typer>=0.1", "other; extra == 'gpu'"])
    found = {finding.name: finding for finding in packages.check_packages()}
    assert found["rich"].verdict is Verdict.FAIL
    assert "wanted <1" in found["rich"].evidence
    assert found["no-such-package"].remedy == "pip install 'no-such-package>=2'"
    assert found["packages"].evidence.startswith("1 as declared, among them typer ")
    assert "other" not in found


def test_extras_matter_only_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["no-such-package>=2; extra == 'gpu'"])
    assert only(packages.check_extras(has_gpu=True)).verdict is Verdict.WARN
    assert only(packages.check_extras(has_gpu=False)).verdict is Verdict.OK


def test_a_missing_system_library_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "ImportError: libGL.so.1: cannot open shared object file: No such file or directory"
    monkeypatch.setattr(packages, "run_python", lambda code, seconds: ChildResult(1, "", text, 1.0))
    finding = only(packages.check_cad_kernel())
    assert (finding.verdict, finding.remedy) == (Verdict.FAIL, "apt-get install libgl1")


@pytest.mark.kernel
def test_cad_kernel_makes_a_box() -> None:
    assert only(packages.check_cad_kernel()).verdict is Verdict.OK


def test_torch_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "run_python", lambda code, seconds: ChildResult(-11, "", "", 1.0))
    facts, findings = gpus.check_torch(())
    assert facts is None
    assert "SIGSEGV" in only(findings).evidence


def test_torch_without_cuda_on_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "facts " + json.dumps({"version": "2.11.0+cpu", "cuda": None, "devices": []})
    monkeypatch.setattr(gpus, "run_python", lambda code, seconds: ChildResult(0, line, "", 1.0))
    _, findings = gpus.check_torch(TWO_GPUS)
    assert "there are 2 GPUs" in only(findings).evidence


def test_fewer_gpus_than_asked_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    finding = only(gpus.check_gpus(TWO_GPUS, 9))
    assert finding.verdict is Verdict.FAIL
    assert "2 visible, 9 asked for" in finding.evidence


def test_driver_older_than_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    nvml = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "550.54", nvmlSystemGetCudaDriverVersion_v2=lambda: 12040,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    finding = only(gpus.check_driver(gpus.TorchFacts("2.11", "13.0", "2.27", 0)))
    assert finding.verdict is Verdict.FAIL
    assert "CUDA up to 12.4; torch is built for 13.0" in finding.evidence
    assert only(gpus.check_driver(gpus.TorchFacts("2.11", "12.8", "2.27", 2))).verdict is Verdict.OK


@pytest.mark.parametrize(("free", "num_gpus", "verdict"), [(64 << 20, 4, "fail"), (64 << 20, 0, "warn"), (16 << 30, 4, "ok")])
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int, num_gpus: int, verdict: str) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=free, used=0, free=free))
    finding = only(machine.check_shared_memory(num_gpus=num_gpus))
    assert finding.verdict == verdict
    assert bool(finding.remedy) == (verdict != "ok")


def test_control_group_limits(tmp_path: Path) -> None:
    job = tmp_path / "job" / "step"
    job.mkdir(parents=True)
    (tmp_path / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text(f"{16 * GIB}\n")
    (job.parent / "memory.current").write_text(f"{GIB}\n")
    (job / "memory.max").write_text("max\n")
    proc = tmp_path / "cgroup"
    proc.write_text("0::/job/step\n")
    assert cgroup_memory_limit(tmp_path, proc) == (16 * GIB, GIB)
    assert cgroup_memory_limit(tmp_path, tmp_path / "none") is None


def test_disk_rate_and_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "WRITE_TEST_BYTES", 8 << 20)
    finding = only(machine.check_disk(tmp_path / "runs" / "new"))
    assert "writes" in finding.evidence
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=0, free=1 << 20))
    assert only(machine.check_disk(tmp_path)).verdict is Verdict.FAIL


def test_arch_list_with_letters_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    finding = next(iter(compilers.check_extensions()))
    assert finding.verdict is Verdict.WARN
    assert "TORCH_CUDA_ARCH_LIST='9.0'" in finding.remedy


@pytest.mark.parametrize(
    ("compiles", "verdict", "words"),
    [
        ("never", Verdict.OK, "g++ not found; CPU ranks compile nothing"),
        ("with --offload", Verdict.WARN, "g++ not found; needed for --offload"),
        ("now", Verdict.FAIL, "DeepSpeed compiles its host optimizer with it"),
    ],
)
def test_no_compiler(
    compiles: compilers.Compiles, verdict: Verdict, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    found = {f.name: f for f in compilers.check_compilers(compiles=compiles, torch_cuda=None)}
    assert {name: finding.verdict for name, finding in found.items()} == {"g++": verdict, "ninja": verdict}
    assert words in found["g++"].evidence
    assert found["g++"].remedy == ("" if verdict is Verdict.OK else "apt-get install g++")


def test_an_old_compiler_matters_only_where_something_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho 7.5.0\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    verdicts = [
        next(iter(compilers.check_compilers(compiles=compiles, torch_cuda=None))).verdict
        for compiles in ("never", "with --offload")
    ]
    assert verdicts == [Verdict.OK, Verdict.WARN]


def test_a_machine_without_gpu_and_compiler_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "find_gpus", lambda: ())
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nowhere")
    found = {f.name: f for f in checks.examine(checks.Scope(run_folder=tmp_path, quick=True)).findings}
    assert found["g++"].verdict is Verdict.OK
    assert "extension cache" not in found


def test_nvcc_of_another_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = {f.name: f for f in compilers.check_compilers(compiles="with --offload", torch_cuda="13.0")}
    assert found["nvcc"].verdict is Verdict.WARN
    assert "11.8" in found["nvcc"].evidence


def test_all_reduce_over_two_gloo_ranks() -> None:
    finding = only(collective.check_collective(choose_devices((), 2), dict(os.environ)))
    assert finding.verdict is Verdict.OK, finding
    assert "2 ranks: sum right, bus bandwidth" in finding.evidence


@pytest.mark.slow
def test_bench_measures_three_collectives_by_size() -> None:
    findings = list(collective.check_collective(choose_devices((), 2), dict(os.environ), bench=True))
    assert [finding.name for finding in findings] == ["all-reduce", "all-gather", "reduce-scatter"]
    assert all("at 64 KiB" in finding.evidence and "at 4 MiB" in finding.evidence for finding in findings)


def test_a_rank_that_never_joins_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, time\nif os.environ['RANK'] == '1':\n    time.sleep(600)\nfrom cadtrain.doctor.collective_rank import main\nmain()\n"
    (tmp_path / "doctor_test_absent.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    finding = only(collective.check_collective(choose_devices((), 2), dict(os.environ), seconds=7, module="doctor_test_absent"))
    assert finding.verdict is Verdict.FAIL
    assert "; the others waited for rank 1, which never came" in finding.evidence


def test_a_hanging_all_reduce_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doctor_test_hang.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    devices = choose_devices(TWO_GPUS, 2)
    finding = only(collective.check_collective(devices, dict(os.environ), seconds=1.5, module="doctor_test_hang"))
    assert time.monotonic() - start < 15
    assert finding.verdict is Verdict.FAIL
    assert "did not answer" in finding.evidence
    assert "NCCL_P2P_DISABLE" in finding.remedy


def test_command_prints_json_and_ends_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    from cadtrain.cli.app import app

    monkeypatch.setattr(checks, "_findings", lambda scope, watch: iter([ok("a", "fine"), fail("b", "broken", "mend it")]))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 3
    assert json.loads(result.stdout)["findings"][1] == {"name": "b", "verdict": "fail", "evidence": "broken", "remedy": "mend it"}
    shown = CliRunner().invoke(app, ["doctor"])
    assert "Not ready: b must be mended." in shown.stdout


@pytest.mark.slow
def test_this_machine_is_ready(tmp_path: Path) -> None:
    report = checks.examine(checks.Scope(run_folder=tmp_path))
    assert report.exit_code == 0, report.of(Verdict.FAIL)
