"""A machine in coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from tetrarch._patience import patience
from tetrarch.aio.bridge import awaited, on_thread, same
from tetrarch.aio.console import AsyncConsole
from tetrarch.aio.debugging import DebugTwin
from tetrarch.aio.tools import AsyncTools
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.machine import Machine
from tetrarch.machine.status import ExitStatus

__all__ = ["AsyncMachine"]


_R = TypeVar("_R")


def _same(get: Callable[[Machine], _R]) -> same[Machine, _R]:
    return same(get)


class AsyncMachine(DebugTwin[Machine]):
    """As ``Machine``: what waits is awaited. ``async with Machine(...) as vm`` starts the machine,
    gives one, and ends the machine; ``Machine.aio`` is one.

    Registers and memory are read at once: a machine that runs is held for a moment then.
    """

    def __init__(self, sync: Machine) -> None:
        super().__init__(sync)
        self._entered = False

    # How it runs.
    load = awaited(Machine.load)
    pause = awaited(Machine.pause)
    resume = awaited(Machine.resume)
    stop = awaited(Machine.stop)
    kill = awaited(Machine.kill)
    save = awaited(Machine.save)
    dump_core = awaited(Machine.dump_core)
    reset = _same(lambda vm: vm.reset)
    press_power_button = _same(lambda vm: vm.press_power_button)
    request_stop = _same(lambda vm: vm.request_stop)
    # What it is.
    config = _same(lambda vm: vm.config)
    engine = _same(lambda vm: vm.engine)
    engine_reason = _same(lambda vm: vm.engine_reason)
    engine_vm = _same(lambda vm: vm.engine_vm)
    phase = _same(lambda vm: vm.phase)
    running = _same(lambda vm: vm.running)
    status = _same(lambda vm: vm.status)
    recording = _same(lambda vm: vm.recording)
    uptime = _same(lambda vm: vm.uptime)
    resets = _same(lambda vm: vm.resets)
    stats = _same(lambda vm: vm.stats)
    vcpus = _same(lambda vm: vm.vcpus)
    vcpu = _same(lambda vm: vm.vcpu)
    vcpu_threads = _same(lambda vm: vm.vcpu_threads)
    memory = _same(lambda vm: vm.memory)
    read_memory = _same(lambda vm: vm.read_memory)
    write_memory = _same(lambda vm: vm.write_memory)
    # What happens to it.
    on = _same(lambda vm: vm.on)
    events = _same(lambda vm: vm.events)
    # Devices.
    pc = _same(lambda vm: vm.pc)
    balloon = _same(lambda vm: vm.balloon)
    inputs = _same(lambda vm: vm.inputs)
    screen = _same(lambda vm: vm.screen)
    attach_ports = _same(lambda vm: vm.attach_ports)
    attach_mmio = _same(lambda vm: vm.attach_mmio)
    attach_virtio = _same(lambda vm: vm.attach_virtio)
    irq_source = _same(lambda vm: vm.irq_source)
    irq_line = _same(lambda vm: vm.irq_line)
    attach_pci = awaited(Machine.attach_pci)
    attach_disk = awaited(Machine.attach_disk)
    attach_net = awaited(Machine.attach_net)
    detach = awaited(Machine.detach)
    plug_vcpu = awaited(Machine.plug_vcpu)
    unplug_vcpu = awaited(Machine.unplug_vcpu)
    # The guest's agent.
    exec = awaited(Machine.exec)
    copy_in = awaited(Machine.copy_in)
    copy_out = awaited(Machine.copy_out)
    agent = awaited(Machine.agent)
    # What VMware's guests have.
    guestinfo = _same(lambda vm: vm.guestinfo)
    # Others that steer it.
    serve_control = _same(lambda vm: vm.serve_control)
    serve_gdb = _same(lambda vm: vm.serve_gdb)
    gdb = _same(lambda vm: vm.gdb)
    serve_display = _same(lambda vm: vm.serve_display)
    display = _same(lambda vm: vm.display)

    @property
    def console(self) -> AsyncConsole:
        """The serial line. Only where no other console was given."""
        return AsyncConsole(self.sync.console)

    @property
    def tools(self) -> AsyncTools:
        """As ``Machine.tools``."""
        return AsyncTools(self.sync.tools)

    async def start(self) -> None:
        """As ``Machine.start``; without effect where ``async with`` has started the machine."""
        if not self._entered:
            await on_thread(self.sync.start)

    async def wait(self, timeout: float | None = None) -> ExitStatus:
        """As ``Machine.wait``, without a thread."""
        if self.sync.phase is not Phase.MADE:
            try:
                async with asyncio.timeout(patience(timeout)):
                    async for _ in self.sync.events("shutdown"):
                        pass
            except TimeoutError:
                raise TimeoutError(f"the machine still runs after {timeout:g} s") from None
        return await on_thread(self.sync.wait)

    async def run(self, timeout: float | None = None) -> ExitStatus:
        """start() and finish()."""
        await self.start()
        return await self.finish(timeout)

    async def finish(self, timeout: float | None = None) -> ExitStatus:
        """As ``Machine.finish``: cancelled, the machine is stopped."""
        try:
            return await on_thread(self.sync.finish, timeout)
        except asyncio.CancelledError:
            self.sync.request_stop()
            raise

    async def __aenter__(self) -> AsyncMachine:
        if self.sync.phase is Phase.MADE:
            starting = asyncio.ensure_future(on_thread(self.sync.start))

            async def give_up() -> None:
                await asyncio.wait([starting])  # a start that is cancelled goes on
                await self.__aexit__()

            try:
                await asyncio.shield(starting)
            except BaseException:
                await asyncio.shield(give_up())
                raise
            self._entered = True
        return self

    async def __aexit__(self, *error: object) -> None:
        await on_thread(self.sync.__exit__, None, None, None)
