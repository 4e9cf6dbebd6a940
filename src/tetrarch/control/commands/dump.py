"""Guest memory in a file (QEMU, qapi/dump.json and qapi/misc.json)."""

from __future__ import annotations

import os
from typing import Literal

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError

__all__ = ["closefd", "dump_guest_memory", "getfd"]


@command("getfd")
def getfd(monitor: Monitor, fdname: str) -> None:
    """Names a file descriptor that the client has sent."""
    monitor.descriptors.name(fdname)


@command("closefd")
def closefd(monitor: Monitor, fdname: str) -> None:
    os.close(monitor.descriptors.pop(fdname))


@command("dump-guest-memory")
def dump_guest_memory(
    monitor: Monitor,
    protocol: str,
    paging: bool = False,
    detach: bool = False,
    begin: int | None = None,
    length: int | None = None,
    format: Literal["elf"] = "elf",  # noqa: A002
) -> None:
    """An ELF core file, at ``file:PATH`` or in the descriptor ``fd:NAME``."""
    if paging or detach:
        name = "paging" if paging else "detach"
        raise QmpError(f"Parameter '{name}' can only be false")
    if (begin is None) != (length is None):
        name = "begin" if begin is None else "length"
        raise QmpError(f"Parameter '{name}' is missing")
    if begin is not None and length is not None and (begin < 0 or length <= 0):
        raise QmpError("Parameter 'length' expects an address and a number of bytes")
    kind, _, name = protocol.partition(":")
    if kind == "file" and name:
        monitor.machine.dump_core(name, begin=begin, length=length)
    elif kind == "fd" and name:
        with os.fdopen(monitor.descriptors.pop(name), "wb") as file:
            monitor.machine.dump_core(file, begin=begin, length=length)
    else:
        raise QmpError("Parameter 'protocol' expects 'file:PATH' or 'fd:NAME'")
