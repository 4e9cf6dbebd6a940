"""A machine as a Python object: made, started, talked to, ended."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, Unpack

from tetrarch.agent import AgentStream
from tetrarch.agent import connect as connect_agent
from tetrarch.agent.guest import AGENT_S, AgentMethods
from tetrarch.console import ConsoleBackend, MemoryConsole
from tetrarch.console.spec import ConsoleSpec, PortSpec, require_console
from tetrarch.devices.input_user import InputUser
from tetrarch.errors import ConfigError, MachineStateError, ValueProblem
from tetrarch.gdb.spec import GdbSpec
from tetrarch.machine.balloon import Balloon
from tetrarch.machine.config import (
    CdromOption,
    DiskOption,
    DisplayOption,
    EngineName,
    FloppyOption,
    GdbOption,
    MachineConfig,
    MachineOptions,
    NetOption,
    PortOption,
    make_config,
)
from tetrarch.machine.cpu import GuestCpu, cpu_for
from tetrarch.machine.debugging import DebugMethods
from tetrarch.machine.devices import DeviceMethods
from tetrarch.machine.engine_vm import EngineVm, create_vm
from tetrarch.machine.event_stream import EventStream
from tetrarch.machine.events import EventName, MachineEvent
from tetrarch.machine.forgotten import forget, make_room
from tetrarch.machine.guest import check_files, with_installed_disk
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.pc import Pc
from tetrarch.machine.recording import RecordingEnd, check_recorded, replayed
from tetrarch.machine.saving import SaveMethods
from tetrarch.machine.selection import chosen
from tetrarch.machine.status import ExitStatus
from tetrarch.platforms.named import PlatformName, named_platform
from tetrarch.platforms.platform import Platform
from tetrarch.sockets import SocketDirectory
from tetrarch.vnc.spec import DisplaySpec

if TYPE_CHECKING:
    from tetrarch.aio import AsyncMachine
    from tetrarch.display import Display, Screen
    from tetrarch.gdb.server import GdbServer
    from tetrarch.platforms.vmware import GuestInfo, Tools, Vmware
    from tetrarch.vnc.server import VncServer

__all__ = ["Machine"]


class Machine(DeviceMethods, DebugMethods, SaveMethods, AgentMethods):
    """One virtual machine.

        with Machine(kernel="vmlinuz", initrd="initrd.gz", memory="512M") as vm:
            vm.start()
            vm.console.expect("login:")

    What it is made of is a ``MachineConfig``, or its fields as keywords, listed
    below. ``console`` is the other end of the serial line: an object, or as the
    configuration writes it; None is one for programs, ``vm.console``. ``platform`` is
    which hypervisor's interface the guest finds: one of yours, or a name. ``agent``: programs can
    run commands in the guest (``exec``), over a vsock socket of the machine's own. ``guest_cpu``
    is what its CPU is to be where ``cpu`` does not say it: as another machine's was. ``vm`` is a
    stand-in for the engine, for tests.

    Raises ConfigError for a value that cannot be, HostError when this host cannot
    give what is asked. A machine runs once.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        console: ConsoleBackend | str | None = None,
        platform: Platform | PlatformName | None = None,
        agent: bool = False,
        guest_cpu: GuestCpu | None = None,
        vm: EngineVm | None = None,
        **options: Unpack[MachineOptions],
    ) -> None:
        config = with_installed_disk(_configured(config, console, platform, options))
        if agent and config.vsock is None:
            config = config.updated({"vsock": _own_directory(self) / "vsock"})
        # A stand-in has none.
        self._ram = 0 if vm else config.memory
        make_room(self._ram)
        if vm is None:
            engine, self.engine_reason = chosen(config)
            platform = _platform(platform, config, engine)
            if guest_cpu is None:
                guest_cpu = cpu_for(config.cpu, engine, platform)
            vm = create_vm(engine, config, platform, guest_cpu)
        else:
            engine, self.engine_reason = type(vm).__name__, "as given"
            platform = _platform(platform, config, engine)
        backend = _open_console(console, config.console)
        ports = _open_ports(config.virtio_console)
        super().__init__(config, engine, vm, platform, backend, ports)
        for variable in config.guestinfo:
            name, _, value = variable.partition("=")
            self.guestinfo[name] = value
        if self.config.control is not None:
            self.serve_control(self.config.control)
        if self.config.gdb is not None:
            self.serve_gdb(self.config.gdb, wait=self.config.gdb_wait)
        if self.config.display is not None:
            self.serve_display(self.config.display)

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
        if self.phase in (Phase.RUNNING, Phase.PAUSED):
            warnings.warn(
                f"{self!r} was forgotten while it ran: use it in a with statement, or kill() it",
                ResourceWarning,
                source=self,
                stacklevel=1,
            )
            self.request_stop()  # the keeper does the rest
        elif self.phase is Phase.MADE:
            self._discard()
        forget(self._ram)

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
    def balloon(self) -> Balloon:
        """By which the guest gives memory back: ``target``, ``actual``, ``stats()``."""
        if self._pc.balloon is None:
            raise MachineStateError("this machine has no balloon", mend="make it with balloon=True")
        return self._pc.balloon

    @property
    def inputs(self) -> tuple[InputUser, ...]:
        """The keyboards, mice and tablets of ``input=``, in its order."""
        return tuple(self._pc.inputs)

    def screen(self) -> Screen:
        """What its screen shows; with ``vga``, ``screen`` or ``display`` alone."""
        return self._shown().screen()

    def _shown(self) -> Display:
        if self._watched is None:
            from tetrarch.machine.shown import display_of

            self._watched = display_of(self._pc, self._vm.read_memory)
        return self._watched

    @property
    def pc(self) -> Pc:
        """Its devices."""
        return self._pc

    @property
    def vcpu_threads(self) -> list[int]:
        """The host's numbers of the threads that run the vCPUs, while they do, in the order of
        ``vcpus``."""
        return list(self._threads.native_ids.values())

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

        self._life.require("serve_control", Phase.MADE, Phase.RUNNING, Phase.PAUSED)
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
        socket. With ``wait`` the machine is paused until gdb lets it run. Raises HostError where it
        cannot listen there, MachineStateError where it does already.
        """
        from tetrarch.gdb.server import GdbServer

        self._life.require("serve_gdb", Phase.MADE, Phase.RUNNING, Phase.PAUSED)
        if self._gdb:
            raise MachineStateError(
                f"the machine has a place for gdb, {self._gdb[0].address}", mend="use that"
            )
        try:
            spec = GdbSpec.parse(where)
        except ValueProblem as problem:
            raise ConfigError(f"gdb: {problem.cause}", mend=problem.mend) from None
        server = GdbServer(self, self._debugger_port, spec, wait=wait)
        self._gdb.append(server)
        if self.phase is Phase.ENDED:  # meanwhile
            server.close()
        return server

    @property
    def display(self) -> VncServer | None:
        """Where viewers find its screen, if they do."""
        return self._displays[0] if self._displays else None

    def serve_display(self, where: DisplayOption = "vnc=0") -> VncServer:
        """Shows the screen to viewers, and lets them use keyboard and pointer, until the machine
        has ended; ``address`` of what it gives is where they find it. See docs/screen.md.

        ``where`` is "vnc=" and a TCP port of this host, 0 for a free one, "HOST:PORT", or the path
        of a Unix socket. Raises HostError where it cannot listen there, MachineStateError where it
        does already, and for a machine without a screen.
        """
        from tetrarch.vnc.hands import Hands
        from tetrarch.vnc.server import VncServer

        self._life.require("serve_display", Phase.MADE, Phase.RUNNING, Phase.PAUSED)
        if self._displays:
            raise MachineStateError(
                f"the machine has a display, {self._displays[0].address}", mend="use that"
            )
        try:
            spec = DisplaySpec.parse(where)
        except ValueProblem as problem:
            raise ConfigError(f"display: {problem.cause}", mend=problem.mend) from None
        vmware = self._platform.vmware
        pointers = () if vmware is None else (vmware.mouse,)
        server = VncServer(self.config.name, self._shown(), Hands(self._pc.inputs, pointers), spec)
        self._displays.append(server)
        if self.phase is Phase.ENDED:  # meanwhile
            server.close()
        return server

    def stats(self) -> dict[str, dict[str, int]]:
        """Counters by group: exits by kind, the engine's, time, calls into Python, frames of each
        network card, requests of each disk."""
        counted = {net.name: net.stats() for net in self._pc.nets}
        counted |= {node.name: node.disk.stats() for node in self._pc.blocks.all()}
        return self._vm.stats() | {name: counters for name, counters in counted.items() if counters}

    def agent(self, timeout: float = AGENT_S) -> AgentStream:
        """A connection with the guest's agent, for one command. Raises MachineStateError for a
        machine without ``agent=True`` or ``vsock=``."""
        self._life.require("agent", Phase.RUNNING, Phase.PAUSED, Phase.ENDED)
        if self.config.vsock is None:
            raise MachineStateError(
                "the machine has no way to an agent in its guest", mend="make it with agent=True"
            )
        alive = (Phase.RUNNING, Phase.PAUSED)
        return connect_agent(
            self.config.vsock,
            timeout,
            lambda: self.phase in alive,
            lambda: self.phase is Phase.PAUSED,
        )

    @property
    def aio(self) -> AsyncMachine:
        """It in coroutines: what waits is awaited. ``async with`` gives the same, started."""
        from tetrarch.aio import AsyncMachine

        return AsyncMachine(self)

    async def __aenter__(self) -> AsyncMachine:
        return await self.aio.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        await self.aio.__aexit__(*error)

    @property
    def guestinfo(self) -> GuestInfo:
        """The variables that VMware's guests share with their host; docs/vmware.md. Raises
        MachineStateError on another platform."""
        return self._vmware.guestinfo

    @property
    def tools(self) -> Tools:
        """The guest's open-vm-tools. Raises MachineStateError on another platform than VMware's."""
        return self._vmware.tools

    @property
    def _vmware(self) -> Vmware:
        if self._platform.vmware is None:
            raise MachineStateError(
                f"the machine's platform, {self._platform.name}, has nothing of VMware's",
                mend="make it with the platform vmware",
            )
        return self._platform.vmware

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        *,
        engine: EngineName | None = None,
        name: str | None = None,
        console: ConsoleBackend | str | None = None,
        platform: Platform | None = None,
        disk: DiskOption | Sequence[DiskOption] = (),
        cdrom: CdromOption | Sequence[CdromOption] = (),
        floppy: FloppyOption | Sequence[FloppyOption] = (),
        net: NetOption | Sequence[NetOption] = (),
        vsock: str | os.PathLike[str] | None = None,
        virtio_console: PortOption | Sequence[PortOption] = (),
        firmware: str | os.PathLike[str] | None = None,
        control: str | os.PathLike[str] | None = None,
        gdb: GdbOption | None = None,
        gdb_wait: bool = False,
        display: DisplayOption | None = None,
        fresh_identity: bool = False,
        changed_disks: bool = False,
        vm: EngineVm | None = None,
    ) -> Self:
        """A machine as it was saved; start() lets it go on from there.

        ``engine`` and ``name`` are those of the saved machine if they are not given. What is the
        host's is not in the file: give ``disk``, ``cdrom``, ``floppy``, as they were then, ``net``,
        ``vsock``, ``virtio_console`` and ``firmware`` where it had them, and attach devices of
        yours before start(). Its connections by vsock are gone.

        With ``fresh_identity`` it goes on as another machine: its guest is told by the generation
        ID, and its network cards have new addresses; docs/snapshots.md. Disks that have changed
        since are refused without ``changed_disks``.

        Raises StateError for a file that is no saved machine, or damaged.
        """
        from tetrarch.machine.flush_points import check_flush_points
        from tetrarch.machine.snapshot import opened

        with opened(Path(path), None if platform is None else platform.name) as saved:
            given = {
                "engine": engine,
                "name": name,
                "disk": disk,
                "cdrom": cdrom,
                "floppy": floppy,
                "net": net,
                "vsock": vsock,
                "virtio_console": virtio_console,
                "firmware": firmware,
                "control": control,
                "gdb": gdb,
                "gdb_wait": gdb_wait,
            }
            about = saved.about
            config = about.config.updated({key: value for key, value in given.items() if value})
            about.outside.require(config)
            if not changed_disks:
                check_flush_points(about.disks, about.outside.images(config))
            start = about.outside.from_the_start(config)
            # Its kernel has looked once: what it did not find is not to be had now.
            machine = cls(start, console=console, platform=platform, guest_cpu=about.cpu, vm=vm)
            if display is not None:
                machine.serve_display(display)
            machine._take_up(saved, config, fresh_identity)
        return machine


def _own_directory(machine: Machine) -> Path:
    """One that goes with the machine's object."""
    directory = SocketDirectory()
    weakref.finalize(machine, directory.close)
    return directory.path


def _platform(
    given: Platform | PlatformName | None, config: MachineConfig, engine: str
) -> Platform:
    platform = given if isinstance(given, Platform) else named_platform(config.platform, engine)
    if config.guestinfo and platform.vmware is None:
        raise ConfigError(
            f"a guest on platform {platform.name} has no guestinfo",
            mend="give platform vmware too",
        )
    return platform


def _configured(
    config: MachineConfig | None,
    console: ConsoleBackend | str | None,
    platform: Platform | PlatformName | None,
    options: MachineOptions,
) -> MachineConfig:
    values: dict[str, Any] = {**options}
    if isinstance(platform, str):
        values["platform"] = platform
    if isinstance(console, str):
        values["console"] = console
    config = make_config(values) if config is None else config.updated(values)
    check_recorded(config)
    check_files(config)
    return replayed(config).with_seat()


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
