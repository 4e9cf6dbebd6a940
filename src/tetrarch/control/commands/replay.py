"""The way through a recording (QEMU, qapi/replay.json)."""

from __future__ import annotations

from typing import Any

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError

__all__ = ["query_replay", "replay_seek"]


@command("query-replay")
def query_replay(monitor: Monitor) -> dict[str, Any]:
    """Of a machine that replays its count too, exact while it is paused."""
    config = monitor.machine.config
    if config.record is not None:
        return {"mode": "record", "filename": str(config.record), "icount": 0}
    if config.replay is None:
        return {"mode": "none", "icount": 0}
    count = monitor.machine.replay.count
    return {"mode": "play", "filename": str(config.replay), "icount": count}


@command("replay-seek")
def replay_seek(monitor: Monitor, icount: int) -> None:
    """Returns when the machine is there, or at the recording's end, and paused."""
    try:
        monitor.machine.replay.goto(icount)
    except ValueError as error:
        raise QmpError(str(error)) from None
