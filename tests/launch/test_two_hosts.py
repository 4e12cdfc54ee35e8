"""Two hosts: network namespaces with an address each, joined by a cable, reached by a stub of a remote shell."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cadtrain.launch.guard import MARK_VARIABLE, processes_with_mark
from tests.launch.test_faults import LIMIT, Launch, wait_until

pytestmark = pytest.mark.slow
FIRST, SECOND = "10.77.0.1", "10.77.0.2"


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A template that runs a command in the namespace of a host, with a bare environment as sshd gives."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (iproute2): network namespaces cannot be made")
    names = [f"cadtrain{os.getpid()}{side}" for side in "ab"]
    made = _ip("netns", "add", names[0])
    if made.returncode:
        pytest.skip(f"`ip netns` is not possible here: {made.stderr.strip()}")
    try:
        steps = [["netns", "add", names[1]], ["-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1]]]
        for name, address in zip(names, (FIRST, SECOND), strict=True):
            steps += [["-n", name, "addr", "add", f"{address}/24", "dev", "eth0"], ["-n", name, "link", "set", "eth0", "up"], ["-n", name, "link", "set", "lo", "up"]]
        for step in steps:
            done = _ip(*step)
            if done.returncode:
                pytest.skip(f"`ip {' '.join(step)}` is not possible here: {done.stderr.strip()}")
        script = tmp_path_factory.mktemp("shell") / "shell"
        script.write_text(
            "#!/bin/bash\n"
            f'case "$1" in {FIRST}) host={names[0]};; {SECOND}) host={names[1]};; *) echo "no route to $1" >&2; exit 255;; esac\n'
            'exec env -i PATH="$PATH" HOME="$HOME" ip netns exec $host bash -c "$2"\n'
        )
        script.chmod(0o755)
        yield f"{script} {{host}} {{command}}"
    finally:
        for name in names:
            _ip("netns", "del", name)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    # Both hosts have this machine's name, which stands for the loopback.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    made: list[Launch] = []
    yield made
    for launch in made:
        launch.close()


def go(launches: list[Launch], tmp_path: Path, fault: dict[str, Any], shell: str, **options: Any) -> Launch:
    hosts = options.pop("hosts", [[FIRST, 1], [SECOND, 1]])
    launches.append(Launch(tmp_path / "run", fault, hosts=hosts, shell=shell, **options))
    return launches[-1]


def marks(launch: Launch) -> list[str]:
    """The marks of both hosts' launchers."""
    return [psutil.Process(pid).environ()[MARK_VARIABLE] for pid in launch.pids()]


def assert_all_gone(found: list[str]) -> None:
    end = time.monotonic() + 60
    while left := [pid for mark in found for pid in processes_with_mark(mark)]:
        assert time.monotonic() < end, f"still alive: {left}"
        time.sleep(0.1)


@pytest.mark.timeout(900)
def test_two_hosts_train_together(launches: list[Launch], tmp_path: Path, shell: str) -> None:
    stages = [f"curriculum.{i}.duration=3" for i in range(3)] + [f"curriculum.{i}.warmup=1" for i in range(3)]
    launch = go(launches, tmp_path, {}, shell, worker=["cadtrain", "train"], set=[*stages, "checkpoint.every=3"])
    outcome = launch.end()
    assert launch.process.returncode == 0, launch.said()
    assert outcome["num_ranks"] == 2
    run = launch.run
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "validation" not in line]
    assert steps == list(range(1, 10))
    manifest = json.loads((run / "checkpoints" / "step-00000009" / "manifest.json").read_text())
    assert manifest["world_size"] == 2


def test_secrets_reach_the_other_host_out_of_sight(
    launches: list[Launch], tmp_path: Path, shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_process_lists")
    launch = go(launches, tmp_path, {"kind": "wait"}, shell)
    for rank, pid in enumerate(launch.pids()):
        process = psutil.Process(pid)
        assert process.environ()["HF_TOKEN"] == "hf_not_for_process_lists", rank
        assert not any("hf_not_for" in word for each in [process, *process.parents()] for word in each.cmdline())


def test_a_rank_killed_on_the_other_host_ends_both(launches: list[Launch], tmp_path: Path, shell: str) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"}, shell)
    found, (_, second) = marks(launch), launch.pids()
    assert found[0] != found[1], "each host has a launcher of its own"
    os.kill(second, signal.SIGKILL)
    outcome = launch.end()
    assert launch.process.returncode == 137, launch.said()
    assert (outcome["failure"]["rank"], outcome["failure"]["type"]) == (1, "SIGKILL")
    assert_all_gone(found)


def test_a_signal_reaches_all_hosts(launches: list[Launch], tmp_path: Path, shell: str) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"}, shell)
    found = marks(launch)
    launch.process.terminate()
    outcome = launch.end()
    assert (launch.process.returncode, outcome["signal"], outcome["failure"]) == (143, signal.SIGTERM, None), launch.said()
    assert "SIGTERM: asking 2 hosts to save and leave" in launch.said()
    assert_all_gone(found)


def test_a_remote_shell_that_dies_ends_everything(launches: list[Launch], tmp_path: Path, shell: str) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"}, shell)
    found, (_, second) = marks(launch), launch.pids()
    node = psutil.Process(second).parent().parent()  # type: ignore[union-attr]
    assert node is not None
    assert "cadtrain.launch.node" in node.cmdline()
    node.kill()  # the stub's shell is this process, as `exec` makes it
    outcome = launch.end()
    assert (launch.process.returncode, outcome["failure"]["kind"]) == (4, "lost host"), launch.said()
    assert SECOND in outcome["failure"]["message"]
    assert_all_gone(found)


def test_killing_the_first_launcher_leaves_nothing_on_any_host(launches: list[Launch], tmp_path: Path, shell: str) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"}, shell)
    found = marks(launch)
    launch.process.kill()
    launch.process.wait(timeout=LIMIT)
    assert_all_gone(found)


def test_a_host_that_cannot_be_reached(launches: list[Launch], tmp_path: Path, shell: str) -> None:
    launch = go(launches, tmp_path, {"kind": "wait"}, shell, hosts=[[FIRST, 1], ["10.77.0.9", 1]])
    outcome = launch.end()
    assert (launch.process.returncode, outcome["failure"]["kind"]) == (4, "lost host"), launch.said()
    assert "10.77.0.9: its remote shell ended with code 255" in outcome["failure"]["message"]
    assert "no route to 10.77.0.9" in launch.said()
    wait_until(lambda: not any(psutil.pid_exists(int(path.read_text())) for path in launch.run.glob("pid_*")), 60)


def test_a_hang_across_hosts_is_named(launches: list[Launch], tmp_path: Path, shell: str) -> None:
    launch = go(launches, tmp_path, {"kind": "hang", "rank": 1}, shell, hang=25.0)
    found = marks(launch)
    outcome = launch.end()
    failure = outcome["failure"]
    assert (launch.process.returncode, failure["kind"], failure["rank"]) == (4, "hang", 1), launch.said()
    assert "rank 0: training, step 4, micro-step 1, last in language.layers.3; waits in all_reduce" in failure["message"]
    assert "lose_the_way" in (launch.run / "logs" / "rank_01.stacks.txt").read_text()
    assert_all_gone(found)
