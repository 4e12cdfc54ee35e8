"""The hosts of a hostfile: reachable without a password, with the same versions, the same folder, and enough GPUs."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cadtrain.doctor.child import ChildResult, run_all
from cadtrain.doctor.finding import Finding, fail, ok, warn
from cadtrain.launch.environment import package_versions
from cadtrain.launch.hosts import Host, RemoteShell, passed_on


def check_hosts(
    hosts: Sequence[Host], shell: RemoteShell, run_folder: Path, *, has_gpu: bool, seconds: float = 60
) -> Iterator[Finding]:
    """Ask every host at once, through the shell that a launch would use; at most `seconds`."""
    existing = next(
        (path for path in (run_folder, *run_folder.absolute().parents) if path.is_dir()), Path("/")
    ).absolute()
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".cadtrain-doctor-") as token:
            commands = [shell.argv(host.name, _command(existing, Path(token.name).name)) for host in hosts]
            results = run_all(commands, [{}] * len(hosts), seconds=seconds, stop_early=False)
    except OSError as error:
        yield fail(
            "hosts",
            f"{existing}: {error.strerror or error}",
            "Give a --run-dir that you may write to, on a shared disk.",
        )
        return
    for host, result in zip(hosts, results, strict=True):
        yield _judge(host, result, existing, has_gpu=has_gpu)


def _command(folder: Path, token: str) -> str:
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in passed_on().items())
    words = shlex.join([sys.executable, "-m", "cadtrain.doctor.host_facts", str(folder), token])
    return f"cd {shlex.quote(os.getcwd())} && exec env {variables} {words}"


def _judge(host: Host, result: ChildResult, folder: Path, *, has_gpu: bool) -> Finding:
    name = f"host {host.name}"
    line = next((row for row in result.stdout.splitlines() if row.startswith("facts ")), None)
    if line is None:
        return fail(
            name,
            f"runs no command: {result.reason()}",
            f"Make `ssh {host.name} true` work without a password (ssh-copy-id), with {sys.executable} under the same path; "
            "or give another --ssh-command.",
        )
    facts: dict[str, Any] = json.loads(line.removeprefix("facts "))
    if not facts["sees_folder"]:
        return fail(
            name, f"does not see what is written into {folder} here", "Give a --run-dir on a disk that all hosts share."
        )
    if not facts["may_write"]:
        return fail(name, f"may not write into {folder}", "Use the same user on all hosts, or another --run-dir.")
    if has_gpu and facts["gpus"] < host.slots:
        return fail(
            name, f"{facts['gpus']} visible GPUs for {host.slots} slots", f"Write {host.name} slots={facts['gpus']}"
        )
    own = {"python": platform.python_version(), **package_versions()}
    others = [
        f"{package} {version} (here {own.get(package)})"
        for package, version in facts["versions"].items()
        if own.get(package) != version
    ]
    if others:
        return warn(name, f"other versions: {', '.join(others)}", "Install the same versions on all hosts.")
    return ok(name, f"answers in {result.seconds:.1f} s, shares {folder}, same versions, {facts['gpus']} GPUs")
