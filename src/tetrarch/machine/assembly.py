"""What a machine is put together from, and what each part hears of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, cast
from weakref import WeakMethod

from tetrarch._native import EngineError
from tetrarch.console import ConsoleBackend, MemoryConsole
from tetrarch.errors import HostError, MachineStateError
from tetrarch.machine.attached import AttachedDevices
from tetrarch.machine.breakpoints import Breakpoints
from tetrarch.machine.conclusion import Conclusion, Event
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.console_line import ConsoleLine, ConsoleLines
from tetrarch.machine.debugger import DebuggerPort
from tetrarch.machine.descent import Descent
from tetrarch.machine.disk_holds import holder
from tetrarch.machine.dumps import Dumps
from tetrarch.machine.engine_errors import engine_cause, engine_mend
from tetrarch.machine.engine_vm import EngineVcpu, EngineVm
from tetrarch.machine.events import Events
from tetrarch.machine.forked import Elsewhere, elsewhere, keep_for_ever, watch_forks
from tetrarch.machine.lifecycle import LifeCycle, Phase
from tetrarch.machine.memory import PhysicalMemory
from tetrarch.machine.panic import PanicWatch
from tetrarch.machine.pc import assemble_pc
from tetrarch.machine.recording import Recording, forbid_untrue
from tetrarch.machine.replay import debugger_of
from tetrarch.machine.resets import Resets
from tetrarch.machine.state import MachineParts
from tetrarch.machine.status import ExitStatus, StopReason
from tetrarch.machine.steered import PauseMethods
from tetrarch.machine.threads import VcpuThreads
from tetrarch.machine.vcpu import VcpuView
from tetrarch.machine.vcpus import PluggedVcpus
from tetrarch.platforms.platform import Platform

if TYPE_CHECKING:
    from tetrarch.control.server import ControlServer
    from tetrarch.display import Display
    from tetrarch.gdb.server import GdbServer
    from tetrarch.vnc.server import VncServer

__all__ = ["AssembledMachine"]


class AssembledMachine(PauseMethods):
    def __init__(
        self,
        config: MachineConfig,
        engine: str,
        vm: EngineVm,
        platform: Platform,
        console: ConsoleBackend,
        ports: Sequence[ConsoleBackend],
    ) -> None:
        """``ports`` are the other ends of the virtio console's. Raises HostError."""
        self.config: MachineConfig = config
        self.engine: str = engine
        self._vm = vm
        self._platform = platform
        self._backend = console
        self._life = LifeCycle()
        forbid_untrue(config, self._life)
        vcpus = [vm.vcpu(index) for index in range(self.config.cpus.max)]
        self._views = tuple(
            VcpuView(vm, vcpu, number, self._life.allow) for number, vcpu in enumerate(vcpus)
        )
        self.memory = PhysicalMemory(vm, self._life.allow)
        """RAM by guest physical address: ``vm.memory[0x1000:0x2000]``."""

        self._conclusion = Conclusion(vm.request_stop)
        end = self._conclusion.post
        self._events = Events(end)
        # So a replay comes to its end.
        ends = ExitStatus(StopReason.STOPPED, "the recording ends")
        halted = None if self.config.replay is None else ends
        plugged = PluggedVcpus(vm, self.config.cpus, partial(_device_deleted, self._events))
        self._threads = VcpuThreads(vm, vcpus, self._conclusion, lambda: plugged.numbers, halted)
        self._recording = Recording(vm)
        self.dumps = Dumps(vm, partial(_there, self._views, plugged), self._life, self._events)
        """The core dump that is written, or was the last."""
        panic = PanicWatch(
            self._threads.busy_time,
            self._threads.in_kernel,
            partial(_panicked, self._events, end),
            partial(self._events.tell, "guest-panicked", action="run"),
        )
        try:
            self._pc = assemble_pc(
                vm,
                self.config,
                platform,
                end,
                holder(self),
                self._events,
                panic.told,
                plugged,
                self._threads,
            )
        except EngineError as error:
            raise HostError(
                f"cannot make the machine's devices: {engine_cause(error)}",
                mend=engine_mend(error, "give the machine fewer"),
            ) from error
        serial = ConsoleLine(self._pc.uart, console, self._conclusion, panic)
        self._lines = ConsoleLines(
            [
                serial,
                *(
                    ConsoleLine(port, backend, self._conclusion)
                    for port, backend in zip(self._pc.console_ports, ports, strict=False)
                ),
            ]
        )
        self._attached = AttachedDevices()
        self._debugger_port = DebuggerPort(partial(debugger_of, vm, vcpus, lambda: plugged.numbers))
        self._breakpoints = Breakpoints(
            self._debugger_port, self._views, _if_it_can(self.pause), _if_it_can(self.resume), end
        )
        self._controls: list[ControlServer] = []
        self._gdb: list[GdbServer] = []
        self._displays: list[VncServer] = []
        self._watched: Display | None = None
        """Once somebody has asked for the screen."""
        self._descent = Descent(
            self._life,
            panic,
            self._threads,
            self._pc,
            self._attached,
            self._lines,
            [console, *ports],
            vcpus[0],
            self._events,
            self._controls,
            self._gdb,
            self._displays,
            self._breakpoints,
            self._recording.finish,
        )
        self._loaded = self.config.replay is not None
        self._restored = False
        self._tracked: str | None = None
        """The file since which it is noted what is written."""
        self._seal: Callable[[], None] | None = None
        self.confined = False
        """Whether this process opens no more than it was granted when the machine started."""
        self._resets = Resets(
            self.config.restarts,
            self._life,
            self._conclusion,
            panic,
            self._lines,
            self._threads,
            vm,
            self._pc,
            self._attached,
            self._events,
        )
        watch_forks(self)

    def become_shadow(self) -> None:
        """In a process that was forked from the machine's."""
        for own in (self, self._vm, self._views, self.memory):
            keep_for_ever(own)
        self._vm = nothing = cast(EngineVm, Elsewhere())
        self.memory = PhysicalMemory(nothing)
        vcpu = cast(EngineVcpu, nothing)
        self._views = tuple(VcpuView(nothing, vcpu, view.number) for view in self._views)
        self._life.become_shadow()
        self._conclusion.become_shadow()
        if isinstance(self._backend, MemoryConsole):
            self._backend.become_shadow(elsewhere())

    @property
    def vcpus(self) -> tuple[VcpuView, ...]:
        """The virtual CPUs that are in the machine: their registers and memory as they have it
        mapped, at any time."""
        return _there(self._views, self._pc.vcpus)

    def vcpu(self, number: int) -> VcpuView:
        """The one of that number, of those that there can be; one that is not in the machine is as
        it was last, or as it was made. Raises MachineStateError where there can be none."""
        if not 0 <= number < len(self._views):
            raise MachineStateError(
                f"the machine can have no CPU {number}",
                mend=f"they are 0 to {len(self._views) - 1}",
            )
        return self._views[number]

    @property
    def phase(self) -> Phase:
        """Where it is in its life: made, running, paused, ended."""
        return self._life.phase

    @property
    def uptime(self) -> float:
        """Seconds for which the machine has run."""
        return self._life.uptime

    def _parts(self) -> MachineParts:
        return MachineParts(
            self.config,
            self.engine,
            self._platform.name,
            self.uptime,
            self._vm,
            self._pc,
            self._attached,
        )

    def _discard(self) -> None:
        """Ends a machine that was never started."""
        self._pc.close()
        self._attached.close()
        self._conclusion.settle(ExitStatus(StopReason.STOPPED), self._descent.close)


def _there(views: Sequence[VcpuView], plugged: PluggedVcpus) -> tuple[VcpuView, ...]:
    return tuple(views[number] for number in plugged.numbers)


def _device_deleted(events: Events, name: str) -> None:
    events.tell("device-deleted", device=name, path=f"/machine/peripheral/{name}")


def _panicked(events: Events, end: Callable[[Event], None], message: str) -> None:
    events.tell("guest-panicked", action="poweroff")
    end(ExitStatus(StopReason.CRASHED, message))


def _if_it_can(method: Callable[[], None]) -> Callable[[], None]:
    """Calls a machine's method where the machine is there and in a state for that."""
    known = WeakMethod(method)

    def call() -> None:
        if (bound := known()) is not None:
            with suppress(MachineStateError):
                bound()

    return call
