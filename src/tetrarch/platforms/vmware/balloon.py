"""VMware's balloon: a second backdoor, of the guest's kernel alone (Linux,
drivers/misc/vmw_balloon.c).

The driver comes about once a second, or when its doorbell is rung, asks for the target and gives
pages up or takes them back, one by one or, by a page that lists them, 512 at a time, of 4 KiB or of
2 MiB.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from tetrarch.devices._balloon import PAGE, target_pages
from tetrarch.errors import ConfigError, StateError
from tetrarch.platforms.vmware.backdoor import low

if TYPE_CHECKING:
    from tetrarch._native import GuestCall, RegisterPortAccess
    from tetrarch.platforms.vmware.vmci import Doorbell

__all__ = ["BALLOON_PORT", "VmwareBalloon"]

BALLOON_PORT: Final = 0x5670
MAGIC: Final = 0x456C_6D6F
_LARGE: Final = 512
"""Pages of 4 KiB in one of 2 MiB."""

# Commands.
START: Final = 0
GET_TARGET: Final = 1
LOCK: Final = 2
UNLOCK: Final = 3
GUEST_ID: Final = 4
BATCHED_LOCK: Final = 6
BATCHED_UNLOCK: Final = 7
BATCHED_2M_LOCK: Final = 8
BATCHED_2M_UNLOCK: Final = 9
DOORBELL_SET: Final = 10

# Capabilities.
BASIC: Final = 1 << 1
BATCHED: Final = 1 << 2
BATCHED_2M: Final = 1 << 3
WAKE_UP: Final = 1 << 4
TARGET_64: Final = 1 << 5

# What becomes of a command, or of a page.
OK: Final = 0
WITH_CAPABILITIES: Final = 0x0300_0000
COMMAND_INVALID: Final = 1
PAGE_INVALID: Final = 2
PAGE_LOCKED: Final = 3
PAGE_UNLOCKED: Final = 4
RESET: Final = 7

#: What a driver gives that takes its doorbell back, and what there is before it gives one.
NO_DOORBELL: Final = (0xFFFF_FFFF, 0xFFFF_FFFF)
#: Entries of a page that lists pages: a status in the low bits, a page's number above bit 12.
_BATCH_MAX: Final = PAGE // 8
_STATUS: Final = 0x1F


class _Locked:
    """Which pages are in the balloon."""

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}
        """By the number of 2 MiB: a bit for each page of it."""
        self.count = 0

    def clear(self) -> None:
        self._bits.clear()
        self.count = 0

    def add(self, page: int, pages: int) -> bool:
        """False where one of them is there already."""
        area, mask = page // _LARGE, ((1 << pages) - 1) << page % _LARGE
        old = self._bits.get(area, 0)
        if old & mask:
            return False
        self._bits[area] = old | mask
        self.count += pages
        return True

    def remove(self, page: int, pages: int) -> bool:
        """False where one of them is not there."""
        area, mask = page // _LARGE, ((1 << pages) - 1) << page % _LARGE
        old = self._bits.get(area, 0)
        if old & mask != mask:
            return False
        if rest := old & ~mask:
            self._bits[area] = rest
        else:
            del self._bits[area]
        self.count -= pages
        return True


class VmwareBalloon:
    """As ``Machine.balloon`` gives it on this platform."""

    def __init__(self) -> None:
        self._target = 0
        self._locked = _Locked()
        self._memory = 0
        self._changed: Callable[[int], object] = lambda actual: None
        self._ring: Callable[[Doorbell], object] | None = None
        self._doorbell: Doorbell = NO_DOORBELL
        self._stale = False
        """The driver has to begin anew: it goes by what an earlier machine knew."""
        self._lock = Lock()

    def connect(
        self,
        memory: int,
        changed: Callable[[int], object],
        ring: Callable[[Doorbell], object] | None = None,
    ) -> None:
        """``memory``: bytes of RAM that the machine has; without a call the guest finds no
        balloon. ``changed`` is called, on a vCPU's thread, with the bytes that are in it now;
        ``ring`` where the driver is to come at once."""
        self._memory, self._changed, self._ring = memory, changed, ring

    @property
    def memory(self) -> int:
        """Bytes of RAM that the machine has; 0 where it has no balloon."""
        return self._memory

    @property
    def target(self) -> int:
        """As ``Balloon.target``."""
        return self._target * PAGE

    @target.setter
    def target(self, size: int) -> None:
        self._target = target_pages(size, self._memory)
        if self._ring is not None and self._doorbell != NO_DOORBELL:
            self._ring(self._doorbell)

    @property
    def actual(self) -> int:
        """As ``Balloon.actual``."""
        # A list may be half done: its pages count when the host has them.
        with self._lock:
            return self._locked.count * PAGE

    def stats(self, timeout: float = 5.0) -> dict[str, int]:
        """Raises TimeoutError: VMware's balloon says nothing of the guest's memory."""
        raise TimeoutError("VMware's balloon driver says nothing of the guest's memory")

    def port(self, call: GuestCall, access: RegisterPortAccess) -> int | None:
        if not access.input or access.string:
            return None
        if access.size != 4 or low(call, "rax") != MAGIC or not self._memory or call.cpl != 0:
            return (1 << 8 * access.size) - 1
        with self._lock:
            before = self._locked.count
            status = self._command(call)
            after = self._locked.count
        if before != after:
            self._changed(after * PAGE)
        return status

    def _command(self, call: GuestCall) -> int:
        number, first, second = low(call, "rcx"), call["rbx"], call["rsi"]
        if number == START:
            # The guest has all its pages again, whatever there was.
            self._locked.clear()
            self._stale = False
            offered = BASIC | BATCHED | BATCHED_2M | TARGET_64
            call["rcx"] = first & (offered if self._ring is None else offered | WAKE_UP)
            return WITH_CAPABILITIES
        if self._stale:
            return RESET
        status = COMMAND_INVALID
        if number in (GET_TARGET, GUEST_ID):
            status = OK
        elif number == DOORBELL_SET and self._ring is not None:
            self._doorbell = (first & 0xFFFF_FFFF, second & 0xFFFF_FFFF)
            status = OK
        elif number in (LOCK, UNLOCK):
            (status,) = self._move(call, [first], 1, lock=number == LOCK)
        elif number in (BATCHED_LOCK, BATCHED_UNLOCK, BATCHED_2M_LOCK, BATCHED_2M_UNLOCK):
            pages = _LARGE if number in (BATCHED_2M_LOCK, BATCHED_2M_UNLOCK) else 1
            lock = number in (BATCHED_LOCK, BATCHED_2M_LOCK)
            status = self._batch(call, first, second, pages, lock=lock)
        call["rbx"] = self._target
        return status

    def _batch(self, call: GuestCall, page: int, count: int, pages: int, *, lock: bool) -> int:
        if not 0 < count <= _BATCH_MAX or not _in_ram(call, page, 1):
            return PAGE_INVALID
        form = struct.Struct(f"<{count}Q")
        entries = form.unpack(call.vm.read_memory(page * PAGE, form.size))
        states = self._move(call, [entry >> 12 for entry in entries], pages, lock=lock)
        done = [entry & ~_STATUS | state for entry, state in zip(entries, states, strict=True)]
        call.vm.write_memory(page * PAGE, form.pack(*done))
        return OK

    def _move(
        self, call: GuestCall, numbers: Sequence[int], pages: int, *, lock: bool
    ) -> list[int]:
        """Into the balloon or out of it, each of so many pages from a number on: their states."""
        states, taken = [], []
        for number in numbers:
            if number % pages or not _in_ram(call, number, pages):
                states.append(PAGE_INVALID)
            elif not lock:
                states.append(OK if self._locked.remove(number, pages) else PAGE_UNLOCKED)
            elif self._locked.add(number, pages):
                states.append(OK)
                taken.append(number)
            else:
                states.append(PAGE_LOCKED)
        for first, length in _runs(sorted(taken), pages):
            call.vm.discard_memory(first * PAGE, length * PAGE)
        return states

    def reset(self) -> None:
        """What starts anew has all its pages."""
        with self._lock:
            self._locked.clear()
            self._stale = False
            self._doorbell = NO_DOORBELL

    def save(self) -> dict[str, Any]:
        return {"device": "vmware-balloon", "version": 1, "target": self._target}

    def load(self, state: Mapping[str, Any]) -> None:
        target = state.get("target")
        try:
            if not isinstance(target, int):
                raise ConfigError("it has no target")
            target_pages(target * PAGE, self._memory)
        except ConfigError as error:
            raise StateError(
                f"saved state of 'vmware-balloon' is damaged: {error.cause}", mend="save it again"
            ) from None
        with self._lock:
            self._target = target
            self._locked.clear()
            # Its pages are zeros in the saved memory too: the guest may have them again.
            self._stale = True


def _in_ram(call: GuestCall, page: int, pages: int) -> bool:
    start, end = page * PAGE, (page + pages) * PAGE
    return any(base <= start and end <= base + length for base, length in call.vm.ram)


def _runs(numbers: Sequence[int], pages: int) -> Iterator[tuple[int, int]]:
    """What lies behind each other, as (first page, pages)."""
    at = 0
    while at < len(numbers):
        end = at + 1
        while end < len(numbers) and numbers[end] == numbers[end - 1] + pages:
            end += 1
        yield numbers[at], (end - at) * pages
        at = end
