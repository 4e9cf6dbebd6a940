"""HYPERVISOR_memory_op of a guest whose page tables are its own (xen/include/public/memory.h)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from tetrarch.platforms.xen.arguments import HypercallError, domid_is_own, read, read_bytes, write
from tetrarch.platforms.xen.errno import EINVAL, ENOSYS, ESRCH

if TYPE_CHECKING:
    from tetrarch._native import GuestCall, Vm, XenDomain

__all__ = ["Memory"]

_PAGE: Final = 4096
_E820_RAM: Final = 1
#: Frames that one call gives up or takes back; the guest's driver asks for as many at most as fit
#: in a page of numbers.
_EXTENTS_MAX: Final = 512
_ORDER_MAX: Final = 9
_SPACE_SHARED_INFO: Final = 0
# domid_t, size, space, idx, gpfn.
_ADD: Final = struct.Struct("<HHIQQ")
# extent_start, nr_extents, extent_order, mem_flags, domid_t.
_RESERVATION: Final = struct.Struct("<QQIIH6x")
_MAP: Final = struct.Struct("<I4xQ")
_DOMID: Final = struct.Struct("<H")
_ENTRY: Final = struct.Struct("<QQI")


class Memory:
    """What of its RAM a guest has now, and where pages of its hypervisor's are."""

    def __init__(self, domid: int, domain: XenDomain) -> None:
        self._domid = domid
        self._domain = domain
        #: Frames that the guest has given up.
        self.given_up: set[int] = set()
        self._operations = {
            1: self._decrease_reservation,
            3: self._current_reservation,
            4: self._maximum_reservation,
            6: self._populate_physmap,
            7: self._add_to_physmap,
            9: self._memory_map,
        }

    def __call__(self, call: GuestCall) -> int:
        # The upper bits are where a call that was cut short goes on; none is, here.
        operation = self._operations.get(call["rdi"])
        return ENOSYS if operation is None else operation(call, call["rsi"])

    def _add_to_physmap(self, call: GuestCall, argument: int) -> int:
        domid, _, space, index, frame = read(call, argument, _ADD)
        if not domid_is_own(domid, self._domid):
            return ESRCH
        if space != _SPACE_SHARED_INFO or index or frame >> 40:
            return EINVAL
        return self._domain.place_shared_info(frame * _PAGE)

    def _memory_map(self, call: GuestCall, argument: int) -> int:
        room, buffer = read(call, argument, _MAP)
        entries = [_ENTRY.pack(at, length, _E820_RAM) for at, length in call.vm.ram]
        if len(entries) > room:
            return EINVAL
        write(call, buffer, b"".join(entries))
        write(call, argument, struct.pack("<I", len(entries)))
        return 0

    def _maximum_reservation(self, call: GuestCall, argument: int) -> int:
        self._check_domid(call, argument)
        return _pages(call.vm)

    def _current_reservation(self, call: GuestCall, argument: int) -> int:
        self._check_domid(call, argument)
        return _pages(call.vm) - len(self.given_up)

    def _check_domid(self, call: GuestCall, argument: int) -> None:
        (domid,) = read(call, argument, _DOMID)
        if not domid_is_own(domid, self._domid):
            raise HypercallError(ESRCH)

    def _decrease_reservation(self, call: GuestCall, argument: int) -> int:
        """How many extents were given up; the guest goes on with the rest."""
        extents, order = self._extents(call, argument)
        ram = [range(at // _PAGE, (at + length) // _PAGE) for at, length in call.vm.ram]
        for done, frame in enumerate(extents):
            frames = range(frame, frame + (1 << order))
            there = any(frames[0] in one and frames[-1] in one for one in ram)
            if not there or not self.given_up.isdisjoint(frames):
                return done
            call.vm.discard_memory(frame * _PAGE, len(frames) * _PAGE)
            self.given_up.update(frames)
        return len(extents)

    def _populate_physmap(self, call: GuestCall, argument: int) -> int:
        """Frames that were never given up cannot be had once more."""
        extents, order = self._extents(call, argument)
        for done, frame in enumerate(extents):
            wanted = range(frame, frame + (1 << order))
            if not self.given_up.issuperset(wanted):
                return done
            self.given_up.difference_update(wanted)
        return len(extents)

    def _extents(self, call: GuestCall, argument: int) -> tuple[tuple[int, ...], int]:
        start, count, order, _, domid = read(call, argument, _RESERVATION)
        if not domid_is_own(domid, self._domid):
            raise HypercallError(ESRCH)
        if order > _ORDER_MAX:
            raise HypercallError(EINVAL)
        count = min(count, _EXTENTS_MAX)
        return struct.unpack(f"<{count}Q", read_bytes(call, start, 8 * count)), order


def _pages(vm: Vm) -> int:
    return sum(length for _, length in vm.ram) // _PAGE
