"""A machine that another process runs, in coroutines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tetrarch.aio.bridge import awaited, same
from tetrarch.aio.console import AsyncConsole
from tetrarch.aio.debugging import DebugTwin
from tetrarch.aio.tools import AsyncTools
from tetrarch.remote.machine import RemoteMachine

__all__ = ["AsyncRemoteMachine"]


_R = TypeVar("_R")


def _same(get: Callable[[RemoteMachine], _R]) -> same[RemoteMachine, _R]:
    return same(get)


class AsyncRemoteMachine(DebugTwin[RemoteMachine]):
    """As ``RemoteMachine``. ``async with tetrarch.connect("web") as vm`` gives one: it leaves the
    console at the end, and the machine goes on."""

    about = _same(lambda vm: vm.about)
    name = _same(lambda vm: vm.name)
    alive = _same(lambda vm: vm.alive)
    execute = awaited(RemoteMachine.execute)
    phase = _same(lambda vm: vm.phase)
    uptime = _same(lambda vm: vm.uptime)
    resets = _same(lambda vm: vm.resets)
    logs = _same(lambda vm: vm.logs)
    vcpus = _same(lambda vm: vm.vcpus)
    memory = _same(lambda vm: vm.memory)
    on = _same(lambda vm: vm.on)
    events = _same(lambda vm: vm.events)
    screen = awaited(RemoteMachine.screen)
    dump_core = awaited(RemoteMachine.dump_core)
    pause = awaited(RemoteMachine.pause)
    resume = awaited(RemoteMachine.resume)
    reset = awaited(RemoteMachine.reset)
    press_power_button = awaited(RemoteMachine.press_power_button)
    stats = awaited(RemoteMachine.stats)
    wait = awaited(RemoteMachine.wait)
    stop = awaited(RemoteMachine.stop)
    kill = awaited(RemoteMachine.kill)
    save = awaited(RemoteMachine.save)
    attach_disk = awaited(RemoteMachine.attach_disk)
    attach_net = awaited(RemoteMachine.attach_net)
    detach = awaited(RemoteMachine.detach)
    plug_vcpu = awaited(RemoteMachine.plug_vcpu)
    unplug_vcpu = awaited(RemoteMachine.unplug_vcpu)
    exec = awaited(RemoteMachine.exec)
    copy_in = awaited(RemoteMachine.copy_in)
    copy_out = awaited(RemoteMachine.copy_out)
    agent = awaited(RemoteMachine.agent)
    guestinfo = _same(lambda vm: vm.guestinfo)

    @property
    def tools(self) -> AsyncTools:
        """As ``RemoteMachine.tools``."""
        return AsyncTools(self.sync.tools)

    @property
    def console(self) -> AsyncConsole:
        """The serial line. Raises MachineStateError where it goes to no shared console."""
        return AsyncConsole(self.sync.console)

    async def __aenter__(self) -> AsyncRemoteMachine:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.sync.close()
