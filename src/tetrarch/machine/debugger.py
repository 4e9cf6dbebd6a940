"""A machine as a debugger has it: stopped, looked at, let run on.

Breakpoints of two kinds, as KVM has them. One that is planted is an INT3 in guest memory, of
which there can be any number; who reads memory here does not see it, but the guest does. A
hardware breakpoint changes nothing, and a CPU has four. The guest sees neither in its own debug
registers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from tetrarch._native import GuestMemoryError
from tetrarch.errors import MachineStateError
from tetrarch.machine.engine_vm import EngineVcpu, EngineVm
from tetrarch.machine.memory import pages

__all__ = ["Debugger", "DebuggerPort", "Hardware", "NoMemory", "Place", "Stop", "Watched"]

_INT3 = b"\xcc"
_HARDWARE_MAX = 4

Watched = Literal["execute", "write", "access"]
Hardware = tuple[Watched, int, int]
"""What is watched, its linear address, and its length of 1, 2, 4 or 8 bytes."""


class NoMemory(Exception):
    """An address where no RAM of the guest's is."""


Place = Literal["here", "begin", "end"]
"""Where a way through a recording has led to: where it was to, or the one or the other end."""


@dataclass(frozen=True)
class Stop:
    """Why a vCPU stopped: a step, a planted breakpoint or one of hardware, or a place in a
    recording."""

    vcpu: int
    hardware: Hardware | None = None
    planted: bool = False
    passes: bool = False
    """The breakpoint is passed when the vCPU runs on."""
    place: Place | None = None

    @property
    def repeats(self) -> bool:
        """Whether it comes again where it is not told: the vCPU stands before a breakpoint."""
        before = self.hardware is not None and self.hardware[0] == "execute"
        return (self.planted or before) and not self.passes


