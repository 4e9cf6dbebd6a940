"""Whether the machine runs (QEMU, qapi/run-state.json and qapi/misc.json)."""

from __future__ import annotations

from typing import Any

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError
from tetrarch.machine.lifecycle import Phase

__all__ = [
    "cont",
    "query_status",
    "stop",
    "system_powerdown",
    "system_reset",
    "system_wakeup",
]

_RUN_STATES = {
    Phase.MADE: "prelaunch",
    Phase.RUNNING: "running",
    Phase.PAUSED: "paused",
    Phase.ENDED: "shutdown",
}


@command("query-status")
def query_status(monitor: Monitor) -> dict[str, Any]:
    phase = monitor.machine.phase
    return {"status": _RUN_STATES[phase], "running": phase is Phase.RUNNING}


@command("stop")
def stop(monitor: Monitor) -> None:
    """Nothing where it is stopped already."""
    if monitor.machine.phase is not Phase.PAUSED:
        monitor.machine.pause()


@command("cont")
def cont(monitor: Monitor) -> None:
    """Nothing where it runs."""
    if monitor.machine.dumps.active:
        raise QmpError("There is a dump in process, please wait.")
    if monitor.machine.phase is not Phase.RUNNING:
        monitor.machine.resume()


@command("system_powerdown")
def system_powerdown(monitor: Monitor) -> None:
    """Presses the power button: what comes of it is the guest's."""
    monitor.machine.press_power_button()


@command("system_reset")
def system_reset(monitor: Monitor) -> None:
    """Returns before the machine has started anew: that is the event RESET."""
    monitor.machine.reset()


@command("system_wakeup")
def system_wakeup(monitor: Monitor) -> None:
    """The machine has no state of sleep that it could be woken from."""
    raise QmpError("Unable to wake up: guest is not in suspended state")
