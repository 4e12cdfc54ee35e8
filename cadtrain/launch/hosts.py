"""The hosts of a run, and the shell that starts its launcher on each."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cadtrain.errors import ConfigError, Fault, UsageError

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 {host} {command}"
SRUN = "srun --overlap --nodes=1 --ntasks=1 --nodelist={host} bash -c {command}"
PASSED_PREFIXES = (
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "HF_",
    "DS_",
    "DEEPSPEED_",
    "OMP_",
    "PYTORCH_",
    "PYTHON",
    "CADTRAIN_CACHE",
)
"""Variables of this process that the ranks of other hosts get, too: a remote shell passes on none by itself."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY")
_SLOTS = re.compile(r"slots=(\S*)")


@dataclass(frozen=True, slots=True)
class Host:
    """A host and how many ranks it takes."""

    name: str
    slots: int


@dataclass(frozen=True, slots=True)
class RemoteShell:
    """A command that runs another on a host: `{host}` and `{command}` stand for both."""

    template: str = SSH

    def __post_init__(self) -> None:
        """Raises `UsageError` where a placeholder is missing."""
        words = shlex.split(self.template)
        missing = [mark for mark in ("{host}", "{command}") if not any(mark in word for word in words)]
        if missing:
            raise UsageError(
                f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing in {self.template!r}.",
                where="--ssh-command",
                hint="For example: 'ssh -p 2222 {host} {command}'.",
            )

    def argv(self, host: str, command: str) -> list[str]:
        """What to execute here so that the shell command `command` runs on `host`."""
        return [word.replace("{host}", host).replace("{command}", command) for word in shlex.split(self.template)]


PLAIN_SSH = RemoteShell()


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts in a file of DeepSpeed's syntax: `host slots=N` a line, `#` begins a comment.

    Raises `UsageError` where it cannot be read and `ConfigError` with all its faults at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise UsageError(f"cannot be read: {reason}.", where=str(path), hint="Check --hostfile.") from error
    hosts: list[Host] = []
    faults: list[Fault] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        found = _host(words)
        if isinstance(found, Host) and found.name in lines:
            found = f"{found.name} stands in line {lines[found.name]} already."
        if isinstance(found, str):
            faults.append(Fault(f"{path}:{number}", found, "Write: host slots=N"))
        else:
            lines[found.name] = number
            hosts.append(found)
    if not hosts and not faults:
        faults.append(Fault(str(path), "names no host.", "Write a line for each: host slots=N"))
    if faults:
        raise ConfigError(faults, where=str(path))
    return tuple(hosts)


def _host(words: Sequence[str]) -> Host | str:
    """The host that a line names, or what is wrong with it."""
    name, rest = words[0], words[1:]
    if "=" in name or name.startswith("-"):
        return f"{name!r} is no host name."
    if not rest:
        return f"{name} has no number of slots."
    if len(rest) > 1:
        return f"{' '.join(rest[1:])!r} is not understood."
    match = _SLOTS.fullmatch(rest[0])
    if match is None:
        return f"{rest[0]!r} is not understood."
    if not match[1].isdecimal() or int(match[1]) < 1:
        return f"slots={match[1]} is no number of ranks above 0."
    return Host(name, int(match[1]))


def slurm_hosts(nodes: int, slots: int, environ: Mapping[str, str] = os.environ) -> tuple[Host, ...]:
    """The first `nodes` hosts of this SLURM job, `slots` ranks each. Raises `UsageError` outside a job or where it has fewer."""
    written = environ.get("SLURM_JOB_NODELIST")
    if not written:
        raise UsageError(
            "SLURM_JOB_NODELIST is not set: this is no SLURM job.",
            where="--nodes",
            hint="Run it inside a job (--sbatch prints a script), or name the hosts with --hostfile.",
        )
    names = expand_nodelist(written)
    if len(names) < nodes:
        raise UsageError(
            f"{nodes} nodes were asked for, this job has {len(names)} ({written}).",
            where="--nodes",
            hint=f"Use --nodes {len(names)}, or ask SLURM for more.",
        )
    return tuple(Host(name, slots) for name in names[:nodes])


def expand_nodelist(text: str) -> list[str]:
    """`n[01-03,7],login` -> `n01 n02 n03 n7 login`."""
    names = []
    for part in re.findall(r"[^,\[\]]*(?:\[[^\]]*\][^,\[\]]*)*(?:,|$)", text):
        word = part.rstrip(",")
        if word:
            names += _expand_word(word)
    return names


def _expand_word(word: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", word)
    if match is None:
        return [word]
    before, after = word[: match.start()], _expand_word(word[match.end() :]) if word[match.end() :] else [""]
    found = []
    for item in match[1].split(","):
        first, dash, last = item.partition("-")
        for number in range(int(first), int(last if dash else first) + 1):
            found += [f"{before}{number:0{len(first)}d}{rest}" for rest in after]
    return found


def passed_on(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that other hosts get on the command line, which everyone there can read: no secrets."""
    return {name: value for name, value in _prefixed(environ).items() if not _SECRET.search(name)}


def secrets(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that other hosts get out of sight."""
    return {name: value for name, value in _prefixed(environ).items() if _SECRET.search(name)}


def _prefixed(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(environ.items()) if name.startswith(PASSED_PREFIXES)}
