"""How a machine is taken down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tetrarch.console import ConsoleBackend, MemoryConsole
from tetrarch.machine.attached import AttachedDevices
from tetrarch.machine.breakpoints import Breakpoints
from tetrarch.machine.conclusion import Event
from tetrarch.machine.console_line import ConsoleLines
from tetrarch.machine.engine_vm import EngineVcpu
from tetrarch.machine.events import Events, shutdown_data
from tetrarch.machine.lifecycle import LifeCycle
from tetrarch.machine.panic import PanicWatch
from tetrarch.machine.pc import Pc
from tetrarch.machine.status import ExitStatus, StopReason
from tetrarch.machine.threads import VcpuThreads

if TYPE_CHECKING:
    from tetrarch.control.server import ControlServer
    from tetrarch.gdb.server import GdbServer
    from tetrarch.vnc.server import VncServer

__all__ = ["Descent"]


@dataclass(frozen=True)
class Descent:
    """The order in which a machine is taken down. Runs on the keeper's thread."""

    life: LifeCycle
    panic: PanicWatch
    threads: VcpuThreads
    pc: Pc
    attached: AttachedDevices
    lines: ConsoleLines
    consoles: Sequence[ConsoleBackend]
    boot_vcpu: EngineVcpu
    events: Events
    controls: Sequence[ControlServer]
    gdb: Sequence[GdbServer]
    displays: Sequence[VncServer]
    breakpoints: Breakpoints
    end_recording: Callable[[], None]

    def stop(self, event: Event) -> Event:
        self.events.tell("shutdown", **shutdown_data(event))
        self.panic.close()
        try:
            self.threads.stop()
            self.end_recording()
        finally:
            self.pc.close()
            try:
                self.attached.close()
            finally:
                failure = self.lines.end()
        if failure is not None and isinstance(event, ExitStatus):
            return failure  # the last of what a guest says counts, whatever it did then
        if isinstance(event, ExitStatus) and event.reason is StopReason.CRASHED:
            # A panic is seen from outside: registers can be read only after the stop.
            return replace(event, dump=event.dump or self.boot_vcpu.dump())
        return event

    def close(self, event: Event) -> None:
        self.life.end()
        for console in self.consoles:
            if isinstance(console, MemoryConsole):
                console.end(event)
            console.close()
        self.events.end()
        for control in self.controls:
            control.close()
        for display in self.displays:
            display.close()
        self.breakpoints.close()
        for gdb in self.gdb:
            gdb.close(event.code if isinstance(event, ExitStatus) else 1)
