"""Clocks of stolen time (Linux, arch/x86/kernel/cpu/vmware.c, struct vmware_steal_time).

Each vCPU has one in the guest's memory, of 64 bytes, of which the first 8 count ticks of its TSC
for which the host ran something else in its place.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch.devices._state import DeviceState, State, queue
from tetrarch.platforms.vmware.backdoor import NO_COMMAND, Command, low

if TYPE_CHECKING:
    from tetrarch._native import GuestCall, Vm

__all__ = ["StolenTime", "StolenTimeState"]

STEALCLOCK: Final = 91

# What it answers.
DISABLED, ENABLED = 0, 1

#: What a driver gives that takes its clock back: no clock is there.
NOWHERE: Final = 1
_BYTES: Final = 64
_VCPUS_MAX: Final = 1024


@dataclass
class StolenTimeState(DeviceState):
    kind = "vmware-stolen-time"

    clocks: deque[int] = queue(2 * _VCPUS_MAX, (1 << 64) - 1)
    """Pairs of a vCPU's number and its clock's address."""


class StolenTime:
    """Lock: ``_lock``, for the clocks."""

    def __init__(self) -> None:
        self._vm: Vm | None = None
        self._clocks: dict[int, int] = {}
        self._lock = threading.Lock()

    def connect(self, vm: Vm) -> None:
        """Without a call, or where the host does not tell, the guest finds no such command."""
        self._vm = vm if vm.tell_stolen_time() else None

    def commands(self) -> Mapping[int, Command]:
        return {STEALCLOCK: self.command}

    def command(self, call: GuestCall) -> int:
        # The address is a physical one, which programs of the guest are not to write to.
        if self._vm is None or call.cpl != 0:
            return NO_COMMAND
        address = low(call, "rsi") << 32 | low(call, "rdi")
        with self._lock:
            return ENABLED if self._set(self._vm, call.vcpu, address) else DISABLED

    def _set(self, vm: Vm, vcpu: int, address: int) -> bool:
        self._clocks.pop(vcpu, None)
        if address % _BYTES or not vm.set_stolen_clock(vcpu, address):
            vm.set_stolen_clock(vcpu, None)
            return False
        self._clocks[vcpu] = address
        return True

    def _forget(self) -> None:
        if self._vm is not None:
            for vcpu in self._clocks:
                self._vm.set_stolen_clock(vcpu, None)
        self._clocks.clear()

    # Life

    def reset(self) -> None:
        with self._lock:
            self._forget()

    def save(self) -> State:
        with self._lock:
            pairs = [number for pair in sorted(self._clocks.items()) for number in pair]
        return StolenTimeState(deque(pairs)).save()

    def load(self, state: State) -> None:
        """Time that passed between is not stolen. On a host that does not tell, clocks stand."""
        new = StolenTimeState()
        new.load(state)
        numbers = iter(new.clocks)
        with self._lock:
            self._forget()
            if self._vm is not None:
                for vcpu, address in zip(numbers, numbers, strict=False):
                    if vcpu < _VCPUS_MAX:
                        self._set(self._vm, vcpu, address)
