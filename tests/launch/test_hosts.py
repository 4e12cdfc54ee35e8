"""Hostfiles, node lists, remote shells, and the script for SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cadtrain.cli.hosts import choose_hosts
from cadtrain.errors import ConfigError, EnvironmentFault, UsageError
from cadtrain.launch.hosts import (
    SRUN,
    Host,
    RemoteShell,
    expand_nodelist,
    passed_on,
    read_hostfile,
    secrets,
    slurm_hosts,
)
from cadtrain.launch.node import TOKEN_NAME, NodeOrder, check_host, launcher_argv


def test_deepspeeds_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two of them\nnode-1  slots=4\n\n10.0.0.7 slots=2 # the old one\n")
    assert read_hostfile(path) == (Host("node-1", 4), Host("10.0.0.7", 2))


def test_all_faults_of_a_hostfile_at_once(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=4\nb\nc slots=0\nd slots=x\na slots=1\ne slots=1 port=3\nf gpus=2\nslots=4\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert [(int(fault.where.rpartition(":")[2]), fault.message) for fault in caught.value.faults] == [
        (2, "b has no number of slots."), (3, "slots=0 is no number of ranks above 0."), (4, "slots=x is no number of ranks above 0."),
        (5, "a stands in line 1 already."), (6, "'port=3' is not understood."), (7, "'gpus=2' is not understood."),
        (8, "'slots=4' is no host name."),
    ]  # fmt: skip
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="names no host"):
        read_hostfile(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_hostfile(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "names"),
    [("n1", ["n1"]), ("n[1-3]", ["n1", "n2", "n3"]), ("n[09-11,20],login", ["n09", "n10", "n11", "n20", "login"]),
     ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]), ("a,b-c", ["a", "b-c"])],
)  # fmt: skip
def test_slurms_node_list(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


def test_hosts_of_a_job() -> None:
    environ = {"SLURM_JOB_NODELIST": "n[1-3]"}
    assert slurm_hosts(2, 4, environ) == (Host("n1", 4), Host("n2", 4))
    with pytest.raises(UsageError, match="this job has 3"):
        slurm_hosts(4, 4, environ)
    with pytest.raises(UsageError, match="no SLURM job"):
        slurm_hosts(2, 4, {})


def test_the_shells_words() -> None:
    assert RemoteShell("ssh -p 22 {host} {command}").argv("n1", "cd 'a b' && x") == ["ssh", "-p", "22", "n1", "cd 'a b' && x"]
    assert RemoteShell(SRUN).argv("n1", "x y")[-4:] == ["--nodelist=n1", "bash", "-c", "x y"]
    with pytest.raises(UsageError, match=r"\{command\} is missing"):
        RemoteShell("ssh {host}")


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n")
    for arguments in [(tmp_path / "hosts", 2, None, None), (tmp_path / "hosts", None, "2", None), (None, None, None, "ssh {host} {command}")]:
        with pytest.raises(UsageError):
            choose_hosts(*arguments)
    assert choose_hosts(None, None, "2", None)[0] == ()


def test_what_other_hosts_get() -> None:
    environ = {"NCCL_DEBUG": "INFO", "SECRET_TOKEN": "x", "PYTHONPATH": "/p", "GLOO_SOCKET_IFNAME": "eth0", "HOME": "/root", "HF_TOKEN": "hf_x", "HF_HOME": "/hf"}
    assert secrets(environ) == {"HF_TOKEN": "hf_x"}, "not on a command line, which every process list shows"
    assert passed_on(environ) == {"GLOO_SOCKET_IFNAME": "eth0", "HF_HOME": "/hf", "NCCL_DEBUG": "INFO", "PYTHONPATH": "/p"}


def order(run: Path, **changes: object) -> NodeOrder:
    fields: dict[str, object] = {
        "node_rank": 1, "hosts": [["a", 2], ["b", 3]], "kind": "cuda", "master_addr": "a", "master_port": 4711, "run_dir": str(run),
        "token": "t", "worker": ["cadtrain", "train"], "resume": False, "hang_seconds": None, "stop_seconds": 1.0, "failure_seconds": 1.0,
    }  # fmt: skip
    return NodeOrder(**{**fields, **changes})  # type: ignore[arg-type]


def test_an_order_travels_whole(tmp_path: Path) -> None:
    made = order(tmp_path)
    assert NodeOrder.load(made.dump()) == made
    assert (made.slots, made.first_rank) == (3, 2)
    argv = launcher_argv(made)
    assert {"--node_rank=1", "--master_addr=a", "--master_port=4711", "--no_local_rank"} <= set(argv)


def test_a_host_without_the_run_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cadtrain.launch import node

    with pytest.raises(EnvironmentFault, match="host b does not see the run folder"):
        check_host(order(tmp_path))
    (tmp_path / TOKEN_NAME).write_text("another launch's")
    with pytest.raises(EnvironmentFault, match="does not see"):
        check_host(order(tmp_path))
    (tmp_path / TOKEN_NAME).write_text("t")
    monkeypatch.setattr(node, "find_gpus", lambda: ())
    with pytest.raises(EnvironmentFault, match="host b has 0 visible GPUs, 3 ranks are meant for it"):
        check_host(order(tmp_path))
    check_host(order(tmp_path, kind="cpu"))


SCRIPT_ARGUMENTS = ["launch", "demo", "--nodes", "2", "--gpus", "4", "--time-limit", "12h", "--zero", "3", "--set", "seed=7", "--sbatch"]


def script(run: Path) -> str:
    from cadtrain.cli.app import app

    result = CliRunner().invoke(app, [*SCRIPT_ARGUMENTS, "--run-dir", str(run)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_script_for_slurm(tmp_path: Path) -> None:
    text = script(tmp_path / "run")
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=demo\n#SBATCH --nodes=2\n")
    assert "#SBATCH --time=12:00:00\n" in text
    assert "#SBATCH --signal=B:USR1@300 " in text
    assert "launch demo --run-dir=" in text
    assert "--nodes=2 --gpus=4 --zero=3 --set=seed=7 &" in text
    assert "--nodes=2 --gpus=4 --resume --zero=3 &" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["--gpus", "--run-dir"])
def test_a_script_that_could_not_work_is_refused(missing: str, tmp_path: Path) -> None:
    from cadtrain.cli.app import app

    arguments = ["launch", "--gpus", "4", "--run-dir", str(tmp_path / "run"), "--sbatch"]
    number = arguments.index(missing)
    result = CliRunner().invoke(app, arguments[:number] + arguments[number + 2 :])
    assert isinstance(result.exception, UsageError)
    assert f"Add {missing}" in (result.exception.hint or "")


STUB = """#!/bin/bash
echo "$@" >> "$CALLS"
[ -n "$SAVED" ] && mkdir -p "$RUN/checkpoints" && touch "$RUN/checkpoints/latest" "$RUN/config.yaml"
trap 'sleep 0.3; exit 138' USR1
trap 'exit 143' TERM
echo ready >> "$CALLS"
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("number", "saved", "code", "is_requeued"),
    [(signal.SIGUSR1, "yes", 138, True), (signal.SIGUSR1, "", 138, False), (signal.SIGTERM, "yes", 143, False)],
)
def test_the_script_puts_the_job_back_only_where_there_is_more_to_do(
    tmp_path: Path, number: int, saved: str, code: int, is_requeued: bool
) -> None:
    calls = tmp_path / "calls"
    for name, body in (("cadtrain", STUB), ("scontrol", '#!/bin/bash\necho scontrol "$@" >> "$CALLS"\n')):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script(tmp_path / "run"))
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "RUN": str(tmp_path / "run"), "SAVED": saved, "SLURM_JOB_ID": "77",
    }  # fmt: skip
    job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment)
    try:
        end = time.monotonic() + 30
        while not calls.exists() or "ready" not in calls.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        job.send_signal(number)
        assert job.wait(timeout=30) == code
    finally:
        job.kill()
    assert ("scontrol requeue 77" in calls.read_text()) is is_requeued
    if is_requeued:
        second = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment)
        end = time.monotonic() + 30
        while calls.read_text().count("ready") < 2 and time.monotonic() < end:
            time.sleep(0.02)
        second.send_signal(signal.SIGTERM)
        second.wait(timeout=30)
        assert "--resume" in calls.read_text()
