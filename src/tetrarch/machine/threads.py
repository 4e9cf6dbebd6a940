"""The threads of a machine's vCPUs.

Each vCPU runs on a thread of its own, which enters Python only for a device
that is written in Python.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tetrarch._native import EngineError
from tetrarch.errors import HostError
from tetrarch.machine.conclusion import Conclusion
from tetrarch.machine.status import ExitStatus, StopReason

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVcpu, EngineVm

__all__ = ["VcpuThreads", "busy_time"]

# A request to stop reaches a vCPU that runs; one that is about to run is asked again.
_STOP_RETRY_S = 0.02
# A vCPU that does not stop is inside a device written in Python that hangs.
_STOP_PATIENCE_S = 10.0
# Of a clock of the kernel's for one thread.
_CPUCLOCK_SCHED = 2
_CPUCLOCK_PERTHREAD = 4
# How long somebody who only looks waits for the vCPUs to come to rest.
_LOOK_PATIENCE_S = 2.0


class VcpuThreads:
    """Runs vCPUs until the machine's end is decided. Can be started again after a stop."""

    def __init__(
        self,
        vm: EngineVm,
        vcpus: Sequence[EngineVcpu],
        conclusion: Conclusion,
        there: Callable[[], Sequence[int]],
        halted: ExitStatus | None = None,
    ) -> None:
        """``there``: the numbers of those that are in the machine. ``halted`` is the status of a
        machine that halts for good, where that is no crash."""
        self._vm = vm
        self._vcpus = vcpus
        self._conclusion = conclusion
        self._there = there
        self._halted = halted
        # Guards what follows: whether there are threads, which, and which of them are to end.
        self._changed = threading.Condition()
        self._running = False
        self._threads: dict[int, threading.Thread] = {}
        self._leaving: set[int] = set()

    def start(self) -> None:
        with self._changed:
            self._running = True
        for number in self._there():
            self.start_one(number)

    def start_one(self, number: int) -> None:
        """Of a vCPU that has come into a machine; without effect while none runs."""
        vcpu = self._vcpus[number]
        with self._changed:
            if not self._running or number in self._threads:
                return
            vcpu.set_present(True)
            thread = threading.Thread(
                target=self._run, args=(number, vcpu), name=f"vcpu{number}", daemon=True
            )
            self._threads[number] = thread
            thread.start()

    def let_go(self, number: int) -> None:
        """Ends the thread of a vCPU that is out of the machine; returns at once, as it may be
        called on that thread."""
        with self._changed:
            if number not in self._threads:
                self._vcpus[number].set_present(False)
                return
            self._leaving.add(number)
        self._vm.request_stop()

    def wait_gone(self, number: int) -> None:
        """Until a vCPU that was let go has left. Raises HostError where it does not return."""
        with self._changed:
            if not self._changed.wait_for(lambda: number not in self._leaving, _STOP_PATIENCE_S):
                raise HostError(
                    f"CPU {number} has not left the machine: a device does not return from an "
                    "access",
                    mend="end its read() or write()",
                )

    def stop(self) -> None:
        """Waits until all have ended. Raises HostError where a vCPU does not return."""
        deadline = time.monotonic() + _STOP_PATIENCE_S
        with self._changed:
            self._running = False
            threads = list(self._threads.values())
        for thread in threads:
            while thread.is_alive():
                self._vm.request_stop()
                thread.join(_STOP_RETRY_S)
                if time.monotonic() > deadline:
                    raise HostError(
                        f"{thread.name} does not stop: a device does not return from an access",
                        mend="end its read() or write()",
                    )
        with self._changed:
            self._threads.clear()
            for number in self._leaving:
                self._vcpus[number].set_present(False)
            self._leaving.clear()
            self._changed.notify_all()

    def _all(self) -> dict[int, threading.Thread]:
        with self._changed:
            return dict(self._threads)

    @property
    def native_ids(self) -> dict[int, int]:
        """Of each vCPU that runs and stays, by its number."""
        with self._changed:
            staying = {n: thread for n, thread in self._threads.items() if n not in self._leaving}
        return {number: thread.native_id or 0 for number, thread in sorted(staying.items())}

    @property
    def current(self) -> bool:
        """Whether the caller is one of them: a device."""
        return threading.current_thread() in self._all().values()

    def busy_time(self) -> float:
        """Seconds in which they had a processor or waited for one, of all together."""
        return sum(map(busy_time, self._all().values()))

    def in_kernel(self) -> bool | None:
        """Whether all vCPUs are at privilege level 0; None where that cannot be seen."""
        try:
            self._vm.hold(_LOOK_PATIENCE_S)
        except EngineError:
            return None  # a device takes its time
        try:
            # The low two bits of CS are the privilege level outside of real mode.
            there = [self._vcpus[number] for number in self._there()]
            return all(vcpu.regs()["cs_selector"] & 3 == 0 for vcpu in there)
        finally:
            self._vm.resume()

    def _run(self, number: int, vcpu: EngineVcpu) -> None:
        try:
            # A stop ends nothing by itself, only a decided end does, or that this vCPU has left:
            # the one that has met its end stops the others before it says so.
            while (why := vcpu.run()) == "stopped" and not self._conclusion.decided:
                if self._has_left(number):
                    return
            if why == "halted" and self._halted is not None:
                self._conclusion.post(self._halted)
            elif why != "stopped":
                self._conclusion.post(_status_of(vcpu, why))
        except BaseException as error:
            # Also KeyboardInterrupt: the thread that waits is the one to see it.
            self._conclusion.post(error)

    def _has_left(self, number: int) -> bool:
        with self._changed:
            # While all are stopped who waits for this thread does the rest.
            if number not in self._leaving or not self._running:
                return False
            self._leaving.remove(number)
            del self._threads[number]
            self._vcpus[number].set_present(False)
            self._changed.notify_all()
            return True


def _status_of(vcpu: EngineVcpu, why: str) -> ExitStatus:
    match why:
        case "shutdown":
            if vcpu.regs()["idtr_limit"] == 0:
                # Linux with reboot=t, and other systems too, reset a PC by a
                # triple fault on purpose: they load an empty IDT and trap
                # (arch/x86/kernel/reboot.c, BOOT_TRIPLE).
                return ExitStatus(StopReason.RESET, "by a triple fault with an empty IDT")
            return ExitStatus(StopReason.CRASHED, "triple fault", dump=vcpu.dump())
        case "halted":
            return ExitStatus(
                StopReason.CRASHED, "halted forever with interrupts off", dump=vcpu.dump()
            )
        case _:
            return ExitStatus(StopReason.CRASHED, f"vCPU stopped: {why}", dump=vcpu.dump())


def busy_time(thread: threading.Thread) -> float:
    """Its time on a processor, and where the host tells it, that in a queue for one."""
    if thread.ident is None or thread.native_id is None or not thread.is_alive():
        return 0.0
    try:
        with open(f"/proc/self/task/{thread.native_id}/schedstat", "rb") as file:
            running, waiting, _ = map(int, file.read().split())
    except ProcessLookupError:
        return 0.0  # it has ended meanwhile
    except (OSError, ValueError):
        return _cpu_time(thread.native_id)
    return (running + waiting) / 1e9


def _cpu_time(tid: int) -> float:
    """By the kernel's own number for the clock (Linux, include/linux/posix-timers_types.h): the C
    library's is made of the thread's memory, which may be gone with it."""
    try:
        return time.clock_gettime(~tid << 3 | _CPUCLOCK_PERTHREAD | _CPUCLOCK_SCHED)
    except OSError:
        return 0.0
