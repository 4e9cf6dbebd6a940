"""A machine as a Python object: made, started, talked to, ended."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn, Self, Unpack, cast

from tetrarch._native import EngineError, Vm
from tetrarch.agent import AgentStream
from tetrarch.agent import connect as connect_agent
from tetrarch.agent.guest import AGENT_S, AgentMethods
from tetrarch.block.disk import OnStop
from tetrarch.boot.generation import change_generation
from tetrarch.console import ConsoleBackend, MemoryConsole
from tetrarch.console.spec import ConsoleSpec, PortSpec, require_console
from tetrarch.errors import (
    ConfigError,
    HostError,
    MachineStateError,
    ValueProblem,
)
from tetrarch.gdb.spec import GdbSpec
from tetrarch.machine.added import add_disk, add_net
from tetrarch.machine.attached import AttachedDevices
from tetrarch.machine.breakpoints import Breakpoint, Breakpoints, Hit
from tetrarch.machine.conclusion import Conclusion, Event
from tetrarch.machine.config import (
    CdromOption,
    DiskOption,
    EngineName,
    GdbOption,
    MachineConfig,
    MachineOptions,
    NetOption,
    PortOption,
    make_config,
)
from tetrarch.machine.console_line import ConsoleLine, ConsoleLines
from tetrarch.machine.debugger import DebuggerPort
from tetrarch.machine.dumps import Dumps
from tetrarch.machine.engine_vm import (
    BusRegion,
    EngineVcpu,
    EngineVm,
    InterruptWire,
    create_vm,
    engine_cause,
    engine_mend,
)
from tetrarch.machine.event_stream import EventStream
from tetrarch.machine.events import EventName, Events, MachineEvent, shutdown_data
from tetrarch.machine.flush_points import check_flush_points
from tetrarch.machine.forked import Elsewhere, elsewhere, keep_for_ever, watch_forks
from tetrarch.machine.guest import (
    check_files,
    load_guest,
    resolve_guest,
    with_installed_disk,
)
from tetrarch.machine.identity import renew_cards
from tetrarch.machine.lifecycle import LifeCycle, Phase
from tetrarch.machine.log import MachineLog
from tetrarch.machine.memory import PhysicalMemory
from tetrarch.machine.new_file import new_file
from tetrarch.machine.panic import PanicWatch
from tetrarch.machine.pc import Pc, assemble_pc
from tetrarch.machine.plugged import PciDevice
from tetrarch.machine.recording import Recording, RecordingEnd, check_recorded, replayed
from tetrarch.machine.resets import Resets
from tetrarch.machine.selection import chosen
from tetrarch.machine.snapshot import Parent, opened, parent_of, restore_machine, save_machine
from tetrarch.machine.state import MachineParts
from tetrarch.machine.status import ExitStatus, StopReason
from tetrarch.machine.threads import VcpuThreads
from tetrarch.machine.vcpu import VcpuView
from tetrarch.platforms.pc import PC
from tetrarch.platforms.platform import Platform
from tetrarch.sockets import socket_place
from tetrarch.virtio.balloon import BalloonKind
from tetrarch.virtio.input import InputDevice
from tetrarch.virtio.served import ServedKind, VirtioUserDevice

if TYPE_CHECKING:  # Device is a protocol: of the stub file alone
    from tetrarch._native import Device
    from tetrarch.aio import AsyncMachine
    from tetrarch.control.server import ControlServer
    from tetrarch.display.screen import Screen
    from tetrarch.gdb.server import GdbServer

__all__ = ["Machine"]

#: A guest that still boots does not see the button.
_PRESS_AGAIN_S = 10.0
#: Between attempts to hold a machine for a disk.
_HOLD_AGAIN_S = 5.0


class Machine(AgentMethods):
    """One virtual machine.

        with Machine(kernel="vmlinuz", initrd="initrd.gz", memory="512M") as vm:
            vm.start()
            vm.console.expect("login:")

    What it is made of is a ``MachineConfig``, or its fields as keywords, listed
    below. ``console`` is the other end of the serial line: an object, or as the
    configuration writes it; None is one for programs, ``vm.console``. ``platform`` is
    which hypervisor's interface the guest finds; the PC's is KVM's. ``agent``: programs can
    run commands in the guest (``exec``), over a vsock socket of the machine's own. ``vm`` is a
    stand-in for the engine, for tests.

    Raises ConfigError for a value that cannot be, HostError when this host cannot
    give what is asked. A machine runs once.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        console: ConsoleBackend | str | None = None,
        platform: Platform = PC,
        agent: bool = False,
        vm: EngineVm | None = None,
        **options: Unpack[MachineOptions],
    ) -> None:
        self._life = LifeCycle()
        self.config: MachineConfig = with_installed_disk(_configured(config, console, options))
        if agent and self.config.vsock is None:
            self.config = self.config.updated({"vsock": Path(_own_directory(self), "vsock")})
        self.engine: str
        self.engine_reason: str
        if vm is None:
            self.engine, self.engine_reason = chosen(self.config)
            vm = create_vm(self.engine, self.config, platform)
        else:
            self.engine, self.engine_reason = type(vm).__name__, "as given"
        self._vm = vm
        self._platform = platform
        self._backend = _open_console(console, self.config.console)
        ports = _open_ports(self.config.virtio_console)
        vcpus = [vm.vcpu(index) for index in range(self.config.cpus)]
        self.vcpus: tuple[VcpuView, ...] = tuple(
            VcpuView(vm, vcpu, number) for number, vcpu in enumerate(vcpus)
        )
        """The virtual CPUs: their registers and memory as they have it mapped, at any time."""
        self.memory = PhysicalMemory(vm)
        """RAM by guest physical address: ``vm.memory[0x1000:0x2000]``."""

        self._conclusion = Conclusion(vm.request_stop)
        end = self._conclusion.post
        self._events = Events(end)
        # So a replay comes to its end.
        ends = ExitStatus(StopReason.STOPPED, "the recording ends")
        halted = None if self.config.replay is None else ends
        self._threads = VcpuThreads(vm, vcpus, self._conclusion, halted)
        self._recording = Recording(vm)
        self.dumps = Dumps(vm, self.vcpus, self._life, self._events)
        """The core dump that is written, or was the last."""
        panic = PanicWatch(
            self._threads.busy_time,
            self._threads.in_kernel,
            partial(_panicked, self._events, end),
            partial(self._events.tell, "guest-panicked", action="run"),
        )
        try:
            self._pc = assemble_pc(vm, self.config, end, _holder(self), self._events, panic.told)
        except EngineError as error:
            raise HostError(
                f"cannot make the machine's devices: {engine_cause(error)}",
                mend=engine_mend(error, "give the machine fewer"),
            ) from error
        serial = ConsoleLine(self._pc.uart, self._backend, self._conclusion, panic)
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
        self._debugger_port = DebuggerPort(vm, vcpus)
        self._breakpoints = Breakpoints(
            self._debugger_port, self.vcpus, _if_it_can(self.hold), _if_it_can(self.resume), end
        )
        self._controls: list[ControlServer] = []
        self._gdb: list[GdbServer] = []
        self._descent = _Descent(
            self._life,
            panic,
            self._threads,
            self._pc,
            self._attached,
            self._lines,
            [self._backend, *ports],
            vcpus[0],
            self._events,
            self._controls,
            self._gdb,
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
            self.config.on_reset == "restart",
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
        if self.config.control is not None:
            self.serve_control(self.config.control)
        if self.config.gdb is not None:
            self.serve_gdb(self.config.gdb, wait=self.config.gdb_wait)

        watch_forks(self)

    def become_shadow(self) -> None:
        """In a process that was forked from the machine's."""
        for own in (self, self._vm, self.vcpus, self.memory):
            keep_for_ever(own)
        self._vm = nothing = cast(EngineVm, Elsewhere())
        self.memory = PhysicalMemory(nothing)
        vcpu = cast(EngineVcpu, nothing)
        self.vcpus = tuple(VcpuView(nothing, vcpu, view.number) for view in self.vcpus)
        self._life.become_shadow()
        self._conclusion.become_shadow()
        if isinstance(self._backend, MemoryConsole):
            self._backend.become_shadow(elsewhere())

    def __reduce__(self) -> NoReturn:
        raise TypeError("a machine cannot be pickled: make it in the other process, of its config")

    def _repr_html_(self) -> str:
        """For a cell of a notebook."""
        from tetrarch.notebook import machine_html

        return machine_html(self)

    def __repr__(self) -> str:
        return f"<Machine {self.config.name!r} on {self.engine}, {self.phase.value}>"

    def __del__(self) -> None:
        # Only what __init__ has made: it may have failed.
        if getattr(self, "_resets", None) is None:
            return
        if self.phase in (Phase.RUNNING, Phase.HELD):
            warnings.warn(
                f"{self!r} was forgotten while it ran: use it in a with statement, or stop() it",
                ResourceWarning,
                source=self,
                stacklevel=1,
            )
            self.request_stop()  # the keeper does the rest
        elif self.phase is Phase.MADE:
            self._discard()

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
    def balloon(self) -> BalloonKind:
        """By which the guest gives memory back: ``target``, ``actual``, ``stats()``."""
        if self._pc.balloon is None:
            raise MachineStateError("this machine has no balloon", mend="make it with balloon=True")
        return self._pc.balloon

    @property
    def inputs(self) -> tuple[InputDevice, ...]:
        """The keyboards, mice and tablets of ``input=``, in its order."""
        return tuple(kind.device for kind in self._pc.inputs)

    def screen(self) -> Screen:
        """What its screen shows; with ``vga`` alone."""
        from tetrarch.display.vga import vga_screen

        if self._pc.vga is None:
            raise MachineStateError("this machine has no screen", mend="make it with vga=True")
        return vga_screen(self._pc.vga.registers(), self._vm.read_memory)

    @property
    def pc(self) -> Pc:
        """Its devices."""
        return self._pc

    @property
    def vcpu_threads(self) -> list[int]:
        """The host's numbers of the threads that run the vCPUs, while they do."""
        return self._threads.native_ids

    @property
    def phase(self) -> Phase:
        """Where it is in its life: made, running, held, ended."""
        return self._life.phase

    @property
    def running(self) -> bool:
        return self._life.running

    @property
    def status(self) -> ExitStatus | None:
        """How the machine ended; None while it has not, or if an exception ended it."""
        return self._conclusion.status

    @property
    def recording(self) -> RecordingEnd | None:
        """What became of a recording or a replay, once the machine has ended."""
        return self._recording.end

    @property
    def uptime(self) -> float:
        """Seconds for which the machine has run."""
        return self._life.uptime

    @property
    def resets(self) -> int:
        """How often the machine was reset and has started anew."""
        return self._resets.count

    def on(self, event: EventName, listener: Callable[[MachineEvent], object]) -> None:
        """Calls ``listener`` with each such event from now on, one at a time, on a thread of
        their own. What it raises ends the machine and comes out of ``wait()``.

        The events are those of ``tetrarch.machine.events.EVENTS``; docs/control.md has their
        data. Raises ConfigError for another name.
        """
        self._events.on(event, listener)

    def events(self, *names: EventName) -> EventStream[MachineEvent]:
        """The events of these names, or all, from now on: for ``for`` and ``async for``, which
        end with the machine. Raises ConfigError as ``on`` does."""
        return self._events.stream(*names)

    def serve_control(self, path: str | os.PathLike[str]) -> None:
        """Lets programs steer the machine by QMP on a Unix socket, until it has ended.

        Raises HostError where it cannot listen there, MachineStateError where it does already.
        """
        from tetrarch.control.server import ControlServer

        self._life.require("serve_control", Phase.MADE, Phase.RUNNING, Phase.HELD)
        if self._controls:
            raise MachineStateError(
                f"the machine has a control socket, {self._controls[0].path}", mend="use that"
            )
        server = ControlServer(self, Path(path))
        self._controls.append(server)
        self._events.watch(server.tell)
        if self.phase is Phase.ENDED:  # meanwhile
            server.close()

    @property
    def gdb(self) -> GdbServer | None:
        """Where gdb finds it, if it does."""
        return self._gdb[0] if self._gdb else None

    def serve_gdb(self, where: GdbOption = 0, *, wait: bool = False) -> GdbServer:
        """Lets gdb debug the guest, until the machine has ended; ``address`` of what it gives is
        for gdb's ``target remote``. See docs/gdb.md.

        ``where`` is a TCP port of this host, 0 for a free one, "HOST:PORT", or the path of a Unix
        socket. With ``wait`` the machine is held until gdb lets it run. Raises HostError where it
        cannot listen there, MachineStateError where it does already.
        """
        from tetrarch.gdb.server import GdbServer

        self._life.require("serve_gdb", Phase.MADE, Phase.RUNNING, Phase.HELD)
        if self._gdb:
            raise MachineStateError(
                f"the machine has a place for gdb, {self._gdb[0].address}", mend="use that"
            )
        try:
            spec = GdbSpec.parse(where)
        except ValueProblem as problem:
            raise ConfigError(f"gdb: {problem.cause}", mend=problem.mend) from None
        server = GdbServer(self, spec, wait=wait)
        self._gdb.append(server)
        if self.phase is Phase.ENDED:  # meanwhile
            server.close()
        return server

    @property
    def debugger_port(self) -> DebuggerPort:
        """For who sets breakpoints otherwise than by the two methods below."""
        return self._debugger_port

    def breakpoint(
        self,
        address: int,
        listener: Callable[[Hit], object] | None = None,
        *,
        hardware: bool = False,
        vcpu: int = 0,
    ) -> Breakpoint:
        """Stops vCPUs before they execute the instruction at a linear address, and calls
        ``listener`` there; then the machine goes on. Without a listener it is held at each hit
        (``Breakpoint.wait``).

        An INT3 is planted, where ``vcpu`` has the address mapped; the guest's code is to be there.
        With ``hardware`` the CPU watches the address, which can do so with four at a time: then
        nothing has to be there yet, and it stays over a reset. Listeners run on a thread of their
        own while the machine stands; what one raises ends the machine and comes out of ``wait()``.
        Raises MachineStateError while gdb debugs the machine.
        """
        self._life.require("breakpoint", Phase.MADE, Phase.RUNNING, Phase.HELD)
        if hardware:
            return self._breakpoints.watch(("execute", address, 1), listener)
        return self._breakpoints.plant(vcpu, address, listener)

    def watchpoint(
        self,
        address: int,
        length: int,
        listener: Callable[[Hit], object] | None = None,
        *,
        access: Literal["write", "access"] = "write",
    ) -> Breakpoint:
        """As ``breakpoint``, behind each instruction that writes to the 1, 2, 4 or 8 bytes at a
        linear address, a multiple of ``length``; with "access" also behind those that read.
        """
        self._life.require("watchpoint", Phase.MADE, Phase.RUNNING, Phase.HELD)
        try:
            return self._breakpoints.watch((access, address, length), listener)
        except EngineError as error:
            raise ConfigError(
                f"watchpoint: {engine_cause(error)}", mend=engine_mend(error, "give another length")
            ) from error

    def attach_ports(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        name: str | None = None,
    ) -> BusRegion:
        """Puts a device of yours on I/O ports, before start().

        It sees accesses of ``sizes`` bytes, by default of any; others pass it by. The region
        can be moved, unmapped and detached at any time. A saved machine knows the device by
        ``name``, which is its class and ``base`` if it is not given.
        """
        self._life.require("attach_ports", Phase.MADE)
        region = self._vm.attach_ports(base, length, device, sizes=sizes)
        self._attached.add(name, base, device)
        return region

    def attach_mmio(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        name: str | None = None,
    ) -> BusRegion:
        """Puts a device of yours on guest physical addresses, before start()."""
        self._life.require("attach_mmio", Phase.MADE)
        region = self._vm.attach_mmio(base, length, device, sizes=sizes)
        self._attached.add(name, base, device)
        return region

    def attach_virtio(self, device: VirtioUserDevice, *, name: str | None = None) -> None:
        """Gives the guest a virtio device of yours, before start().

        Its requests are served on a thread of its own; what it raises stops the machine. A
        saved machine knows it by ``name``, which is its class if it is not given.
        """
        self._life.require("attach_virtio", Phase.MADE)
        if self._pc.virtio is None or not isinstance(self._vm, Vm):
            raise MachineStateError("a stand-in for the engine has no virtio", mend="give none")
        name = name or type(device).__qualname__
        self._attached.require_free(name)
        kind = ServedKind(self._vm, device, name, self._conclusion.post)
        try:
            self._attached.add_virtio(name, kind, self._pc.virtio.plug(kind))
        except ConfigError:
            kind.close()
            raise

    @property
    def engine_vm(self) -> EngineVm:
        """What a ``PciFunction`` and the vectors of a device of yours are made with."""
        return self._vm

    def plug(self, device: PciDevice, *, slot: int | None = None, name: str | None = None) -> int:
        """Puts a PCI device of yours into a slot, a free one if none is given; gives its number.

        The guest is told if it runs. ``name``, by default the device's class, is what
        ``unplug`` and a saved machine know it by.
        """
        self._life.require("plug", Phase.MADE, Phase.RUNNING, Phase.HELD)
        announce = self.phase is not Phase.MADE
        name = type(device).__qualname__ if name is None else name
        return self._pc.plugged.plug(name, device, slot, announce=announce)

    def attach_disk(self, disk: DiskOption, *, name: str | None = None) -> str:
        """Puts a disk into a slot, at virtio or nvme, as ``disk=`` is written; gives the device's
        name, which ``unplug`` takes.

        Raises ConfigError for what a disk that comes later cannot be, ImageError where the image
        cannot be used.
        """
        self._life.require("attach_disk", Phase.MADE, Phase.RUNNING, Phase.HELD)
        (spec,) = make_config({"disk": disk}).disk
        return add_disk(self._pc, spec, name, announce=self.phase is not Phase.MADE)

    def attach_net(self, net: NetOption, *, name: str | None = None) -> str:
        """Puts a network card into a slot, as ``net=`` is written; gives the device's name, which
        ``unplug`` takes.

        Raises HostError where the host does not give the network.
        """
        self._life.require("attach_net", Phase.MADE, Phase.RUNNING, Phase.HELD)
        (spec,) = make_config({"net": net}).net
        return add_net(self._pc, spec, name, announce=self.phase is not Phase.MADE)

    def unplug(self, device: PciDevice | str, *, timeout: float | None = 30.0) -> None:
        """Takes a PCI device out, by itself or its name; returns when the guest has given it up.

        Raises TimeoutError if that has not come about after ``timeout`` seconds; the guest may
        still do it.
        """
        self._life.require("unplug", Phase.MADE, Phase.RUNNING)
        if self._threads.current or self._attached.current:
            raise MachineStateError(
                "a device cannot wait for its own guest", mend="unplug it on another thread"
            )
        ask = self.phase is Phase.RUNNING
        gone = self._pc.plugged.unplug(device, ask=ask, timeout=timeout)
        if gone is None:
            raise MachineStateError(
                "the machine ended before its guest gave the device up", mend="unplug it earlier"
            )
        if not gone:
            raise TimeoutError(f"the guest has not given {device!r} up within {timeout:g} s")

    def irq_source(self, gsi: int) -> InterruptWire:
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
        """Counters by group: exits by kind, the engine's, time, calls into Python, frames of each
        network card, requests of each disk."""
        counted = {net.name: net.stats() for net in self._pc.nets}
        counted |= {node.name: node.disk.stats() for node in self._pc.blocks.all()}
        return self._vm.stats() | {name: counters for name, counters in counted.items() if counters}

    def dump_core(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        begin: int | None = None,
        length: int | None = None,
        paging: bool = False,
    ) -> None:
        """Writes registers and guest memory to an ELF core file for crash and drgn.

        ``begin`` and ``length`` pick a range of physical addresses. With ``paging`` the file has
        what the vCPUs' page tables map, at its linear addresses, as gdb wants it. The machine is
        held meanwhile, and runs on if it ran. Raises HostError where the file cannot be written,
        MachineStateError while another dump is.
        """
        self.dumps.begin(path, self.held, begin, length, paging)()

    def seal_with(self, action: Callable[[], None]) -> None:
        """Has ``action`` called in start(): all is opened, and the guest has yet to run."""
        self._seal = action

    def load(self) -> None:
        """Puts the guest into memory. start() does it if you have not.

        Raises BootError for files that cannot be booted, ImageError when there is
        no such image and none can be fetched.
        """
        self._load("load")

    def start(self) -> None:
        """Lets the guest run. Returns at once."""
        self._start("start")

    def wait(self, timeout: float | None = None) -> ExitStatus:
        """Waits until the machine has ended, and says how.

        Raises TimeoutError if it still runs after ``timeout`` seconds, and what a
        device raised if that ended it.
        """
        self._life.require("wait", Phase.RUNNING, Phase.HELD, Phase.ENDED)
        return self._conclusion.wait(timeout)

    def run(self, timeout: float | None = None) -> ExitStatus:
        """start() and finish()."""
        self._start("run")
        return self.finish(timeout)

    def finish(self, timeout: float | None = None) -> ExitStatus:
        """wait(), but after ``timeout`` seconds the machine is stopped; so it is where the wait is
        cut short, as by Ctrl-C."""
        self._life.require("finish", Phase.RUNNING, Phase.HELD, Phase.ENDED)
        try:
            if not self._conclusion.wait_done(timeout):
                self._conclusion.post(ExitStatus(StopReason.TIMEOUT, f"{timeout:g} s passed"))
            return self._conclusion.wait()
        finally:
            self.stop()

    def hold(self) -> None:
        """Brings the machine to rest between two instructions, until resume().

        Its clock stands meanwhile. Raises HostError where a device does not return
        from an access, and MachineStateError from a device's own thread.
        """
        self._life.require("hold", Phase.RUNNING)
        if self._threads.current or self._attached.current:
            raise MachineStateError(
                "a device cannot hold its own machine", mend="do it on another thread"
            )
        with self._resets.lock:
            try:
                self._vm.hold()
            except EngineError as error:
                raise HostError(
                    f"the machine cannot be held: {engine_cause(error)}",
                    mend=engine_mend(error, "end the device's access"),
                ) from error
            if not self._lines.flush():
                self._vm.resume()
                raise HostError(
                    "the machine cannot be held: its console does not take what the guest sent",
                    mend="end its write()",
                )
            try:
                self._life.move(Phase.HELD, "hold")
            except MachineStateError:  # it has ended meanwhile
                self._vm.resume()
                raise
            self._events.tell("stop")

    def resume(self) -> None:
        """Lets a held machine run on. Waits for a hold() that another thread is in."""
        with self._resets.lock:
            # Also from the first phase a machine can come to run, but by start() alone.
            self._life.require("resume", Phase.HELD)
            self._life.move(Phase.RUNNING, "resume")
            self._vm.resume()
            self._resets.resumed()
            self._pc.resumed()
            self._events.tell("resume")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the machine for as long as a ``with`` statement lasts."""
        self.hold()
        try:
            yield
        finally:
            if self.phase is Phase.HELD:  # it may have been stopped
                self.resume()

    def press_power_button(self) -> None:
        """Asks the guest to switch itself off; what comes of it is the guest's."""
        self._life.require("press_power_button", Phase.RUNNING, Phase.HELD)
        self._pc.acpi.press_power_button()
        self._events.tell("powerdown")

    def reset(self) -> None:
        """Resets the machine, whatever ``on_reset`` says of its guest; returns at once.

        One that is held is reset when it is resumed. Raises MachineStateError for one that was
        restored: it has no kernel to load again.
        """
        self._life.require("reset", Phase.RUNNING, Phase.HELD)
        self._resets.request()

    def request_stop(self, detail: str = "") -> None:
        """Asks the machine to end; returns at once. From any thread or signal handler.

        ``detail`` is what the status says of it.
        """
        self._conclusion.post(ExitStatus(StopReason.STOPPED, detail))

    def agent(self, timeout: float = AGENT_S) -> AgentStream:
        """A connection with the guest's agent, for one command. Raises MachineStateError for a
        machine without ``agent=True`` or ``vsock=``."""
        self._life.require("agent", Phase.RUNNING, Phase.HELD, Phase.ENDED)
        if self.config.vsock is None:
            raise MachineStateError(
                "the machine has no way to an agent in its guest", mend="make it with agent=True"
            )
        alive = (Phase.RUNNING, Phase.HELD)
        return connect_agent(self.config.vsock, timeout, lambda: self.phase in alive)

    def shut_down(self, grace: float = 90.0) -> ExitStatus:
        """Presses the power button, again every 10 s, and stops the machine where its guest has not
        switched itself off after ``grace`` seconds. A machine that is held is resumed."""
        self._life.require("shut_down", Phase.RUNNING, Phase.HELD, Phase.ENDED)
        deadline = time.monotonic() + grace
        while (left := deadline - time.monotonic()) > 0:
            with suppress(MachineStateError):  # it runs, or has ended
                self.resume()
            with suppress(MachineStateError):
                self.press_power_button()
            if self._conclusion.wait_done(min(left, _PRESS_AGAIN_S)):
                break
        self.stop()
        return self.wait()

    def stop(self) -> None:
        """Ends the machine, as pulling its plug would. Without effect if it has ended."""
        if self.phase not in (Phase.RUNNING, Phase.HELD):
            return
        self.request_stop()
        # A device's own thread, or a console that is being closed, has to return first.
        inside = (self._threads, self._lines, self._attached, self._breakpoints)
        if not self._conclusion.keeping and not any(thread.current for thread in inside):
            self._conclusion.wait_done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if self.phase is Phase.MADE:
            self._discard()

    @property
    def aio(self) -> AsyncMachine:
        """It in coroutines: what waits is awaited. ``async with`` gives the same."""
        from tetrarch.aio import AsyncMachine

        return AsyncMachine(self)

    async def __aenter__(self) -> AsyncMachine:
        return self.aio

    async def __aexit__(self, *error: object) -> None:
        await self.aio.__aexit__(*error)

    # Saved machines.

    def save(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        parent: str | os.PathLike[str] | Parent | None = None,
        track: bool = False,
    ) -> None:
        """Writes all of the machine to a file, from which ``restore`` makes one that goes on.

        It is held meanwhile, and runs on if it ran. Devices of yours need ``save`` and ``load``.
        Raises HostError where the file cannot be written: then there is none. One that is open
        already has to be empty.

        With ``track`` the machine notes what is written from then on, and the next file may have
        this one as its ``parent``: it has no more of memory than that, and lies beside it.
        """
        self._life.require("save", Phase.RUNNING, Phase.HELD)
        if parent is not None and not isinstance(parent, Parent):
            child = Path(path) if isinstance(path, (str, os.PathLike)) else None
            parent = parent_of(Path(parent), child)
        if parent is not None and parent.identity != self._tracked:
            raise MachineStateError(
                f"what was written since {parent.file} has not been noted",
                mend="give the file that was saved last as parent, if that was with track",
            )
        with ExitStack() as stack:
            if isinstance(path, (str, os.PathLike)):
                path = stack.enter_context(new_file(Path(path), "save the machine"))
            if self.phase is not Phase.HELD:
                stack.enter_context(self.held())
            if self._conclusion.decided:
                # The event is no state of the machine: one that goes on from the file never had it.
                raise MachineStateError(
                    "the machine cannot be saved: its guest is switching it off or resetting it",
                    mend="resume it; after a reset save it again",
                )
            identity = save_machine(self._parts(), path, parent)
            if track:
                self._vm.log_writes()
                self._tracked = identity

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        *,
        engine: EngineName | None = None,
        name: str | None = None,
        console: ConsoleBackend | str | None = None,
        platform: Platform = PC,
        disk: DiskOption | Sequence[DiskOption] = (),
        cdrom: CdromOption | Sequence[CdromOption] = (),
        net: NetOption | Sequence[NetOption] = (),
        vsock: str | os.PathLike[str] | None = None,
        virtio_console: PortOption | Sequence[PortOption] = (),
        firmware: str | os.PathLike[str] | None = None,
        control: str | os.PathLike[str] | None = None,
        gdb: GdbOption | None = None,
        gdb_wait: bool = False,
        fresh_identity: bool = False,
        changed_disks: bool = False,
        vm: EngineVm | None = None,
    ) -> Self:
        """A machine as it was saved; start() lets it go on from there.

        ``engine`` and ``name`` are those of the saved machine if they are not given. What is the
        host's is not in the file: give ``disk`` and ``cdrom``, as they were then, ``net``,
        ``vsock``, ``virtio_console`` and ``firmware`` where it had them, and attach devices of
        yours before start(). Its connections by vsock are gone.

        With ``fresh_identity`` it goes on as another machine: its guest is told by the generation
        ID, and its network cards have new addresses; docs/snapshots.md. Disks that have changed
        since are refused without ``changed_disks``.

        Raises StateError for a file that is no saved machine, or damaged.
        """
        with opened(Path(path), platform.name) as saved:
            about = saved.about
            given = {
                "engine": engine,
                "name": name,
                "disk": disk,
                "cdrom": cdrom,
                "net": net,
                "vsock": vsock,
                "virtio_console": virtio_console,
                "firmware": firmware,
                "control": control,
                "gdb": gdb,
                "gdb_wait": gdb_wait,
            }
            config = about.config.updated({key: value for key, value in given.items() if value})
            about.outside.require(config)
            if not changed_disks:
                check_flush_points(about.disks, about.outside.images(config))
            start = about.outside.from_the_start(config)
            machine = cls(start, console=console, platform=platform, vm=vm)
            try:
                about.outside.plug_later(machine._pc, config)
                # Its clock stands until start().
                machine._vm.hold()
                if fresh_identity:
                    renew_cards(machine._pc)
                restore_machine(machine._parts(), saved)
                if machine._pc.firmware is not None:
                    machine._pc.firmware.tell(machine.config, "", machine._pc.dsdt)
                elif fresh_identity:
                    change_generation(machine._vm, machine._pc.acpi)
            except BaseException:
                machine._discard()
                raise
        machine._life.take_up(about.uptime)
        machine._loaded = machine._restored = True
        return machine

    # What happens inside.

    def _parts(self) -> MachineParts:
        vcpus = [self._vm.vcpu(index) for index in range(self.config.cpus)]
        return MachineParts(
            self.config,
            self.engine,
            self._platform.name,
            self.uptime,
            self._vm,
            vcpus,
            self._pc,
            self._attached,
        )

    def _load(self, what: str) -> None:
        self._life.require(what, Phase.MADE)
        if not self._loaded:
            self.config = resolve_guest(self.config)
            load = partial(
                load_guest,
                self._vm,
                self.config,
                self._backend,
                self._platform,
                self._pc.dsdt,
                self._pc.firmware,
            )
            load()
            self._resets.load = load
            self._loaded = True

    def _start(self, what: str) -> None:
        self._load(what)
        self._attached.require_all()
        self._pc.plugged.require_all()
        self._life.move(Phase.RUNNING, what)
        try:
            self._lines.start()
        except BaseException as error:
            self._conclusion.settle(error, self._descent.close)
            raise
        self._conclusion.keep(
            self.config.name, self._resets.survive, self._descent.stop, self._descent.close
        )
        try:
            if self._seal is not None:
                self._seal()
                self.confined = True
        except BaseException as error:
            self._conclusion.post(error)
        self._threads.start()
        if self._restored:
            self._vm.resume()

    def _discard(self) -> None:
        """Ends a machine that was never started."""
        self._pc.close()
        self._attached.close()
        self._conclusion.settle(ExitStatus(StopReason.STOPPED), self._descent.close)


