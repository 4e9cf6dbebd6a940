"""Memory behind a base address register: the guest uses it as RAM, and its device by offsets.

Where the guest has it mapped it is a region of RAM to the engine, which can come at any time, but
go only while the machine is held. A driver that moves the register, or switches it off to ask for
its size, is in the middle of an instruction then. So the region that nobody wants any more goes a
moment later, by another thread, unless the register is back by then.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from tetrarch._native import DeviceMemory, EngineError
from tetrarch._seldom import Seldom

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["BarMemory"]

log = logging.getLogger(__name__)

#: A driver asks for sizes within that, and switches on again.
_LATER_S: Final = 0.05


class BarMemory:
    """Lock: ``_lock``, for where it is; it is taken while the machine is held, too."""

    def __init__(self, vm: Vm, length: int) -> None:
        self._vm = vm
        self._memory = DeviceMemory(length)
        self.length = length
        self._lock = threading.Lock()
        self._wanted: int | None = None
        self._mapped: set[int] = set()
        self._tidying = False
        self._closed = threading.Event()
        self._complaint = Seldom()

    def map(self, address: int) -> None:
        """Where something else is, it is nowhere."""
        with self._lock:
            self._wanted = address
            if address not in self._mapped:
                try:
                    self._memory.map(self._vm, address)
                    self._mapped.add(address)
                except EngineError as error:
                    self._wanted = None
                    if self._complaint.due():
                        log.warning("a guest maps a device's memory to %#x: %s", address, error)
            self._tidy()

    def unmap(self) -> None:
        with self._lock:
            self._wanted = None
            self._tidy()

    def close(self) -> None:
        self._closed.set()

    def read(self, offset: int, length: int) -> bytes:
        return self._memory.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            if self._wanted is None:
                self._memory.write(offset, data)
            elif 0 <= offset <= self.length - len(data):
                # So engines hear of it.
                self._vm.write_memory(self._wanted + offset, data)

    # What is not wanted any more

    def _stale(self) -> set[int]:
        return self._mapped - ({self._wanted} if self._wanted is not None else set())

    def _tidy(self) -> None:
        if self._stale() and not self._tidying and not self._closed.is_set():
            self._tidying = True
            threading.Thread(target=self._remove_stale, name="bar-memory", daemon=True).start()

    def _remove_stale(self) -> None:
        while not self._closed.wait(_LATER_S):
            try:
                self._vm.hold()
            except EngineError:
                continue  # a device takes its time
            try:
                # No device is called now, so none has the lock.
                with self._lock:
                    for address in self._stale():
                        self._vm.remove_memory(address)
                        self._mapped.discard(address)
                    self._tidying = False
                    return
            except EngineError as error:
                log.debug("a device's memory is not taken away: %s", error)
            finally:
                self._vm.resume()
        with self._lock:
            self._tidying = False
