"""A machine that another process runs, with the methods of one of this."""

from __future__ import annotations

import base64
import os
import secrets
import signal
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from tetrarch.agent import AgentError, AgentStream
from tetrarch.agent import connect as connect_agent
from tetrarch.agent.capture import Completed
from tetrarch.agent.guest import AGENT_S, AgentMethods
from tetrarch.control.client import Client
from tetrarch.errors import HostError, MachineStateError, TetrarchError
from tetrarch.machine.breakpoints import Breakpoint, Hit
from tetrarch.machine.config import DiskOption, NetOption, make_config
from tetrarch.machine.event_stream import EventStream
from tetrarch.machine.events import EventName, Events, MachineEvent
from tetrarch.machine.lifecycle import PRESS_AGAIN_S, STOP_GRACE_S, Phase
from tetrarch.machine.memory import PhysicalMemory
from tetrarch.machine.new_file import new_file
from tetrarch.machine.snapshot import parent_of
from tetrarch.machine.steered import PauseMethods
from tetrarch.machine.vcpu import VcpuView
from tetrarch.registry import About, find
from tetrarch.registry.claim import log_path, remove_if_dead
from tetrarch.registry.listing import alive
from tetrarch.remote.breakpoints import RemoteBreakpoints
from tetrarch.remote.console import RemoteConsole
from tetrarch.remote.disks import attach_disk, detach
from tetrarch.remote.engine import RemoteVcpu, RemoteVm
from tetrarch.remote.events import RemoteEvents, report
from tetrarch.remote.networks import attach_net
from tetrarch.remote.process import MachineProcess
from tetrarch.remote.replay import RemoteReplay
from tetrarch.remote.vcpus import plug_vcpu, vcpu_name

if TYPE_CHECKING:
    from tetrarch.aio import AsyncRemoteMachine
    from tetrarch.display.screen import Screen
    from tetrarch.remote.vmware import RemoteGuestInfo, RemoteTools

__all__ = ["Completed", "RemoteMachine", "connect", "is_paused", "replays"]

#: What a process takes to end its machine, however busy its host.
_END_S: Final = 10.0
#: Until a guest has given a device up.
_DETACH_S: Final = 30.0
#: By their names in QMP.
_PHASES: Final = {
    "prelaunch": Phase.MADE,
    "running": Phase.RUNNING,
    "paused": Phase.PAUSED,
    "shutdown": Phase.ENDED,
}


def connect(name: str) -> RemoteMachine:
    """The machine of this user that runs under a name.

    Raises HostError where there is none, ConfigError for what is no name.
    """
    return RemoteMachine(find(name))


