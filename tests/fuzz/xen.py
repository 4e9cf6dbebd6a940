"""A guest of Xen's that calls in any way.

``hypercalls``: any numbers, operations and arguments, of structures in memory or nowhere, with what
is in memory changed in between, on two vCPUs' behalf; then the domain is saved and loaded.
"""

from __future__ import annotations

import threading

from tests.conformance.guest import DATA
from tests.fuzz.input import Input
from tests.platforms.xen_guest import (
    EVENTS,
    HVM,
    INFO,
    MEMORY,
    NOWHERE,
    SCHED,
    SELF,
    SET_TIMER,
    SHARED,
    VCPU,
    VERSION,
    VM_ASSIST,
    XenGuest,
)

__all__ = ["hypercalls"]

NUMBERS = (EVENTS, VCPU, MEMORY, HVM, SCHED, VERSION, VM_ASSIST, SET_TIMER)
#: Addresses that matter, and values on a bound.
VALUES = (
    *(0, 1, 2, 3, 63, 64, 4095, 4096, SELF, DATA, SHARED, INFO, NOWHERE, 1 << 31, (1 << 32) - 1),
    *(SHARED >> 12, (1 << 20) - 32, (1 << 20) - 8, 1 << 40, 1 << 63, (1 << 64) - 1),
)
STEPS_MAX = 12
PATIENCE_S = 0.2


def hypercalls(data: bytes) -> None:
    source = Input(data)
    guest = XenGuest(vcpus=2)
    if source.number(1) & 1:
        guest.place()
    for _ in range(STEPS_MAX):
        if not source.left:
            break
        choice = source.number(1)
        number = NUMBERS[choice % len(NUMBERS)] if choice < 240 else source.number(8)
        operation = source.number(1) % 32
        kind = source.number(1)
        if kind & 1:
            argument: int | bytes = b"".join(_word(source) for _ in range(4))
        else:
            argument = int.from_bytes(_word(source), "little")
        if number == VCPU:
            guest.prepare(number, operation, kind >> 1 & 3, argument)
        else:
            guest.prepare(number, operation, argument)
        _run(guest)
        if kind & 0x80:
            guest.vm.write_memory(SHARED + 2048 + source.number(2) % 1024, source.bytes(8))
    state = guest.xen.save()
    guest.xen.load(state)
    guest.xen.reset()


def _run(guest: XenGuest) -> None:
    """A guest may have its hypervisor write over its own code, and then it ends in any way."""
    stop = threading.Timer(PATIENCE_S, guest.vm.request_stop)
    stop.start()
    guest.vcpu.run()
    stop.cancel()
    stop.join()


def _word(source: Input) -> bytes:
    """Eight bytes of an argument: one number, or two."""
    choice = source.number(1)
    if choice < 96:
        return VALUES[choice % len(VALUES)].to_bytes(8, "little")
    if choice < 192:
        return bytes([source.number(1) % 8, 0, 0, 0, source.number(1) % 8, 0, 0, 0])
    return source.bytes(8).ljust(8, b"\0")
