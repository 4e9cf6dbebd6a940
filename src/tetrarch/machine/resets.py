"""The machine that starts anew where its guest or the host resets it.

As a warm reset of a PC: devices, interrupt controllers, timers and vCPUs are as after
power-on, RAM keeps what is in it, and what firmware and boot loader would do is done again:
ACPI tables, kernel, initrd and start state are loaded over it. The machine's clock goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from tetrarch._native import EngineError
from tetrarch.errors import HostError, MachineStateError
from tetrarch.machine.attached import AttachedDevices
from tetrarch.machine.conclusion import Conclusion, Event, HostReset, Posted
from tetrarch.machine.console_line import ConsoleLines
from tetrarch.machine.engine_errors import engine_cause, engine_mend
from tetrarch.machine.engine_vm import EngineVm
from tetrarch.machine.events import Events
from tetrarch.machine.lifecycle import LifeCycle, Phase
from tetrarch.machine.panic import PanicWatch
from tetrarch.machine.pc import Pc
from tetrarch.machine.status import ExitStatus, StopReason
from tetrarch.machine.threads import VcpuThreads

__all__ = ["Resets"]


class Resets:
    """Survives resets of one machine, if it may. Called on the keeper's thread."""

    def __init__(
        self,
        restart: bool,
        life: LifeCycle,
        conclusion: Conclusion,
        panic: PanicWatch,
        lines: ConsoleLines,
        threads: VcpuThreads,
        vm: EngineVm,
        pc: Pc,
        attached: AttachedDevices,
        events: Events,
    ) -> None:
        """``restart``: also where the guest does it; else that ends the machine."""
        self._restart = restart
        self._life = life
        self._conclusion = conclusion
        self._panic = panic
        self._lines = lines
        self._threads = threads
        self._vm = vm
        self._pc = pc
        self._attached = attached
        self._events = events
        self._waiting: Posted | None = None
        self.count = 0
        self.lock = threading.Lock()
        """Held for a whole reset, and where somebody holds or resumes the machine."""
        self.load: Callable[[], None] | None = None
        """Loads the guest again; None: there is none to load, a reset is the end."""
        vm.keep_reset_state()

    def request(self) -> None:
        """Resets the machine; returns at once."""
        if self.load is None:
            raise MachineStateError(
                "a restored machine cannot be reset: it has no kernel to load",
                mend="restore it again",
            )
        self._conclusion.post(HostReset())

    def survive(self, event: Posted) -> Event | None:
        """None where the machine runs on after ``event``, else what ends it."""
        by_guest = not isinstance(event, HostReset)
        if not isinstance(event, HostReset) and not self._restarts(event):
            return event
        with self.lock:
            if self._life.phase is Phase.PAUSED:
                # Who holds it is to find it as it was.
                self._waiting = event
                return None
            self._threads.stop()
            self._lines.flush()
            self._panic.forget()
            # What else the guest did in its last moment went down with it; what the host
            # wants still holds.
            if (ended := self._conclusion.reopen()) is not None:
                return ended
            self._reset()
            self.count += 1
            self._threads.start()
            reason = "guest-reset" if by_guest else "host-qmp-system-reset"
            self._events.tell("reset", guest=by_guest, reason=reason)
        return None

    def _restarts(self, event: Event) -> bool:
        return (
            self._restart
            and self.load is not None
            and isinstance(event, ExitStatus)
            and event.reason is StopReason.RESET
        )

    def resumed(self) -> None:
        """The machine runs again, and with it a reset that waited. ``lock`` is held."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._conclusion.post(waiting)

    def _reset(self) -> None:
        try:
            self._vm.hold()
            try:
                # First the devices: their lines are low when the controllers forget them.
                self._pc.reset()
                self._attached.reset()
                self._vm.reset()
                if self.load is not None:  # nothing asks for a reset without
                    self.load()
            finally:
                self._vm.resume()
        except EngineError as error:
            raise HostError(
                f"the machine cannot be reset: {engine_cause(error)}",
                mend=engine_mend(error, "run it with --on-reset end"),
            ) from error
