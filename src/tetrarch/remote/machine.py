"""A machine that another process runs, with the methods of one of this."""

from __future__ import annotations

import os
import secrets
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from tetrarch.agent import AgentError, AgentStream
from tetrarch.agent import connect as connect_agent
from tetrarch.agent.capture import Completed
from tetrarch.agent.guest import AGENT_S, AgentMethods
from tetrarch.control.client import Client
from tetrarch.errors import MachineStateError, TetrarchError
from tetrarch.machine.config import DiskOption, make_config
from tetrarch.machine.lifecycle import PRESS_AGAIN_S, STOP_GRACE_S
from tetrarch.machine.new_file import new_file
from tetrarch.machine.snapshot import parent_of
from tetrarch.registry import About, find
from tetrarch.registry.claim import remove_if_dead
from tetrarch.registry.listing import alive
from tetrarch.remote.console import RemoteConsole
from tetrarch.remote.disks import attach_disk, detach
from tetrarch.remote.process import MachineProcess

if TYPE_CHECKING:
    from tetrarch.aio import AsyncRemoteMachine

__all__ = ["Completed", "RemoteMachine", "connect"]

#: What a process takes to end its machine, however busy its host.
_END_S: Final = 10.0
#: Until a guest has given a device up.
_DETACH_S: Final = 30.0


def connect(name: str) -> RemoteMachine:
    """The machine of this user that runs under a name.

    Raises HostError where there is none, ConfigError for what is no name.
    """
    return RemoteMachine(find(name))


class RemoteMachine(AgentMethods):
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
        if self.about.control is None:
            raise MachineStateError(f"{self.name} does not run yet", mend="wait until it does")
        return Client(self.about.control, timeout=timeout)

    def status(self, *, timeout: float = _END_S) -> str:
        """As QMP names it: running, paused and so on."""
        return str(self.execute("query-status", timeout=timeout)["status"])

    def pause(self) -> None:
        """Brings it to rest between two instructions, until resume()."""
        self.execute("stop")

    def resume(self) -> None:
        self.execute("cont")

    def reset(self) -> None:
        self.execute("system_reset")

    def press_power_button(self) -> None:
        """Asks the guest to switch itself off; what comes of it is the guest's."""
        self.execute("system_powerdown")

    def stats(self) -> dict[str, Any]:
        """Counters by group, as ``Machine.stats()`` gives them."""
        return dict(self.execute("x-stats")["stats"])

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
        """Leaves its console. The machine goes on, as it does when this object is forgotten."""
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

    def detach(self, name: str, *, timeout: float = _DETACH_S) -> None:
        """Takes a device out when the guest has given it up. Raises HostError where it has not
        after ``timeout`` seconds; it may still do it."""
        with self._client() as client:
            detach(client, name, timeout)

    # The guest's agent.

    def agent(self, timeout: float = AGENT_S) -> AgentStream:
        """A connection with the guest's agent, for one command."""
        if self.about.vsock is None:
            raise AgentError(f"{self.name} has no vsock socket", "start it again")
        return connect_agent(self.about.vsock, timeout, lambda: self.alive)
