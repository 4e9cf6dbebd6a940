"""What a machine on VMware's platform shares with its guest; QEMU has nothing of the kind."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor

__all__ = ["guestinfo", "guestinfo_set", "tools", "tools_ask", "tools_resolution"]


@command("x-guestinfo")
def guestinfo(monitor: Monitor) -> dict[str, str]:
    return dict(monitor.machine.guestinfo)


@command("x-guestinfo-set")
def guestinfo_set(monitor: Monitor, name: str, value: str) -> None:
    """An empty value takes it out."""
    monitor.machine.guestinfo[name] = value


@command("x-tools")
def tools(monitor: Monitor) -> dict[str, Any]:
    return asdict(monitor.machine.tools.status)


@command("x-tools-ask")
def tools_ask(
    monitor: Monitor, what: Literal["halt", "reboot", "synchronize-time"], timeout: float = 30
) -> None:
    """Returns when the tools have said that they will."""
    service = monitor.machine.tools
    ask = {
        "halt": service.halt,
        "reboot": service.reboot,
        "synchronize-time": service.synchronize_time,
    }
    ask[what](timeout)


@command("x-tools-resolution")
def tools_resolution(monitor: Monitor, width: int, height: int, timeout: float = 30) -> None:
    monitor.machine.tools.set_resolution(width, height, timeout)
