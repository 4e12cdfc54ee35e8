"""`cadtrain launch` with `fault_worker` for its ranks and short waits: `python -m tests.launch.drive RUN OPTIONS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from cadtrain.cli.launch import _outcome_json, _show_outcome
from cadtrain.launch.hang import HangLimit
from cadtrain.launch.hosts import SSH, Host, RemoteShell
from cadtrain.launch.planning import LaunchRequest, plan_launch
from cadtrain.launch.restart import RestartPolicy
from cadtrain.launch.start import start
from cadtrain.launch.supervise import GracePeriods
from cadtrain.ui.console import err, print_json


def main(run_dir: Path, options: str) -> None:
    """Start, show, and end with the launch's exit code."""
    given = json.loads(options)
    hosts = tuple(Host(name, slots) for name, slots in given.get("hosts", []))
    shell = RemoteShell(given.get("shell", SSH))
    worker = tuple(given.get("worker", ["tests.launch.fault_worker"]))
    request = LaunchRequest(gpus=2, run_dir=run_dir, hosts=hosts, shell=shell, overrides=tuple(given.get("set", [])))
    plan = plan_launch(request, worker=worker)
    outcome = start(
        plan,
        announce=lambda text: err().print(text, markup=False, soft_wrap=True),
        grace=GracePeriods(stop=5.0, failure=1.0),
        hang=HangLimit(given.get("hang", 0.0)),
        restarts=RestartPolicy(given.get("restarts", 0), first_wait_seconds=given.get("wait", 0.1)),
        stdout=2,
    )
    _show_outcome(plan, outcome)
    print_json(_outcome_json(plan, outcome))
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    typer.run(main)
