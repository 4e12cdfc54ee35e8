"""Whether a pretrained model can be had from the Hugging Face hub, told in seconds.

Without a network `huggingface_hub` tries for half a minute, file by file. So before the first download the hub is knocked at once: a plain
TCP connection to its endpoint, or to the proxy on the way there. What is in the cache needs no network and is never asked about.
"""

from __future__ import annotations

import errno
import os
import queue
import selectors
import socket
import threading
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from cadtrain.errors import EnvironmentFault

CONFIG_FILES = ("config.json",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

PATIENCE_SECONDS = 3.0
"""How long the hub may take to accept a connection, unless HF_HUB_ETAG_TIMEOUT says how slow the network is."""
_RESOLVE_AGAIN_SECONDS = 0.5
_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}

_Address = tuple[socket.AddressFamily, Any]
"""Family, and what `connect` takes."""


def is_at_hand(source: str, *files: str) -> bool:
    """Whether `source` is a local folder, or the hub's cache holds one of `files` of it."""
    if Path(source).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(source, file), str) for file in files)
    except HFValidationError:
        return False


def require(source: str, where: str, *files: str) -> None:
    """Raise `EnvironmentFault` at `where` if one of `files` of `source` would have to be downloaded and the hub cannot be reached.

    A name that no model of the hub can have is left to whoever opens it.
    """
    if is_at_hand(source, *files) or not _is_hub_name(source):
        return
    from huggingface_hub import constants

    missing = f"{source!r} is no folder here, and {constants.HF_HUB_CACHE} holds no {' or '.join(files[:2])} of it"
    if constants.HF_HUB_OFFLINE:
        raise EnvironmentFault(
            f"{missing}; HF_HUB_OFFLINE=1 forbids to download it.",
            where=where,
            hint="Give a local folder, set HF_HOME to a cache that holds it, or unset HF_HUB_OFFLINE.",
        )
    patience = float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE_SECONDS
    try:
        knock(constants.ENDPOINT, patience)
    except OSError as error:
        raise EnvironmentFault(
            f"{missing}; the hub cannot be reached to download it ({error}).",
            where=where,
            hint="Give a local folder, set HF_HOME to a cache that holds it (then HF_HUB_OFFLINE=1 keeps off the network), or mend the "
            "network: HTTPS_PROXY, HF_ENDPOINT; HF_HUB_ETAG_TIMEOUT=30 waits longer where it is slow.",
        ) from error


def _is_hub_name(source: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


@cache
def knock(endpoint: str, patience: float) -> None:
    """Raise `OSError`, whose text names the host, unless `endpoint` or the proxy before it accepts a connection within `patience` seconds.

    Once it did, it is not asked again by this process.
    """
    host, port = _first_hop(endpoint)
    deadline = time.monotonic() + patience
    try:
        _connect_to_any(_addresses(host, port, deadline), deadline)
    except TimeoutError as error:
        raise TimeoutError(f"no answer from {host}:{port} within {patience:g} s") from error
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror or error}") from error


def _first_hop(endpoint: str) -> tuple[str, int]:
    """Host and port that a request to `endpoint` connects to: its own, or those of the proxy that the environment names."""
    target = urlsplit(endpoint)
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return target.hostname or "", target.port or _PORTS.get(target.scheme, 443)


def _addresses(host: str, port: int, deadline: float) -> list[_Address]:
    """Family and address of `host`, asked for twice: looking names up has no time limit of its own, and fails in passing."""
    found: queue.SimpleQueue[list[_Address] | OSError] = queue.SimpleQueue()

    def look_up(tries: int = 2) -> None:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            if tries > 1:
                time.sleep(_RESOLVE_AGAIN_SECONDS)
                look_up(tries - 1)
            else:
                found.put(error)
        else:
            found.put([(row[0], row[4]) for row in rows])

    # A daemon: a resolver that hangs must not hold up the end of the process.
    threading.Thread(target=look_up, daemon=True).start()
    try:
        answer = found.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def _connect_to_any(addresses: list[_Address], deadline: float) -> None:
    """Return when one of the addresses accepts; all are tried at once, for one family may lead nowhere. Raises the last refusal, an `OSError`."""
    refusal = _os_error(errno.EHOSTUNREACH)
    with ExitStack() as at_end:
        waiting = at_end.enter_context(selectors.DefaultSelector())
        for family, address in addresses:
            try:
                caller = at_end.enter_context(socket.socket(family, socket.SOCK_STREAM))
            except OSError as error:  # a family that this host does not speak
                refusal = error
                continue
            caller.setblocking(False)
            code = caller.connect_ex(address)
            if code == 0:
                return
            if code == errno.EINPROGRESS:
                waiting.register(caller, selectors.EVENT_WRITE)
            else:
                refusal = _os_error(code)
        while waiting.get_map():
            ready = waiting.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                caller = cast(socket.socket, key.fileobj)
                code = caller.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    return
                refusal = _os_error(code)
                waiting.unregister(caller)
    raise refusal


def _os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
