"""A look inside of a guest: breakpoints, watchpoints, memory, core dumps."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import BinaryIO, Literal

from tetrarch._native import EngineError
from tetrarch.errors import ConfigError, HostError
from tetrarch.machine.breakpoints import Breakpoint, Hit
from tetrarch.machine.debugger import Debugger, Stop
from tetrarch.machine.engine_errors import engine_cause, engine_mend
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.replay import ReplayView, not_replayed
from tetrarch.machine.running import RunMethods

__all__ = ["DebugMethods"]


class DebugMethods(RunMethods):
    def breakpoint(
        self,
        address: int,
        listener: Callable[[Hit], object] | None = None,
        *,
        hardware: bool = False,
        vcpu: int = 0,
    ) -> Breakpoint:
        """Stops vCPUs before they execute the instruction at a linear address, and calls
        ``listener`` there; then the machine goes on. Without a listener it is paused at each hit
        (``Breakpoint.wait``).

        An INT3 is planted, where ``vcpu`` has the address mapped; the guest's code is to be there.
        With ``hardware`` the CPU watches the address, which can do so with four at a time: then
        nothing has to be there yet, and it stays over a reset. Listeners run on a thread of their
        own while the machine stands; what one raises ends the machine and comes out of ``wait()``.
        Raises MachineStateError while gdb debugs the machine.
        """
        self._life.require("breakpoint", Phase.MADE, Phase.RUNNING, Phase.PAUSED)
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
        self._life.require("watchpoint", Phase.MADE, Phase.RUNNING, Phase.PAUSED)
        try:
            return self._breakpoints.watch((access, address, length), listener)
        except EngineError as error:
            raise ConfigError(
                f"watchpoint: {engine_cause(error)}", mend=engine_mend(error, "give another length")
            ) from error

    @property
    def replay(self) -> ReplayView:
        """The way through its recording, of a machine that replays."""
        replay = self._vm.replay()
        if replay is None:
            raise not_replayed()
        return ReplayView(replay, self._travel)

    def _travel(self, begin: Callable[[Debugger], None]) -> Stop:
        self._life.require("goto", Phase.RUNNING, Phase.PAUSED)
        if self.phase is Phase.RUNNING:
            self.pause()
        # Who resumes it waits.
        with self._resets.lock:
            self._life.require("goto", Phase.PAUSED)
            try:
                return self._breakpoints.travel(begin, self._vm.resume, self._vm.hold)
            except EngineError as error:
                raise HostError(
                    f"the machine cannot be stopped on the way: {engine_cause(error)}",
                    mend=engine_mend(error, "replay it again"),
                ) from error

    def read_memory(self, address: int, length: int) -> bytes:
        """Guest physical memory. Raises GuestMemoryError outside of RAM."""
        return self._vm.read_memory(address, length)

    def write_memory(self, address: int, data: bytes) -> None:
        self._life.allow("write_memory")
        self._vm.write_memory(address, data)

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
        paused meanwhile, and runs on if it ran. Raises HostError where the file cannot be written,
        MachineStateError while another dump is.
        """
        self.dumps.begin(path, self.paused, begin, length, paging)()
