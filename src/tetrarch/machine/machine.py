"""A machine as a Python object: made, started, talked to, ended.

Threads. Each vCPU runs on a thread of its own, which enters Python only for a
device that is written in Python. Whatever ends the machine (the guest's power
button, a fault, an exception in a device, a timeout, a signal handler) puts one
event into a queue; whoever waits takes the first of them, stops the vCPUs and
closes the console. The queue is a SimpleQueue because that one may be filled
from a signal handler and from a device in the middle of anything.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from tetrarch import _native
from tetrarch.boot import build_acpi, load_kernel
from tetrarch.console import ConsoleBackend, MemoryConsole
from tetrarch.errors import HostError, MachineStateError
from tetrarch.images.default_guest import DEFAULT_APPEND
from tetrarch.machine.config import MIB, MachineConfig, make_config
from tetrarch.machine.panic import PanicWatch
from tetrarch.machine.pc import Pc, assemble_pc
from tetrarch.machine.selection import choose
from tetrarch.machine.status import ExitStatus, StopReason

__all__ = ["Machine"]

# request_stop() reaches a vCPU that runs; one that is about to run is asked again.
_STOP_RETRY_S = 0.02
# A vCPU that does not stop is inside a device written in Python that hangs.
_STOP_PATIENCE_S = 10.0
# How long the panic watch waits to see a vCPU's registers.
_SAMPLE_PATIENCE_S = 2.0
_RESET_IDT_LIMIT = 0xFFFF
# Typed input that waits for the guest: beyond this the console's reader is held back.
_INPUT_BYTES_MAX = 64 << 10
_INPUT_RETRY_S = 0.01

_Event = ExitStatus | BaseException


class Machine:
    """One virtual machine.

        with Machine(kernel="vmlinuz", initrd="initrd.gz", memory="512M") as vm:
            vm.start()
            vm.console.expect("login:")

    ``kernel`` None is the default guest, which is fetched if it is not cached.
    ``append`` is the kernel's whole command line; None is a fitting default.
    ``memory`` is "512M", "2G", or a number of MiB. ``engine`` is "auto", "bt"
    or "kvm"; ``cpus`` more than 1 need "kvm".
    ``console`` is the other end of the serial line; None is one for programs.

    Raises ConfigError for a value that cannot be, HostError when this host cannot
    give what is asked. A machine runs once.
    """

    def __init__(
        self,
        *,
        kernel: str | os.PathLike[str] | None = None,
        initrd: str | os.PathLike[str] | None = None,
        append: str | None = None,
        memory: str | int = "512M",
        cpus: int = 1,
        engine: str = "auto",
        debug_exit: bool = False,
        name: str = "tetrarch",
        console: ConsoleBackend | None = None,
    ) -> None:
        self.config: MachineConfig = make_config(
            {
                "kernel": kernel,
                "initrd": initrd,
                "append": append,
                "memory": memory,
                "cpus": cpus,
                "engine": engine,
                "debug_exit": debug_exit,
                "name": name,
            }
        )
        self.engine, self.engine_reason = choose(self.config.engine, self.config.cpus)
        self._events: queue.SimpleQueue[_Event | None] = queue.SimpleQueue()
        self._backend: ConsoleBackend = MemoryConsole() if console is None else console
        self._vm = _create_vm(self.engine, self.config)
        self._vcpus = [self._vm.vcpu(index) for index in range(self.config.cpus)]
        self._panic = PanicWatch(self._vcpu_cpu_time, self._vcpu_in_kernel, self._panicked)
        self._pc: Pc = assemble_pc(self._vm, self.config, self._output, self._end)
        self._threads: list[threading.Thread] = []
        self._started_at: float | None = None
        self._ended_at: float | None = None
        self._loaded = False
        self._ending = False
        self._status: ExitStatus | None = None
        self._failure: BaseException | None = None
        # Guards the conclusion, which happens once. Nothing else is taken under it
        # but what the console's close() takes.
        self._conclusion = threading.RLock()
        # Which vCPUs still have to say whether they are in the kernel, and whether all
        # that did are. Guarded by the condition.
        self._samples = threading.Condition()
        self._samples_due: set[int] = set()
        self._sample_in_kernel = False

    # What a program does with it.

    @property
    def console(self) -> MemoryConsole:
        """The serial line. Only where no other console was given."""
        if not isinstance(self._backend, MemoryConsole):
            raise MachineStateError(
                f"the console of this machine is a {type(self._backend).__name__}",
                mend="use that, or give none",
            )
        return self._backend

    @property
    def status(self) -> ExitStatus | None:
        """How the machine ended; None while it has not."""
        return self._status

    @property
    def running(self) -> bool:
        return self._started_at is not None and self._ended_at is None

    @property
    def uptime(self) -> float:
        """Seconds from start() to the end, or to now."""
        if self._started_at is None:
            return 0.0
        return (self._ended_at or time.monotonic()) - self._started_at

    def attach_ports(
        self,
        base: int,
        length: int,
        device: _native.Device,
        *,
        sizes: Sequence[int] | None = None,
    ) -> _native.Region:
        """Puts a device of yours on I/O ports, before start().

        It sees accesses of ``sizes`` bytes, by default of any; others pass it by. The region
        can be moved, unmapped and detached at any time.
        """
        self._require_new("attach_ports")
        return self._vm.attach_ports(base, length, device, sizes=sizes)

    def attach_mmio(
        self,
        base: int,
        length: int,
        device: _native.Device,
        *,
        sizes: Sequence[int] | None = None,
    ) -> _native.Region:
        """Puts a device of yours on guest physical addresses, before start()."""
        self._require_new("attach_mmio")
        return self._vm.attach_mmio(base, length, device, sizes=sizes)

    def irq_source(self, gsi: int) -> _native.IrqSource:
        """A wire of its own to an interrupt line, to be driven from any thread.

        The line is high while any of its wires is.
        """
        return self._vm.irq_source(gsi)

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drives one more wire to the line, which all callers of this share."""
        self._vm.irq_line(gsi, level)

    def read_memory(self, address: int, length: int) -> bytes:
        """Guest physical memory. Raises GuestMemoryError outside of RAM."""
        return self._vm.read_memory(address, length)

    def write_memory(self, address: int, data: bytes) -> None:
        self._vm.write_memory(address, data)

    def stats(self) -> dict[str, dict[str, int]]:
        """Counters by group: exits by kind, the engine's, time, calls into Python."""
        return self._vm.stats()

    def load(self) -> None:
        """Puts the guest into memory. start() does it if you have not.

        Raises BootError for files that cannot be booted, ImageError when there is
        no default guest and none can be fetched.
        """
        self._require_new("load")
        if not self._loaded:
            self._boot()
            self._loaded = True

    def start(self) -> None:
        """Lets the guest run. Returns at once."""
        self._require_new("start")
        self.load()
        self._started_at = time.monotonic()
        try:
            self._backend.start(self._typed, self._left)
        except BaseException:
            self._ended_at = self._started_at
            self._backend.close()
            raise
        for index, vcpu in enumerate(self._vcpus):
            thread = threading.Thread(
                target=self._run_vcpu, args=(index, vcpu), name=f"vcpu{index}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def wait(self, timeout: float | None = None) -> ExitStatus:
        """Waits until the machine has ended, and says how.

        Raises TimeoutError if it still runs after ``timeout`` seconds, and what a
        device raised if that ended it.
        """
        if self._started_at is None:
            raise MachineStateError(
                "the machine has not been started", mend="call start() or run()"
            )
        if self._ended_at is None:
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"the machine still runs after {timeout:g} s") from None
            self._conclude(event)
            self._events.put(None)  # the next one who waits is woken in turn
        if self._failure is not None:
            raise self._failure
        if self._status is None:  # _conclude() sets one of the two
            raise MachineStateError("the machine ended without a reason", mend="report this")
        return self._status

    def run(self, timeout: float | None = None) -> ExitStatus:
        """start() and wait(). After ``timeout`` seconds the machine is stopped."""
        self.start()
        try:
            return self.wait(timeout)
        except TimeoutError:
            if self._failure is not None:  # a device raised it
                raise
            self._conclude(ExitStatus(StopReason.TIMEOUT, f"{timeout:g} s passed"))
            return self.wait()
        finally:
            self._conclude(ExitStatus(StopReason.STOPPED))

    def request_stop(self) -> None:
        """Asks the machine to end; returns at once. From any thread or signal handler."""
        self._end(ExitStatus(StopReason.STOPPED))

    def stop(self) -> None:
        """Ends the machine, as pulling its plug would. Without effect if it has ended."""
        if self._started_at is None:
            return
        if threading.current_thread() in self._threads:
            self.request_stop()  # a device: its own thread has to return first
            return
        self._conclude(ExitStatus(StopReason.STOPPED))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self._backend.close()

    # What happens inside.

    def _require_new(self, what: str) -> None:
        if self._started_at is not None:
            raise MachineStateError(
                f"{what}() comes too late: the machine was already started",
                mend="make another Machine: each runs once",
            )

    def _boot(self) -> None:
        kernel, initrd = self.config.kernel, self.config.initrd
        append = self.config.append
        if kernel is None:
            from tetrarch import images

            guest = images.ensure(images.Cache(), images.DEFAULT_IMAGE, images.Reporter())
            kernel, initrd = guest.kernel, initrd or guest.initrd
        if append is None:
            append = DEFAULT_APPEND
        rsdp, tables = build_acpi(self.config.cpus)
        for address, data in tables:
            self._vm.write_memory(address, data)
        registers = load_kernel(self._vm, kernel, initrd, append, rsdp)
        # Boot protocols leave the IDT open. With the limit of a CPU after RESET (SDM
        # Vol. 3A, table 10-1), an IDT of limit 0 is always the guest's own doing.
        self._vcpus[0].set_regs({**registers, "idtr_limit": _RESET_IDT_LIMIT})

    def _run_vcpu(self, index: int, vcpu: _native.Vcpu) -> None:
        try:
            while True:
                why = vcpu.run()
                if why != "stopped" or self._ending or not self._take_sample(index, vcpu):
                    break
            event = self._event_of(vcpu, why)
        except BaseException as error:
            # Also KeyboardInterrupt: the thread that waits is the one to see it.
            self._end(error)
        else:
            if event is not None:
                self._end(event)

    def _event_of(self, vcpu: _native.Vcpu, why: str) -> ExitStatus | None:
        match why:
            case "stopped":
                return None  # whoever stopped it has put the reason into the queue
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

    def _output(self, data: bytes) -> None:
        self._backend.write(data)
        self._panic.feed(data)

    def _end(self, event: _Event) -> None:
        self._events.put(event)
        # Devices call this in the middle of a guest's instruction: it is the last.
        self._vm.request_stop()

    def _typed(self, data: bytes) -> None:
        # The UART keeps what the guest has not read. Holding the reader back here
        # keeps that small when a large file is piped in.
        while self._pc.uart.queued > _INPUT_BYTES_MAX and not self._ending:
            time.sleep(_INPUT_RETRY_S)
        self._pc.uart.receive(data)

    def _left(self) -> None:
        self._end(ExitStatus(StopReason.STOPPED, "left by Ctrl-]"))

    def _conclude(self, event: _Event | None) -> None:
        """Takes the machine down. Only the first call has an effect."""
        with self._conclusion:
            if self._ended_at is not None:
                return
            self._ending = True
            try:
                self._panic.close()
                self._stop_vcpus()
                if isinstance(event, ExitStatus):
                    event = self._with_dump(event)
                self._pc.close()
            finally:
                self._ended_at = time.monotonic()
                self._backend.close()
                if isinstance(event, ExitStatus):
                    self._status = event
                else:
                    self._failure = event
                self._events.put(None)  # wakes who waits

    def _with_dump(self, status: ExitStatus) -> ExitStatus:
        """A panic is seen from outside: its registers can be read only after the stop."""
        if status.reason is not StopReason.CRASHED or status.dump:
            return status
        return replace(status, dump=self._vcpus[0].dump())

    def _stop_vcpus(self) -> None:
        deadline = time.monotonic() + _STOP_PATIENCE_S
        for thread in self._threads:
            while thread.is_alive():
                self._vm.request_stop()
                thread.join(_STOP_RETRY_S)
                if time.monotonic() > deadline:
                    raise HostError(
                        f"{thread.name} does not stop: a device does not return from an access",
                        mend="end its read() or write()",
                    )

    # What the panic watch asks.

    def _vcpu_cpu_time(self) -> float:
        idents = [thread.ident for thread in self._threads if thread.is_alive()]
        clocks = [time.pthread_getcpuclockid(ident) for ident in idents if ident is not None]
        return sum(map(time.clock_gettime, clocks))

    def _vcpu_in_kernel(self) -> bool:
        # Registers can only be read between two run() calls, on the vCPU's thread.
        alive = {index for index, thread in enumerate(self._threads) if thread.is_alive()}
        with self._samples:
            self._samples_due = alive
            self._sample_in_kernel = bool(alive)
        self._vm.request_stop()
        with self._samples:
            taken = self._samples.wait_for(lambda: not self._samples_due, _SAMPLE_PATIENCE_S)
            self._samples_due = set()
            return taken and self._sample_in_kernel

    def _take_sample(self, index: int, vcpu: _native.Vcpu) -> bool:
        """False if nobody asked this vCPU for one."""
        with self._samples:
            if index not in self._samples_due:
                return False
            # The low two bits of CS are the privilege level outside of real mode.
            self._sample_in_kernel &= vcpu.regs()["cs_selector"] & 3 == 0
            self._samples_due.remove(index)
            self._samples.notify_all()
            return True

    def _panicked(self, message: str) -> None:
        self._end(ExitStatus(StopReason.CRASHED, message))


def _create_vm(engine: str, config: MachineConfig) -> _native.Vm:
    try:
        return _native.Vm(engine, config.memory, config.cpus)
    except (_native.EngineError, MemoryError, OSError, OverflowError) as error:
        raise HostError(
            f"cannot make a machine with {config.memory // MIB} MiB of memory and "
            f"{config.cpus} CPUs: {error or type(error).__name__}",
            # The engine's errors say themselves what to do.
            mend="" if isinstance(error, _native.EngineError) else "try less memory",
        ) from error
