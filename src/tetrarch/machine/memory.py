"""Guest memory by address, as a program sees it: physical, or as a vCPU has it mapped."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, overload

from tetrarch._native import GuestMemoryError, Vm
from tetrarch.machine.lifecycle import Allow, allow_all

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from tetrarch.machine.engine_vm import MemoryAccess, VcpuAccess

__all__ = ["LinearMemory", "PhysicalMemory", "pages"]

_PAGE = 4096


class PhysicalMemory:
    """The machine's RAM by guest physical address; ``vm.memory``.

        view = vm.memory[0x1000:0x2000]   # a memoryview of the RAM itself, to be read
        vm.memory[0x1000:0x1004] = b"\\x90\\x90\\x90\\x90"

    A view changes as the guest writes, and copies nothing; pause the machine where that matters.
    Of a machine of another process it is a copy.
    Writing goes through the machine, which then knows that code or a page has changed: so a view
    cannot be written through. A breakpoint that is planted shows as an INT3 here.
    """

    def __init__(self, vm: MemoryAccess, allow: Allow = allow_all) -> None:
        self._vm = vm
        self._allow = allow
        # By inode and place: memory that goes and comes again is in another file.
        self._mapped: dict[tuple[int, int], mmap.mmap] = {}

    @property
    def ranges(self) -> list[range]:
        """Where there is RAM."""
        return [range(start, start + length) for start, length in self._vm.ram]

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> memoryview: ...

    def __getitem__(self, key: int | slice) -> int | memoryview:
        """A byte, or a view of a range. Raises GuestMemoryError where not all of it is RAM."""
        if not isinstance(key, slice):
            return self._vm.read_memory(key, 1)[0]
        start, length = _bounds(key)
        for region, size in self._vm.ram:
            if region <= start and start + length <= region + size:
                if isinstance(self._vm, Vm):
                    return self._view(self._vm, region, size)[start - region :][:length]
                # In another process, or a stand-in: a copy of this moment.
                return memoryview(self._vm.read_memory(start, length)).toreadonly()
        # It says where there is none; else it lies in several regions that adjoin.
        self._vm.read_memory(start, length)
        raise ValueError("the range lies in several regions of RAM: take one at a time (ranges)")

    def __setitem__(self, key: int | slice, data: int | Buffer) -> None:
        """Raises GuestMemoryError where not all of it is RAM, ValueError for another length."""
        address, raw = _written(key, data)
        self._allow("write_memory")
        self._vm.write_memory(address, raw)

    def _view(self, vm: Vm, region: int, size: int) -> memoryview:
        descriptor, offset = vm.ram_file(region)
        try:
            key = os.fstat(descriptor).st_ino, offset
            if key not in self._mapped:
                self._mapped[key] = mmap.mmap(
                    descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset
                )
        finally:
            os.close(descriptor)
        return memoryview(self._mapped[key])


class LinearMemory:
    """Memory at linear addresses, as one vCPU has it mapped now; ``vm.vcpus[0].linear``.

    ``linear[a:b]`` is bytes, ``linear[a]`` a byte; both can be assigned. Rights of pages do not
    count. Raises GuestMemoryError where something of it is not mapped, or no RAM.
    """

    def __init__(self, vm: MemoryAccess, vcpu: VcpuAccess, allow: Allow = allow_all) -> None:
        self._vm = vm
        self._allow = allow
        self._vcpu = vcpu

    def physical(self, address: int) -> int | None:
        """The physical address of a linear one; None where it is not mapped."""
        return self._vcpu.translate(address)

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...

    def __getitem__(self, key: int | slice) -> int | bytes:
        if not isinstance(key, slice):
            return self[key : key + 1][0]
        return b"".join(
            self._vm.read_memory(self._translate(at), size) for at, size in pages(*_bounds(key))
        )

    def __setitem__(self, key: int | slice, data: int | Buffer) -> None:
        address, raw = _written(key, data)
        self._allow("write_memory")
        parts = [(self._translate(at), at - address, size) for at, size in pages(address, len(raw))]
        for physical, start, size in parts:
            self._vm.write_memory(physical, raw[start : start + size])

    def text(self, address: int, limit: int = 4096) -> str:
        """The string that ends with a 0 byte there, without it; ``limit`` bytes of it at most."""
        found = bytearray()
        for at, size in pages(address, limit):
            found += self._vm.read_memory(self._translate(at), size)
            if 0 in found:
                break
        return bytes(found).partition(b"\0")[0].decode("utf-8", "replace")

    def _translate(self, address: int) -> int:
        physical = self._vcpu.translate(address)
        if physical is None:
            raise GuestMemoryError(f"the linear address {address:#x} is not mapped")
        return physical


def pages(address: int, length: int) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) by page."""
    end = min(address + length, 1 << 64)
    while address < end:
        size = min(end - address, _PAGE - address % _PAGE)
        yield address, size
        address += size


def _bounds(key: slice) -> tuple[int, int]:
    """(first, length). An address counts from 0 alone: a negative one is a mistake."""
    start, stop = key.start, key.stop
    if start is None or stop is None or key.step not in (None, 1):
        raise ValueError("a range of memory has a first address and one behind its last")
    if not 0 <= start <= stop <= 1 << 64:
        raise ValueError(f"{start:#x}:{stop:#x} is no range of addresses")
    return start, stop - start


def _written(key: int | slice, data: int | Buffer) -> tuple[int, bytes]:
    if not isinstance(key, slice):
        return key, (bytes([data]) if isinstance(data, int) else bytes(data))
    if isinstance(data, int):
        raise TypeError("a range of memory takes bytes")
    start, length = _bounds(key)
    raw = bytes(data)
    if len(raw) != length:
        raise ValueError(f"{len(raw)} bytes do not fit a range of {length}")
    return start, raw
