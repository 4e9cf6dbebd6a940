"""Counters. QEMU's query-stats has another form, so the command is named as one of our own."""

from __future__ import annotations

from typing import Any

from tetrarch.control.command import command
from tetrarch.control.commands.run_state import query_status
from tetrarch.control.monitor import Monitor

__all__ = ["stats"]


@command("x-stats")
def stats(monitor: Monitor) -> dict[str, Any]:
    return {
        "status": query_status(monitor)["status"],
        "engine": monitor.machine.engine,
        "uptime_s": round(monitor.machine.uptime, 6),
        "resets": monitor.machine.resets,
        "stats": monitor.machine.stats(),
    }
