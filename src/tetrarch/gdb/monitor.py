"""What gdb's ``monitor`` asks, in the words of QEMU's."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from tetrarch.errors import TetrarchError

if TYPE_CHECKING:
    from tetrarch.machine.machine import Machine

__all__ = ["Monitor"]

# A reset waits for the vCPUs and loads the kernel again.
_RESET_LIMIT_S = 30.0
_RESET_LOOK_S = 0.01


class Monitor:
    """Answers in text. The machine is stopped meanwhile."""

    def __init__(self, machine: weakref.ref[Machine]) -> None:
        self._machine = machine

    def __call__(self, line: str, vcpu: int) -> str:
        words = line.split()
        machine = self._machine()
        if machine is None:
            return "the machine has ended\n"
        for name, (command, _) in _COMMANDS.items():
            if words == name.split():
                try:
                    return command(machine, vcpu)
                except TetrarchError as error:
                    return f"{error}\n"
        return f"unknown command: {line!r}; monitor help lists them\n"


def _help(machine: Machine, vcpu: int) -> str:
    return "".join(f"{name:16}{about}\n" for name, (_, about) in _COMMANDS.items())


def _registers(machine: Machine, vcpu: int) -> str:
    return machine.vcpu(vcpu).dump()


def _cpus(machine: Machine, vcpu: int) -> str:
    lines = (
        f"{'*' if view.number == vcpu else ' '} CPU #{view.number}: rip={view.regs['rip']:#018x}\n"
        for view in machine.vcpus
    )
    return "".join(lines)


def _status(machine: Machine, vcpu: int) -> str:
    return (
        f"{machine.config.name}: {machine.phase.value}, stopped by gdb; engine {machine.engine}, "
        f"up {machine.uptime:.1f} s\n"
    )


def _reset(machine: Machine, vcpu: int) -> str:
    """Returns when it is done: what gdb reads next is of the new life."""
    before = machine.resets
    machine.reset()
    deadline = time.monotonic() + _RESET_LIMIT_S
    while machine.resets == before and machine.running and time.monotonic() < deadline:
        time.sleep(_RESET_LOOK_S)
    if machine.resets == before:
        return "the machine is reset when it runs on\n"
    return "the machine is reset; maintenance flush register-cache shows it\n"


def _quit(machine: Machine, vcpu: int) -> str:
    machine.request_stop("by quit in gdb")
    return ""


_COMMANDS: dict[str, tuple[Callable[[Machine, int], str], str]] = {
    "help": (_help, "this list"),
    "info registers": (_registers, "registers of the thread, as a crash shows them"),
    "info cpus": (_cpus, "the virtual CPUs, and which one is the thread"),
    "info status": (_status, "the machine"),
    "reset": (_reset, "reset the machine; it stays stopped"),
    "system_reset": (_reset, "the same"),
    "quit": (_quit, "end the machine"),
}
