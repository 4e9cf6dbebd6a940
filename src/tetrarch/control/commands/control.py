"""The monitor itself (QEMU, qapi/control.json)."""

from __future__ import annotations

from typing import Any

from tetrarch.control.command import COMMANDS, command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import version
from tetrarch.machine.status import BY_QUIT

__all__ = ["query_commands", "query_version", "quit_"]


@command("query-version")
def query_version(monitor: Monitor) -> dict[str, Any]:
    return version()


@command("query-commands")
def query_commands(monitor: Monitor) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted(COMMANDS)]


@command("quit")
def quit_(monitor: Monitor) -> None:
    """Ends the machine at once; its answer may be the last thing that a client gets."""
    monitor.machine.request_stop(BY_QUIT)
