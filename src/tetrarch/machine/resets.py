"""The machine that starts anew where its guest resets it.

As a warm reset of a PC: devices, interrupt controllers, timers and vCPUs are as after
power-on, RAM keeps what is in it, and what firmware and boot loader would do is done again:
ACPI tables, kernel, initrd and start state are loaded over it. The machine's clock goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from tetrarch._native import EngineError
from tetrarch.errors import HostError
from tetrarch.machine.attached import AttachedDevices
from tetrarch.machine.conclusion import Conclusion, Event
from tetrarch.machine.console_line import ConsoleLines
from tetrarch.machine.engine_vm import EngineVm, engine_cause, engine_mend
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
    ) -> None:
        self._restart = restart
        self._life = life
        self._conclusion = conclusion
        self._panic = panic
        self._lines = lines
        self._threads = threads
        self._vm = vm
        self._pc = pc
        self._attached = attached
        self._waiting: Event | None = None
        self.count = 0
        self.lock = threading.Lock()
        """Held for a whole reset, and where somebody holds or resumes the machine."""
        self.load: Callable[[], None] | None = None
        """Loads the guest again; None: there is none to load, a reset is the end."""
        if restart:
            vm.keep_reset_state()

    def survive(self, event: Event) -> Event | None:
        """None where the machine runs on after ``event``, else what ends it."""
        if not self._restart or self.load is None:
            return event
        if not isinstance(event, ExitStatus) or event.reason is not StopReason.RESET:
            return event
        with self.lock:
            if self._life.phase is Phase.HELD:
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
            self._reset(self.load)
            self.count += 1
            self._threads.start()
        return None

    def resumed(self) -> None:
        """The machine runs again, and with it a reset that waited. ``lock`` is held."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._conclusion.post(waiting)

    def _reset(self, load: Callable[[], None]) -> None:
        try:
            self._vm.hold()
            try:
                # First the devices: their lines are low when the controllers forget them.
                self._pc.reset()
                self._attached.reset()
                self._vm.reset()
                load()
            finally:
                self._vm.resume()
        except EngineError as error:
            raise HostError(
                f"the machine cannot be reset: {engine_cause(error)}",
                mend=engine_mend(error, "run it with --on-reset end"),
            ) from error