class Debugger:
    """One machine's debugger; for one thread.

    ``alert`` is an eventfd(2), which becomes readable when a vCPU has stopped by itself.
    """

    def __init__(
        self,
        vm: EngineVm,
        vcpus: Sequence[EngineVcpu],
        there: Callable[[], Sequence[int]] | None = None,
    ) -> None:
        """``vcpus`` are all that there can be, ``there`` tells those that are in the machine, by
        default all."""
        self._vm = vm
        self.vcpus = vcpus
        self.there = there or (lambda: range(len(vcpus)))
        self.alert = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.stopped = False
        self.block_interrupts = True
        """A step passes over interrupts, where the engine can hold them back."""
        self._hardware: list[Hardware] = []
        # Planted ones by linear address; what was there by physical address.
        self._planted: dict[int, int] = {}
        self._original: dict[int, bytes] = {}
        vm.set_debug_alert(self.alert)

    def close(self) -> None:
        """Lets go of the machine."""
        self._vm.set_debug_alert(None)
        os.close(self.alert)

    # Stopping and running.

    def stop(self) -> None:
        """Brings the machine to rest. Raises EngineError where a device does not return."""
        if not self.stopped:
            self._vm.hold()
            self.stopped = True

    def interrupt(self) -> None:
        """What was under way is given up; the machine is stopped."""

    def take_stops(self) -> list[Stop]:
        """Which vCPUs have stopped by themselves since this was asked last. They are let run
        by ``resume``; the machine is to be stopped."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.alert)
        return [self._stop_of(*told) for told in self._vm.take_debug_stops()]

    def resume(self, steps: Collection[int] = (), frozen: Collection[int] = ()) -> None:
        """Lets the machine run: vCPUs of ``steps`` for an instruction, those ``frozen`` not."""
        for number, vcpu in enumerate(self.vcpus):
            vcpu.set_debug(
                step=number in steps,
                block_interrupts=self.block_interrupts,
                software=bool(self._planted),
                hardware=self._armed(),
            )
            vcpu.set_frozen(number in frozen)
        self.stopped = False
        self._vm.resume()

    def _armed(self) -> Sequence[Hardware]:
        """The hardware breakpoints that vCPUs look for."""
        return self._hardware

    def detach(self) -> None:
        """Takes all breakpoints away, and lets the machine run if it is stopped."""
        self.stop()
        self.take_stops()
        for linear in list(self._planted):
            self.unplant(linear)
        self._hardware.clear()
        self.resume()

    def _stop_of(self, vcpu: int, kind: str, value: int) -> Stop:
        if kind == "hardware":
            return Stop(vcpu, hardware=self._hit(value))
        return Stop(vcpu, planted=kind == "software")

    def _hit(self, bits: int) -> Hardware | None:
        hits = [one for bit, one in enumerate(self._hardware) if bits >> bit & 1]
        return hits[0] if hits else None

    # Breakpoints.

    def plant(self, vcpu: int, linear: int) -> None:
        """Puts an INT3 at an address, as the vCPU has it mapped."""
        physical = self._translate(vcpu, linear)
        if linear in self._planted:
            return
        if physical not in self._original:
            self._original[physical] = self._vm.read_memory(physical, 1)
        self._planted[linear] = physical
        self._tell_planted()
        self._vm.write_memory(physical, _INT3)

    def unplant(self, linear: int) -> None:
        """Without effect where there is none."""
        physical = self._planted.pop(linear, None)
        if physical is None or physical in self._planted.values():
            return
        original = self._original.pop(physical)
        # What the guest has written over it stays.
        if self._vm.read_memory(physical, 1) == _INT3:
            self._vm.write_memory(physical, original)
        self._tell_planted()

    def watch(self, wanted: Hardware) -> bool:
        """Sets a hardware breakpoint; false where the CPU has none left.

        Raises EngineError where no CPU has such a one.
        """
        if wanted in self._hardware:
            return True
        if len(self._hardware) == _HARDWARE_MAX:
            return False
        # The engine is the one who knows.
        self.vcpus[0].set_debug(hardware=[wanted])
        self._hardware.append(wanted)
        return True

    def unwatch(self, wanted: Hardware) -> None:
        """Without effect where there is none."""
        if wanted in self._hardware:
            self._hardware.remove(wanted)

    def _tell_planted(self) -> None:
        self._vm.set_planted(list(self._original))

    # Memory, without what is planted in it.

    def read(self, vcpu: int | None, address: int, length: int) -> bytes:
        """What can be read of ``length`` bytes, as a vCPU has them mapped; without one at
        physical addresses. Raises NoMemory where nothing can be."""
        data = bytearray()
        for at, size in pages(address, length):
            try:
                physical = at if vcpu is None else self._translate(vcpu, at)
                part = bytearray(self._vm.read_memory(physical, size))
            except (NoMemory, GuestMemoryError):
                if data:
                    break
                raise NoMemory from None
            for place in self._planted_in(physical, size):
                part[place - physical : place - physical + 1] = self._original[place]
            data += part
        return bytes(data)

    def write(self, vcpu: int | None, address: int, data: bytes) -> None:
        """Raises NoMemory where not all of it is RAM; then nothing is written."""
        parts = [
            (at if vcpu is None else self._translate(vcpu, at), at - address, size)
            for at, size in pages(address, len(data))
        ]
        try:
            for physical, _, size in parts:
                self._vm.read_memory(physical, size)
        except GuestMemoryError:
            raise NoMemory from None
        for physical, start, size in parts:
            part = bytearray(data[start : start + size])
            for place in self._planted_in(physical, size):
                at = place - physical
                self._original[place] = bytes(part[at : at + 1])
                part[at : at + 1] = _INT3
            self._vm.write_memory(physical, bytes(part))

    def _translate(self, vcpu: int, linear: int) -> int:
        physical = self.vcpus[vcpu].translate(linear)
        if physical is None:
            raise NoMemory
        return physical

    def _planted_in(self, physical: int, size: int) -> list[int]:
        return [place for place in self._original if physical <= place < physical + size]


class DebuggerPort:
    """Where a machine's debugger comes from: one at a time."""

    def __init__(self, make: Callable[[], Debugger]) -> None:
        self._make = make
        # Guards who has it.
        self._lock = threading.Lock()
        self._owner: str | None = None

    def take(self, who: str) -> Debugger:
        """Raises MachineStateError where another has it."""
        with self._lock:
            if self._owner is not None:
                raise MachineStateError(
                    f"the machine is debugged already, by {self._owner}",
                    mend="end that before: one at a time has its breakpoints",
                )
            self._owner = who
            return self._make()

    def release(self, debugger: Debugger) -> None:
        """The debugger is closed, and another can have one."""
        with self._lock:
            self._owner = None
            debugger.close()
