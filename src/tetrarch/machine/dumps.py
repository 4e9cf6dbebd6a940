"""Core dumps of a machine: one at a time, and how far it is (QEMU, qapi/dump.json)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from tetrarch.errors import MachineStateError
from tetrarch.machine.events import Events
from tetrarch.machine.lifecycle import LifeCycle, Phase
from tetrarch.machine.new_file import host_errors, new_file

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVm
    from tetrarch.machine.vcpu import VcpuView

__all__ = ["Dumps"]

Hold = Callable[[], AbstractContextManager[None]]


class Dumps:
    def __init__(
        self,
        vm: EngineVm,
        vcpus: Callable[[], Sequence[VcpuView]],
        life: LifeCycle,
        events: Events,
    ) -> None:
        """``vcpus`` gives those that are in the machine."""
        self._vm = vm
        self._vcpus = vcpus
        self._life = life
        self._events = events
        # Guards the first of the three below.
        self._lock = threading.Lock()
        self._status: Literal["none", "active", "completed", "failed"] = "none"
        self._completed = 0
        self._total = 0

    @property
    def active(self) -> bool:
        return self._status == "active"

    def progress(self) -> dict[str, str | int]:
        """Of the last: status, bytes of memory written, and of all."""
        return {"status": self._status, "completed": self._completed, "total": self._total}

    def begin(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        hold: Hold,
        begin: int | None,
        length: int | None,
        paging: bool,
    ) -> Callable[[], None]:
        """Holds the machine; what it gives writes the dump and lets the machine go on.

        Raises what can be told before anything is written.
        """
        from tetrarch.machine.core_dump import core_ranges, linear_ranges, write_core

        self._life.require("dump_core", Phase.RUNNING, Phase.PAUSED)
        ranges = core_ranges(self._vm.ram, begin, length)
        self._start(sum(size for _, size in ranges))
        try:
            with ExitStack() as stack:
                file = target
                if isinstance(file, (str, os.PathLike)):
                    file = stack.enter_context(new_file(Path(file), "dump guest memory"))
                else:
                    stack.enter_context(host_errors("dump guest memory"))
                if self._life.phase is not Phase.PAUSED:
                    stack.enter_context(hold())
                registers = [vcpu.regs for vcpu in self._vcpus()]
                linear = linear_ranges(self._vm, registers) if paging else []
                rest = stack.pop_all()
        except BaseException:
            self._status = "failed"
            raise

        def write() -> None:
            try:
                with rest:
                    write_core(file, self._vm, registers, ranges, linear, self._wrote)
            except BaseException as error:
                self._status = "failed"
                self._events.tell("dump-completed", result=self.progress(), error=str(error))
                raise
            self._status = "completed"
            self._events.tell("dump-completed", result=self.progress())

        return write

    def _start(self, total: int) -> None:
        with self._lock:
            if self.active:
                raise MachineStateError("There is a dump in process, please wait.")
            self._status = "active"
        self._completed, self._total = 0, total

    def _wrote(self, count: int) -> None:
        """Raises MachineStateError where the machine has ended meanwhile."""
        self._completed += count
        self._life.require("dump_core", Phase.PAUSED)