@dataclass(frozen=True)
class _Descent:
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
        self.breakpoints.close()
        for gdb in self.gdb:
            gdb.close(event.code if isinstance(event, ExitStatus) else 1)


def _panicked(events: Events, end: Callable[[Event], None], message: str) -> None:
    events.tell("guest-panicked", action="poweroff")
    end(ExitStatus(StopReason.CRASHED, message))


def _own_directory(machine: Machine) -> str:
    """One that goes with the machine's object, in the process that has made it."""
    path, process = tempfile.mkdtemp(prefix="tetrarch-", dir=socket_place()), os.getpid()

    def remove() -> None:
        if os.getpid() == process:
            shutil.rmtree(path, ignore_errors=True)

    weakref.finalize(machine, remove)
    return path


def _if_it_can(method: Callable[[], None]) -> Callable[[], None]:
    """Calls a machine's method where the machine is there and in a state for that."""
    known = weakref.WeakMethod(method)

    def call() -> None:
        if (bound := known()) is not None:
            with suppress(MachineStateError):
                bound()

    return call


def _holder(machine: Machine) -> OnStop:
    """Holds the machine for a disk; it may be gone, held or ended by then."""
    known = weakref.ref(machine)
    # Several disks may fail at once.
    turn = threading.Lock()

    def hold(cause: str, waits: Callable[[], bool]) -> None:
        with turn:
            # Where the machine was held and resumed meanwhile, the write was tried again.
            while waits() and not _hold_for(known(), cause):
                time.sleep(_HOLD_AGAIN_S)

    return hold


