"""The hosts of a hostfile, asked through a stub of a remote shell."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cadtrain.doctor.finding import Finding, Verdict
from cadtrain.doctor.hosts import check_hosts
from cadtrain.launch.hosts import Host, RemoteShell

ROOT = Path(__file__).resolve().parents[2]


def ask(body: str, tmp_path: Path, *, slots: int = 1, has_gpu: bool = False) -> Finding:
    shell = tmp_path / "shell"
    shell.write_text(f"#!/bin/bash\n{body}\n")
    shell.chmod(0o755)
    (finding,) = check_hosts([Host("far", slots)], RemoteShell(f"{shell} {{host}} {{command}}"), tmp_path / "runs", has_gpu=has_gpu)
    return finding


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_a_good_host(tmp_path: Path) -> None:
    finding = ask('exec env -i PATH="$PATH" bash -c "$2"', tmp_path)
    assert finding.verdict is Verdict.OK, finding
    assert f"shares {tmp_path}, same versions, 0 GPUs" in finding.evidence


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo 'Permission denied (publickey).' >&2; exit 255", "runs no command: Permission denied (publickey)."),
        ("""exec bash -c "${2/host_facts \\/*/host_facts \\/nowhere token}" """, "does not see what is written into"),
    ],
)
def test_a_host_that_is_no_use(tmp_path: Path, body: str, words: str) -> None:
    finding = ask(body, tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert words in finding.evidence
    assert finding.remedy


def test_too_few_gpus(tmp_path: Path) -> None:
    finding = ask('exec bash -c "$2"', tmp_path, slots=4, has_gpu=True)
    assert (finding.verdict, finding.evidence) == (Verdict.FAIL, "0 visible GPUs for 4 slots")


def test_other_versions(tmp_path: Path) -> None:
    facts = '{"sees_folder": true, "may_write": true, "gpus": 4, "versions": {"torch": "1.0"}}'
    finding = ask(f"echo 'facts {facts}'", tmp_path)
    assert finding.verdict is Verdict.WARN
    assert "torch 1.0 (here 2." in finding.evidence
