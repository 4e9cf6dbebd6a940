"""Breakpoints and watchpoints of a client, which go with it. QEMU has none but gdb's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError
from tetrarch.errors import MachineStateError
from tetrarch.machine.breakpoints import Hit

__all__ = ["breakpoint_add", "breakpoint_del"]


@command("x-breakpoint-add")
def breakpoint_add(
    monitor: Monitor,
    id_: str,
    address: int,
    kind: Literal["execute", "write", "access"] = "execute",
    length: int = 1,
    hardware: bool = False,
    cpu_index: int = 0,
) -> None:
    """At each hit the machine is paused, and X_BREAKPOINT tells of it."""
    machine = monitor.machine
    if id_ in monitor.points:
        raise QmpError(f"Duplicate ID '{id_}' for breakpoint")
    if not 0 <= address < 1 << 64:
        raise QmpError("Parameter 'address' expects an address")
    if cpu_index not in machine.pc.vcpus.numbers:
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    listener = _pausing(monitor, id_)
    if kind == "execute":
        point = machine.breakpoint(address, listener, hardware=hardware, vcpu=cpu_index)
    elif length in (1, 2, 4, 8) and address % length == 0:
        point = machine.watchpoint(address, length, listener, access=kind)
    else:
        raise QmpError("Parameter 'length' expects 1, 2, 4 or 8, of which 'address' is a multiple")
    monitor.points[id_] = point


@command("x-breakpoint-del")
def breakpoint_del(monitor: Monitor, id_: str) -> None:
    if id_ not in monitor.points:
        raise QmpError(f"Breakpoint '{id_}' not found", "DeviceNotFound")
    monitor.points.pop(id_).remove()


def _pausing(monitor: Monitor, name: str) -> Callable[[Hit], None]:
    # Not the machine itself: one that its user forgot is to be collected.
    known, tell = weakref.ref(monitor.machine), monitor.tell

    def met(hit: Hit) -> None:
        if (machine := known()) is not None:
            with suppress(MachineStateError):  # it is paused, or has ended
                machine.pause()
            tell("x-breakpoint", {"id": name, "cpu-index": hit.vcpu.number})

    return met