def _hold_for(machine: Machine | None, cause: str) -> bool:
    """False: to be tried again."""
    if machine is None:
        return True
    log = MachineLog(machine.config.name)
    try:
        machine.hold()
    except MachineStateError:  # it has ended, or who holds it will resume it, as here
        return True
    except HostError as error:
        log.warning("%s; %s", cause, error)
        return False
    # Now and not before: who reads it may resume the machine at once.
    log.warning(
        "%s; the machine is held: mend it on the host and resume() it, or kill -CONT %d",
        cause,
        os.getpid(),
    )
    return True


def _configured(
    config: MachineConfig | None, console: ConsoleBackend | str | None, options: MachineOptions
) -> MachineConfig:
    values: dict[str, Any] = {**options}
    if isinstance(console, str):
        values["console"] = console
    config = make_config(values) if config is None else config.updated(values)
    check_recorded(config)
    check_files(config)
    return replayed(config)


def _open_console(console: ConsoleBackend | str | None, spec: ConsoleSpec | None) -> ConsoleBackend:
    if console is None or isinstance(console, str):
        return MemoryConsole() if spec is None else spec.open()
    try:
        require_console(console)
    except ValueProblem as problem:
        raise ConfigError(f"console: {problem.cause}", mend=problem.mend) from None
    return console


def _open_ports(specs: Sequence[PortSpec]) -> list[ConsoleBackend]:
    opened: list[ConsoleBackend] = []
    try:
        for spec in specs:
            opened.append(spec.open())
    except BaseException:
        for backend in opened:
            backend.close()
        raise
    return opened
