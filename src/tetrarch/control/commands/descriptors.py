"""Files that a client has opened for the machine (QEMU, qapi/misc.json)."""

from __future__ import annotations

import os
from typing import Any

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError

__all__ = ["add_fd", "closefd", "getfd", "query_fdsets", "remove_fd"]


@command("getfd")
def getfd(monitor: Monitor, fdname: str) -> None:
    """Names a file descriptor that the client has sent."""
    monitor.descriptors.name(fdname)


@command("closefd")
def closefd(monitor: Monitor, fdname: str) -> None:
    os.close(monitor.descriptors.pop(fdname))


@command("add-fd")
def add_fd(
    monitor: Monitor, fdset_id: int | None = None, opaque: str | None = None
) -> dict[str, int]:
    """Puts one into a set, which goes with the client. ``opaque`` is what it is called."""
    if fdset_id is not None and not 0 <= fdset_id < 1 << 63:
        raise QmpError("Parameter 'fdset-id' expects a number from 0 to 0x7fffffffffffffff")
    number, descriptor = monitor.descriptors.add(fdset_id, opaque)
    return {"fdset-id": number, "fd": descriptor}


@command("remove-fd")
def remove_fd(monitor: Monitor, fdset_id: int, fd: int | None = None) -> None:
    monitor.descriptors.remove(fdset_id, fd)


@command("query-fdsets")
def query_fdsets(monitor: Monitor) -> list[dict[str, Any]]:
    sets = monitor.descriptors.sets
    return [{"fdset-id": number, "fds": list(fds)} for number, fds in sorted(sets.items())]
