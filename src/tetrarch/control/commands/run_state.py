"""Whether the machine runs (QEMU, qapi/run-state.json and qapi/misc.json)."""

from __future__ import annotations

from typing import Any

from tetrarch.control.command import command
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.machine import Machine

__all__ = ["cont", "query_status", "stop", "system_powerdown", "system_reset"]

_RUN_STATES = {
    Phase.MADE: "prelaunch",
    Phase.RUNNING: "running",
    Phase.HELD: "paused",
    Phase.ENDED: "shutdown",
}


@command("query-status")
def query_status(vm: Machine) -> dict[str, Any]:
    phase = vm.phase
    return {"status": _RUN_STATES[phase], "running": phase is Phase.RUNNING}


@command("stop")
def stop(vm: Machine) -> None:
    """Nothing where it is stopped already."""
    if vm.phase is not Phase.HELD:
        vm.hold()


@command("cont")
def cont(vm: Machine) -> None:
    """Nothing where it runs."""
    if vm.phase is not Phase.RUNNING:
        vm.resume()


@command("system_powerdown")
def system_powerdown(vm: Machine) -> None:
    """Presses the power button: what comes of it is the guest's."""
    vm.press_power_button()


@command("system_reset")
def system_reset(vm: Machine) -> None:
    """Returns before the machine has started anew: that is the event RESET."""
    vm.reset()
