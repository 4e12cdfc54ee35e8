"""Six things that break a run, broken for real where that can be done: each is found, and its remedy, followed, mends it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from cadtrain.doctor import leftovers
from cadtrain.doctor.compilers import check_extensions
from cadtrain.doctor.finding import Finding, Verdict
from cadtrain.doctor.machine import check_disk, check_shared_memory, file_system
from cadtrain.doctor.network import check_host_name, check_port
from cadtrain.doctor.packages import check_extras
from cadtrain.launch.guard import MARK_VARIABLE

MIB = 2**20


def one(findings: object, name: str) -> Finding:
    found = {finding.name: finding for finding in findings}  # type: ignore[attr-defined]
    return found[name]


def follow(remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a remedy's `export NAME=VALUE` says."""
    match = re.search(r"export (\w+)=(\S+)", remedy)
    assert match is not None, remedy
    monkeypatch.setenv(match[1], shlex.split(match[2])[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs of a given size."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_a_wrong_arch_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    finding = one(check_extensions(), "TORCH_CUDA_ARCH_LIST")
    assert finding.verdict is Verdict.WARN
    follow(finding.remedy, monkeypatch)
    assert one(check_extensions(), "TORCH_CUDA_ARCH_LIST").verdict is Verdict.OK


def test_a_tiny_shared_memory(small_disk: Callable[[str], Path]) -> None:
    path = small_disk("64m")
    finding = one(check_shared_memory(num_gpus=4, path=path), "shared memory")
    assert finding.verdict is Verdict.FAIL
    assert "64.0 MiB free of 64.0 MiB" in finding.evidence
    command = finding.remedy.partition("on a host: ")[2].replace("/dev/shm", str(path))
    subprocess.run(shlex.split(command), check=True)
    assert one(check_shared_memory(num_gpus=4, path=path), "shared memory").verdict is Verdict.OK


def test_an_occupied_port() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        finding = one(check_port(holder.getsockname()[1]), "port")
        assert finding.verdict is Verdict.FAIL
        assert f"process {os.getpid()}" in finding.evidence
        match = re.search(r"--port (\d+)", finding.remedy)
        assert match is not None
        assert one(check_port(int(match[1])), "port").verdict is Verdict.OK


def test_the_port_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        monkeypatch.setenv("MASTER_PORT", str(holder.getsockname()[1]))
        assert one(check_port(None), "port").verdict is Verdict.FAIL
    monkeypatch.delenv("MASTER_PORT")
    assert one(check_port(None), "port").verdict is Verdict.OK


def test_an_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")  # a file in the way: a mode would not stop root
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    finding = one(check_extensions(), "extension cache")
    assert finding.verdict is Verdict.FAIL
    assert "Not a directory" in finding.evidence
    follow(finding.remedy, monkeypatch)
    assert one(check_extensions(), "extension cache").verdict is Verdict.OK


def test_a_lock_that_a_killed_build_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "py311_cu130" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert one(check_extensions(), "extension cache").verdict is Verdict.OK, "a build may be under way"
    os.utime(lock, (time.time() - 7200,) * 2)
    finding = one(check_extensions(), "extension cache")
    assert finding.verdict is Verdict.WARN
    subprocess.run(shlex.split(finding.remedy), check=True)
    assert one(check_extensions(), "extension cache").verdict is Verdict.OK


def test_a_cache_on_a_network_disk(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/home {tmp_path}/my\\040home nfs4 rw 0 0\n")
    assert file_system(tmp_path / "my home" / "cache", mounts) == "nfs4"
    assert file_system(tmp_path / "other", mounts) == "ext4"
    assert file_system(tmp_path, tmp_path / "nothing") == ""


def test_missing_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "0.6.4"

    monkeypatch.setattr(metadata, "version", version)
    finding = one(check_extras(has_gpu=True), "liger-kernel")
    assert finding.verdict is Verdict.WARN
    # What the remedy's extra declares is what is missing; pip itself is not run here.
    match = re.search(r"pip install 'cadtrain\[(\w+)\]'", finding.remedy)
    assert match is not None
    installed.update(text.split(">")[0] for text in metadata.requires("cadtrain") or () if f'"{match[1]}"' in text)
    assert one(check_extras(has_gpu=True), "liger-kernel").verdict is Verdict.OK


def test_too_little_disk(small_disk: Callable[[str], Path], tmp_path: Path) -> None:
    finding = one(check_disk(small_disk("200m") / "runs"), "disk")
    assert finding.verdict is Verdict.FAIL
    assert "--run-dir on another disk" in finding.remedy
    assert one(check_disk(small_disk("2g"), wanted=256 * MIB), "disk").verdict is not Verdict.FAIL


def test_launch_does_not_start_on_a_full_disk(small_disk: Callable[[str], Path]) -> None:
    from cadtrain.cli.app import main

    run = small_disk("100m") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["launch", "--gpus", "2", "--run-dir", str(run)])
    assert ended.value.code == 3
    assert not run.exists()


def test_launch_shows_warnings_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cadtrain.cli import launch as command
    from cadtrain.cli.app import app
    from cadtrain.doctor import preflight as module
    from cadtrain.doctor.finding import warn
    from cadtrain.launch import start as start_module
    from cadtrain.launch.supervise import LaunchOutcome

    monkeypatch.setattr(module, "check_host_name", lambda: iter([warn("host name", "vm is unknown", "Add it.")]))
    monkeypatch.setattr(start_module, "start", lambda plan, **options: LaunchOutcome(0, None, None, 1.0))
    monkeypatch.setattr(command, "make_demo_parts", lambda config: None)
    result = CliRunner().invoke(app, ["launch", "--run-dir", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.output
    assert "host name: vm is unknown" in result.stderr
    assert json.loads(result.stdout)["exit_code"] == 0
    quiet = CliRunner().invoke(app, ["launch", "--run-dir", str(tmp_path / "run"), "--json", "--no-preflight"])
    assert "host name" not in quiet.stderr


def test_a_host_name_that_nobody_knows() -> None:
    finding = one(check_host_name("no-such-host.invalid"), "host name")
    assert finding.verdict is Verdict.WARN
    assert "/etc/hosts: 127.0.1.1 no-such-host.invalid" in finding.remedy
    assert one(check_host_name("localhost"), "host name").verdict is Verdict.OK


def test_a_rank_without_a_launcher_is_found_and_the_remedy_ends_it(tmp_path: Path) -> None:
    # A shell that ends at once leaves its child to init, as a killed launcher would.
    (tmp_path / "cadtrain").mkdir()
    (tmp_path / "cadtrain" / "__main__.py").write_text("import time\ntime.sleep(120)\n")
    code = "import subprocess, sys\nprint(subprocess.Popen([sys.executable, 'cadtrain', 'train', '--run-dir', 'x'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, MARK_VARIABLE: "test"}, capture_output=True, text=True, check=True
    )  # fmt: skip
    pid = int(made.stdout)
    try:
        finding = one(leftovers.check_processes(), "leftover processes")
        assert finding.verdict is Verdict.WARN
        assert str(pid) in finding.evidence.split()
        assert str(pid) in finding.remedy.split()
    finally:
        os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert str(pid) not in one(leftovers.check_processes(), "leftover processes").evidence.split()


def test_unfinished_checkpoints_are_found_but_not_those_being_written(tmp_path: Path) -> None:
    from cadtrain.launch.folder import hold

    torn = tmp_path / "run" / "checkpoints" / "step-00000005.tmp"
    torn.mkdir(parents=True)
    (torn / "shard").write_bytes(b"x" * 2048)
    finding = one(leftovers.check_unfinished(tmp_path), "unfinished checkpoints")
    assert finding.verdict is Verdict.WARN
    assert "1 under" in finding.evidence
    assert "2.0 KiB" in finding.evidence
    with hold(tmp_path / "run"):
        assert one(leftovers.check_unfinished(tmp_path), "unfinished checkpoints").verdict is Verdict.OK
    subprocess.run(shlex.split(finding.remedy), check=True)
    assert one(leftovers.check_unfinished(tmp_path), "unfinished checkpoints").verdict is Verdict.OK
