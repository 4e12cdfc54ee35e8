"""Names and ports that ranks need to find each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import psutil

from cadtrain.doctor.finding import Finding, fail, ok, warn
from cadtrain.launch.planning import free_port


def check_host_name(name: str | None = None) -> Iterator[Finding]:
    """This host's own name: gloo and NCCL look it up to tell their peers where they are."""
    own = name or socket.gethostname()
    try:
        addresses = sorted({str(row[4][0]) for row in socket.getaddrinfo(own, None)})
    except OSError as error:
        yield warn(
            "host name",
            f"{own} cannot be resolved: {error.strerror or error}",
            f"Add a line to /etc/hosts: 127.0.1.1 {own} (or: export GLOO_SOCKET_IFNAME=lo)",
        )
        return
    yield ok("host name", f"{own} is {', '.join(addresses)}")


def check_port(port: int | None) -> Iterator[Finding]:
    """The port over which ranks meet: the one named, else MASTER_PORT, else that any is free."""
    named = port if port is not None else _from_environment()
    if named is None:
        try:
            yield ok("port", f"free ones can be had, e.g. {free_port()}; launch takes one by itself")
        except OSError as error:
            yield fail("port", f"none can be had: {error.strerror or error}", "ip link set lo up")
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            # As torch's store binds: without it, connections of a run that has just ended would count.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", named))
            listener.listen()
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        yield fail(
            "port", f"{named}: {reason}{_holder(named)}", f"End what holds it, or take another: --port {free_port()}"
        )
        return
    yield ok("port", f"{named} is free")


def _from_environment() -> int | None:
    value = os.environ.get("MASTER_PORT", "")
    return int(value) if value.isdecimal() else None


def _holder(port: int) -> str:
    """` (held by python, process 12)` where this user may see it."""
    try:
        rows = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for row in rows:
        if row.status == psutil.CONN_LISTEN and row.laddr and row.laddr.port == port and row.pid:
            try:
                return f" (held by {psutil.Process(row.pid).name()}, process {row.pid})"
            except psutil.Error:
                return f" (held by process {row.pid})"
    return ""
