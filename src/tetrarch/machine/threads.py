"""The threads of a machine's vCPUs.

Each vCPU runs on a thread of its own, which enters Python only for a device
that is written in Python.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tetrarch.errors import HostError
from tetrarch.machine.conclusion import Conclusion
from tetrarch.machine.status import ExitStatus, StopReason

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVcpu

__all__ = ["VcpuThreads"]

# A request to stop reaches a vCPU that runs; one that is about to run is asked again.
_STOP_RETRY_S = 0.02
# A vCPU that does not stop is inside a device written in Python that hangs.
_STOP_PATIENCE_S = 10.0
# How long somebody waits to see the vCPUs' registers.
_SAMPLE_PATIENCE_S = 2.0


class VcpuThreads:
    """Runs vCPUs until the machine's end is decided."""

    def __init__(
        self,
        vcpus: Sequence[EngineVcpu],
        request_stop: Callable[[], None],
        conclusion: Conclusion,
    ) -> None:
        self._vcpus = vcpus
        self._request_stop = request_stop
        self._conclusion = conclusion
        self._threads: list[threading.Thread] = []
        # Which vCPUs still have to say whether they are in the kernel, and whether all
        # that did are. Guarded by the condition.
        self._samples = threading.Condition()
        self._samples_due: set[int] = set()
        self._sample_in_kernel = False

    def start(self) -> None:
        for index, vcpu in enumerate(self._vcpus):
            thread = threading.Thread(
                target=self._run, args=(index, vcpu), name=f"vcpu{index}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Waits until no vCPU runs. Raises HostError where one does not return."""
        deadline = time.monotonic() + _STOP_PATIENCE_S
        for thread in self._threads:
            while thread.is_alive():
                self._request_stop()
                thread.join(_STOP_RETRY_S)
                if time.monotonic() > deadline:
                    raise HostError(
                        f"{thread.name} does not stop: a device does not return from an access",
                        mend="end its read() or write()",
                    )

    @property
    def current(self) -> bool:
        """Whether the caller is one of them: a device."""
        return threading.current_thread() in self._threads

    def cpu_time(self) -> float:
        """Processor time in seconds of all together."""
        idents = [thread.ident for thread in self._threads if thread.is_alive()]
        clocks = [time.pthread_getcpuclockid(ident) for ident in idents if ident is not None]
        return sum(map(time.clock_gettime, clocks))

    def in_kernel(self) -> bool:
        """Whether all vCPUs were seen at privilege level 0."""
        # Registers can only be read between two run() calls, on the vCPU's thread.
        alive = {index for index, thread in enumerate(self._threads) if thread.is_alive()}
        with self._samples:
            self._samples_due = alive
            self._sample_in_kernel = bool(alive)
        self._request_stop()
        with self._samples:
            taken = self._samples.wait_for(lambda: not self._samples_due, _SAMPLE_PATIENCE_S)
            self._samples_due = set()
            return taken and self._sample_in_kernel

    def _take_sample(self, index: int, vcpu: EngineVcpu) -> None:
        with self._samples:
            if index in self._samples_due:
                # The low two bits of CS are the privilege level outside of real mode.
                self._sample_in_kernel &= vcpu.regs()["cs_selector"] & 3 == 0
                self._samples_due.remove(index)
                self._samples.notify_all()

    def _run(self, index: int, vcpu: EngineVcpu) -> None:
        try:
            # A stop that nobody wants any more, since whoever wanted it did not wait so
            # long, ends nothing: only a decided end does.
            while (why := vcpu.run()) == "stopped" and not self._conclusion.decided:
                self._take_sample(index, vcpu)
            if why != "stopped":
                self._conclusion.post(_status_of(vcpu, why))
        except BaseException as error:
            # Also KeyboardInterrupt: the thread that waits is the one to see it.
            self._conclusion.post(error)


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
