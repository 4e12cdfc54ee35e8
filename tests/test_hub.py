"""A hub that cannot be reached is told within seconds, and a slow way to it is not taken for none."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from cadtrain import hub
from cadtrain.cli.app import app
from cadtrain.config.sections import ImageEncoderConfig, LanguageModelConfig, ModelConfig
from cadtrain.doctor.finding import Verdict
from cadtrain.doctor.preflight import check_pretrained
from cadtrain.errors import EnvironmentFault

COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, no proxy, no memory of earlier knocks, and an endpoint where nobody listens."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    knock = hub.knock
    knock.cache_clear()
    yield
    knock.cache_clear()


def unused_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def endpoint_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def full_queue() -> Iterator[tuple[str, int]]:
    """An address of this host that takes no more connections and refuses none: its queue is full."""
    with ExitStack() as at_end:
        server = at_end.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            caller = at_end.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(server.getsockname())
        time.sleep(0.05)
        host, port = server.getsockname()
        yield host, port


def cache_file(cache: Path, name: str) -> None:
    """`org/model` with the file in the cache, as the hub's library lays it out."""
    model = cache / "models--org--model"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "snapshots" / COMMIT).mkdir(parents=True, exist_ok=True)
    (model / "snapshots" / COMMIT / name).write_text("{}")


def test_nobody_at_the_endpoint_is_told_with_the_model_and_the_way_out() -> None:
    start = time.monotonic()
    with pytest.raises(EnvironmentFault) as caught:
        hub.require("org/model", "model.language.pretrained", *hub.CONFIG_FILES)
    assert time.monotonic() - start < 1
    fault = caught.value
    assert fault.where == "model.language.pretrained"
    assert "'org/model' is no folder here" in fault.message
    assert "holds no config.json of it; the hub cannot be reached to download it (127.0.0.1:" in fault.message
    assert "Connection refused" in fault.message
    assert fault.hint is not None
    assert all(word in fault.hint for word in ("local folder", "HF_HOME", "HF_HUB_OFFLINE=1"))


def test_what_is_at_hand_is_never_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "knock", lambda *arguments: pytest.fail("the hub was asked"))
    cache_file(tmp_path / "hub", "config.json")
    hub.require("org/model", "here", *hub.CONFIG_FILES)
    hub.require(str(tmp_path), "here", *hub.WEIGHT_FILES)
    hub.require(str(tmp_path / "no" / "such" / "folder"), "here", *hub.CONFIG_FILES)  # whoever opens it says so


def test_weights_are_missing_although_the_configuration_is_there(tmp_path: Path) -> None:
    cache_file(tmp_path / "hub", "config.json")
    cache_file(tmp_path / "hub", "tokenizer.json")
    model = ModelConfig(language=LanguageModelConfig(pretrained="org/model"), image=None, point=None)
    (finding,) = check_pretrained(model)
    assert finding.verdict is Verdict.FAIL
    assert "no model.safetensors or model.safetensors.index.json of it" in finding.evidence
    assert not finding.evidence.endswith(".")  # whoever shows it ends the sentence
    assert next(check_pretrained(model, is_elsewhere=True)).verdict is Verdict.WARN
    cache_file(tmp_path / "hub", "model.safetensors")
    assert list(check_pretrained(model)) == []
    seeing = model.model_copy(update={"image": ImageEncoderConfig(pretrained="org/eyes")})
    assert [finding.name for finding in check_pretrained(seeing)] == ["model.image.pretrained"]


def test_offline_by_wish_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "knock", lambda *arguments: pytest.fail("the hub was asked"))
    with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE=1 forbids"):
        hub.require("org/model", "here", *hub.CONFIG_FILES)


def test_a_hub_that_answers_is_asked_once(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint_of(listener))
    hub.require("org/model", "here", *hub.CONFIG_FILES)
    listener.close()
    hub.require("org/other", "here", *hub.CONFIG_FILES)


def test_a_proxy_is_asked_in_the_hubs_place(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("https_proxy", endpoint_of(listener))
    hub.require("org/model", "here", *hub.CONFIG_FILES)
    hub.knock.cache_clear()
    monkeypatch.setenv("no_proxy", "hub.invalid")
    with pytest.raises(EnvironmentFault, match=r"hub\.invalid:443: "):
        hub.require("org/model", "here", *hub.CONFIG_FILES)


def test_one_address_that_leads_nowhere_does_not_hide_another(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    with full_queue() as silent:
        rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in (silent, ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: rows)
        hub.knock("http://two.invalid", 1.0)


def test_silence_ends_when_patience_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with full_queue() as silent:
        start = time.monotonic()
        with pytest.raises(OSError, match=rf"no answer from 127\.0\.0\.1:{silent[1]} within 0\.3 s"):
            hub.knock(f"http://127.0.0.1:{silent[1]}", 0.3)
        assert 0.25 < time.monotonic() - start < 2


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(2) or [])
    start = time.monotonic()
    with pytest.raises(OSError, match=r"no answer from slow\.invalid:80"):
        hub.knock("http://slow.invalid", 0.3)
    assert time.monotonic() - start < 1


def test_a_resolver_that_fails_once_is_asked_again(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    plain, calls = socket.getaddrinfo, []

    def moody(host: str, *arguments: Any, **options: Any) -> Any:
        calls.append(host)
        if len(calls) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return plain("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", moody)
    hub.knock(f"http://moody.invalid:{listener.getsockname()[1]}", 3.0)
    assert len(calls) == 2


def test_a_slow_network_is_waited_for_as_long_as_the_hubs_own_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(hub, "knock", lambda endpoint, patience: asked.append(patience))
    hub.require("org/model", "here", *hub.CONFIG_FILES)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 30)
    hub.require("org/model", "here", *hub.CONFIG_FILES)
    assert asked == [3.0, 30.0]


def test_launch_and_plan_end_before_they_begin(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "model:\n  language: {pretrained: org/model}\n"
        "curriculum:\n  - {name: text, duration: 1 step, modalities: {text: 1.0}}\nbatch: {global_batch_size: 4}\n"
    )
    for command in (["launch", "--run-dir", str(tmp_path / "made")], ["plan", "--gpus", "2", "--gpu-memory", "80GB"]):
        result = CliRunner().invoke(app, [command[0], str(run), *command[1:]])
        text = str(result.exception) + result.output
        assert isinstance(result.exception, EnvironmentFault), text
        assert "org/model" in text
        assert "cannot be reached" in text
    assert not (tmp_path / "made").exists()
