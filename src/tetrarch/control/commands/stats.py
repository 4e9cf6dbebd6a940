"""Counters. QEMU's query-stats has another form, so the command is named as one of our own."""

from __future__ import annotations

from typing import Any

from tetrarch.control.command import command
from tetrarch.control.commands.run_state import query_status
from tetrarch.machine.machine import Machine

__all__ = ["stats"]


@command("x-stats")
def stats(vm: Machine) -> dict[str, Any]:
    return {
        "status": query_status(vm)["status"],
        "engine": vm.engine,
        "uptime_s": round(vm.uptime, 6),
        "resets": vm.resets,
        "stats": vm.stats(),
    }
