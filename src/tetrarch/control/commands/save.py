"""The machine in a file (docs/snapshots.md); QEMU has such commands for disks alone."""

from __future__ import annotations

import os

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError

__all__ = ["save"]


@command("x-save")
def save(monitor: Monitor, protocol: str) -> None:
    """To ``file:PATH``, or into the empty file ``fd:NAME`` that ``getfd`` has named."""
    kind, _, name = protocol.partition(":")
    if kind == "file" and name:
        monitor.machine.save(name)
    elif kind == "fd" and name:
        with os.fdopen(monitor.descriptors.pop(name), "wb", buffering=1 << 20) as file:
            monitor.machine.save(file)
    else:
        raise QmpError("Parameter 'protocol' expects 'file:PATH' or 'fd:NAME'")