class RemoteMachine(PauseMethods, AgentMethods):
    """A machine that another process runs; ``tetrarch.connect`` gives one.

        vm = tetrarch.connect("web")
        vm.console.expect("login:")
        print(vm.exec(["uname", "-r"]).stdout)
        vm.stop()

    It goes on when this object is forgotten. Each method raises HostError once the machine's
    process has ended or does not answer, and ControlError for what the machine refuses.
    """

    def __init__(self, about: About) -> None:
        self.about = about
        """What the registry says of it."""
        self._console: RemoteConsole | None = None
        self._events: RemoteEvents | None = None
        self._points: RemoteBreakpoints | None = None
        self._lock = threading.Lock()
        """Guards the two above."""
        self.memory = PhysicalMemory(RemoteVm(partial(_connected, about)))
        """RAM by guest physical address; a range is a copy of that moment."""

    def __repr__(self) -> str:
        return f"<RemoteMachine {self.name!r}, process {self.about.pid}>"

    @property
    def name(self) -> str:
        return self.about.name

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return alive(self.name)

    @property
    def console(self) -> RemoteConsole:
        """The serial line. Raises MachineStateError where it goes to no shared console."""
        if self._console is None:
            if self.about.console is None:
                raise MachineStateError(
                    f"the console of {self.name} is {self.about.console_goes}", mend="use that"
                )
            self._console = RemoteConsole(self.about.console)
        return self._console

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float | None = 60
    ) -> Any:
        """One command of QMP, on a connection of its own; what it returns."""
        with self._client(_END_S if timeout is None else min(timeout, _END_S)) as client:
            return client.execute(command, arguments, timeout=timeout)

    def _client(self, timeout: float = _END_S) -> Client:
        return _connected(self.about, timeout)

    @property
    def phase(self) -> Phase:
        """Where it is in its life: made, running, paused, ended."""
        try:
            status = self.execute("query-status", timeout=_END_S)["status"]
        except HostError:
            if self.alive:
                raise
            return Phase.ENDED
        return _PHASES[status]

    @property
    def uptime(self) -> float:
        """Seconds for which the machine has run."""
        return float(self.execute("x-stats")["uptime_s"])

    @property
    def resets(self) -> int:
        """How often the machine was reset and has started anew."""
        return int(self.execute("x-stats")["resets"])

    def pause(self) -> None:
        """Brings it to rest between two instructions, until resume()."""
        self.execute("stop")

    def resume(self) -> None:
        """Lets a paused machine run on."""
        self.execute("cont")

    def reset(self) -> None:
        """Resets the machine, whatever it was told of resets by its guest; returns at once."""
        self.execute("system_reset")

    def press_power_button(self) -> None:
        """Asks the guest to switch itself off; what comes of it is the guest's."""
        self.execute("system_powerdown")

    def stats(self) -> dict[str, Any]:
        """Counters by group, as ``Machine.stats()`` gives them."""
        return dict(self.execute("x-stats")["stats"])

    def logs(self) -> str:
        """What the machine's process has reported, also after its end; of one in the background."""
        try:
            return log_path(self.name).read_text(errors="backslashreplace")
        except FileNotFoundError:
            raise HostError(
                f"there is no log of {self.name}", mend="machines in the background write one"
            ) from None

    @property
    def guestinfo(self) -> RemoteGuestInfo:
        """As ``Machine.guestinfo``."""
        from tetrarch.remote.vmware import RemoteGuestInfo

        return RemoteGuestInfo(self.execute)

    @property
    def tools(self) -> RemoteTools:
        """As ``Machine.tools``."""
        from tetrarch.remote.vmware import RemoteTools

        return RemoteTools(self.execute)

    # A look inside.

    @property
    def vcpus(self) -> tuple[VcpuView, ...]:
        """The virtual CPUs: their registers and memory as they have it mapped, at any time."""
        numbers = [cpu["cpu-index"] for cpu in self.execute("query-cpus-fast")]
        connect = partial(_connected, self.about)
        vm = RemoteVm(connect)
        return tuple(VcpuView(vm, RemoteVcpu(connect, number), number) for number in numbers)

    def breakpoint(
        self,
        address: int,
        listener: Callable[[Hit], object] | None = None,
        *,
        hardware: bool = False,
        vcpu: int = 0,
    ) -> Breakpoint:
        """As ``Machine.breakpoint``. What a listener raises is reported as that of any thread. The
        machine's breakpoints are gone when this object is, or its process."""
        how = {"hardware": hardware, "cpu-index": vcpu}
        return self._breakpoints().add("execute", address, 1, listener, **how)

    def watchpoint(
        self,
        address: int,
        length: int,
        listener: Callable[[Hit], object] | None = None,
        *,
        access: Literal["write", "access"] = "write",
    ) -> Breakpoint:
        """As ``Machine.watchpoint``."""
        return self._breakpoints().add(access, address, length, listener)

    @property
    def replay(self) -> RemoteReplay:
        """The way through its recording, of a machine that replays."""
        return RemoteReplay(self.execute)

    def _breakpoints(self) -> RemoteBreakpoints:
        with self._lock:
            if self._points is None:
                # Not this object: it may be forgotten.
                connect = partial(_connected, self.about)
                vm = RemoteVm(connect)
                self._points = RemoteBreakpoints(
                    self._client(),
                    lambda index: VcpuView(vm, RemoteVcpu(connect, index), index),
                    partial(_resume, self.about),
                    report,
                )
                weakref.finalize(self, self._points.close)
            return self._points

    def dump_core(
        self,
        path: str | os.PathLike[str],
        *,
        begin: int | None = None,
        length: int | None = None,
        paging: bool = False,
    ) -> None:
        """As ``Machine.dump_core``: registers and guest memory in an ELF core file."""
        arguments: dict[str, Any] = {"protocol": "fd:core", "paging": paging}
        arguments |= {} if begin is None else {"begin": begin}
        arguments |= {} if length is None else {"length": length}
        with self._client() as client, new_file(Path(path), "dump guest memory") as file:
            client.execute("getfd", {"fdname": "core"}, descriptors=[file.fileno()])
            client.execute("dump-guest-memory", arguments)

    def screen(self) -> Screen:
        """What its screen shows; with ``--vga``, ``--screen`` or ``--display`` alone."""
        from tetrarch.display.screen import Screen

        shown = self.execute("x-screen")
        return Screen.of_png(base64.b64decode(shown["png"]), shown["text"])

    # What happens to it.

    def on(self, event: EventName, listener: Callable[[MachineEvent], object]) -> None:
        """Calls ``listener`` with each such event from now on, one at a time, on a thread of
        their own. What it raises is reported as that of any thread (``threading.excepthook``).

        The events are those of ``Machine.on``.
        """
        self._told().on(event, listener)

    def events(self, *names: EventName) -> EventStream[MachineEvent]:
        """The events of these names, or all, from now on: for ``for`` and ``async for``, which
        end with the machine."""
        return self._told().stream(*names)

    def _told(self) -> Events:
        with self._lock:
            if self._events is None:
                self._events = RemoteEvents(self._client())
                weakref.finalize(self, self._events.close)
            return self._events.told

    def wait(self, timeout: float | None = None) -> None:
        """Until it has ended. Raises TimeoutError if it still runs after ``timeout`` seconds."""
        with MachineProcess(self.about) as process:
            if not process.wait(timeout):
                raise TimeoutError(f"{self.name} still runs after {timeout:g} s")
        remove_if_dead(self.name)

    def stop(self, grace: float = STOP_GRACE_S) -> bool:
        """Presses the power button, and ends the machine where its guest has not switched itself
        off after ``grace`` seconds. False: it was ended so."""
        deadline = time.monotonic() + grace
        if replays(self):
            deadline = 0.0  # its guest hears nothing
        with MachineProcess(self.about) as process:
            with suppress(TetrarchError, TimeoutError):
                self.resume()  # one that stands would not see it
            while (left := deadline - time.monotonic()) > 0:
                # It does not answer, or is on its way.
                with suppress(TetrarchError, TimeoutError):
                    self.press_power_button()
                if process.wait(min(left, PRESS_AGAIN_S)):
                    remove_if_dead(self.name)
                    return True
        self.kill()
        return False

    def kill(self) -> None:
        """Ends the machine at once, as pulling its plug would; its process is killed where it does
        not see to that."""
        with MachineProcess(self.about) as process:
            try:
                self.execute("quit", timeout=_END_S)
            except (TetrarchError, TimeoutError):  # it starts, is about to end, or does not answer
                process.signal(signal.SIGTERM)
            if not process.wait(_END_S):
                process.signal(signal.SIGKILL)
                process.wait()
        remove_if_dead(self.name)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        parent: str | os.PathLike[str] | None = None,
        track: bool = False,
    ) -> None:
        """Writes all of the machine to a file, from which ``Machine.restore`` makes one that goes
        on. It stands meanwhile. ``parent`` and ``track`` are those of ``Machine.save``.

        Raises HostError where the file cannot be written, ControlError for a machine that cannot
        be saved: then there is none.
        """
        arguments: dict[str, Any] = {"protocol": "fd:saved", "track": track}
        if parent is not None:
            known = parent_of(Path(parent), Path(path))
            arguments |= {"parent": known.identity, "parent-file": known.file}
        # A confined machine opens no file: it is given one.
        with self._client() as client, new_file(Path(path), "save the machine") as file:
            client.execute("getfd", {"fdname": "saved"}, descriptors=[file.fileno()])
            client.execute("x-save", arguments)

    def close(self) -> None:
        """Leaves its console, its events and breakpoints. The machine goes on, as it does when this
        object is forgotten."""
        with self._lock:
            events, self._events = self._events, None
            points, self._points = self._points, None
        for one in (events, points):
            if one is not None:
                one.close()
        if self._console is not None:
            self._console.close()
            self._console = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def aio(self) -> AsyncRemoteMachine:
        """It in coroutines: what waits is awaited. ``async with`` gives the same."""
        from tetrarch.aio import AsyncRemoteMachine

        return AsyncRemoteMachine(self)

    async def __aenter__(self) -> AsyncRemoteMachine:
        return self.aio

    async def __aexit__(self, *error: object) -> None:
        self.close()

    # Devices that come and go.

    def attach_disk(self, disk: DiskOption, *, name: str | None = None) -> str:
        """Puts a disk in, as ``--disk`` is written, and gives the device's name.

        Raises ConfigError for what a disk that comes later cannot be.
        """
        spec = make_config({"disk": disk}).disk[0]
        name = name or f"disk-{secrets.token_hex(4)}"
        with self._client() as client:
            attach_disk(client, spec, name)
        return name

    def attach_net(self, net: NetOption, *, name: str | None = None) -> str:
        """Puts a network card in, as ``--net`` is written, and gives the device's name.

        Raises ConfigError for what a card that comes later cannot be, ControlError where the
        machine does not get the network; one that is confined opens none but those of sockets.
        """
        (spec,) = make_config({"net": net}).net
        name = name or f"net-{secrets.token_hex(4)}"
        with self._client() as client:
            attach_net(client, spec, name)
        return name

    def detach(self, device: str, *, timeout: float = _DETACH_S) -> None:
        """Takes a device out when the guest has given it up. Raises HostError where it has not
        after ``timeout`` seconds; it may still do it."""
        with self._client() as client:
            detach(client, device, timeout)

    def plug_vcpu(self, number: int | None = None) -> int:
        """Puts a CPU into the machine, the first that is not in it if none is named, and gives its
        number. Raises MachineStateError where all are in it that it can have, ControlError where it
        refuses one."""
        with self._client() as client:
            return plug_vcpu(client, number)

    def unplug_vcpu(self, number: int, *, timeout: float = _DETACH_S) -> None:
        """Takes a CPU out when the guest has given it up. Raises HostError where it has not after
        ``timeout`` seconds; it may still do it."""
        with self._client() as client:
            detach(client, vcpu_name(client, number), timeout)

    # The guest's agent.

    def agent(self, timeout: float = AGENT_S) -> AgentStream:
        """A connection with the guest's agent, for one command."""
        if self.about.vsock is None:
            raise AgentError(f"{self.name} has no vsock socket", "start it again")
        return connect_agent(self.about.vsock, timeout, lambda: self.alive, lambda: is_paused(self))


def is_paused(machine: RemoteMachine) -> bool:
    """Whether it says so; one that does not answer says nothing."""
    with suppress(TetrarchError, TimeoutError):
        return machine.phase is Phase.PAUSED
    return False


def replays(machine: RemoteMachine) -> bool:
    """As ``is_paused``."""
    with suppress(TetrarchError, TimeoutError):
        return bool(machine.execute("query-replay", timeout=_END_S)["mode"] == "play")
    return False


def _connected(about: About, timeout: float = _END_S) -> Client:
    if about.control is None:
        raise MachineStateError(f"{about.name} does not run yet", mend="wait until it does")
    return Client(about.control, timeout=timeout)


def _resume(about: About) -> None:
    with _connected(about) as client:
        client.execute("cont")
