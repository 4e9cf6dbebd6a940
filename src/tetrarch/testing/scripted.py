"""A machine whose CPU is a Python function.

It stands in for ``tetrarch._native.Vm`` where a test is about devices, about
how a machine ends, or about anything else that needs no instruction.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tetrarch._native import EngineError
from tetrarch.machine.ram import runs

if TYPE_CHECKING:  # a protocol: of the stub file alone
    from tetrarch._native import Device

__all__ = ["ScriptedRegion", "ScriptedSource", "ScriptedVcpu", "ScriptedVm"]


# As crates/memory/src/image.rs has it: address, offset, length, checksum.
_RUN = struct.Struct("<QQII")
_PAGE = 4096

Script = Callable[["ScriptedVm"], str]


class ScriptedVm:
    """Memory, ports and interrupt lines; ``script`` is what the vCPU does in run()."""

    def __init__(self, script: Script, memory: int = 16 << 20) -> None:
        self.script = script
        self.lines: list[tuple[int, bool]] = []
        """Each change of an interrupt line: (GSI, level)."""
        self.registers = {"idtr_limit": 0xFFF, "cs_selector": 0x10}
        self._memory = bytearray(memory)
        self._regions: list[ScriptedRegion] = []
        self._begun = time.monotonic_ns()
        # Guards what follows: a request to stop, the number of holds, and whether the
        # script runs and is not between two instructions.
        self._changed = threading.Condition()
        self._stop = False
        self._holds = 0
        self._busy = False

    @property
    def ram(self) -> list[tuple[int, int]]:
        return [(0, len(self._memory))]

    def read_memory(self, address: int, length: int) -> bytes:
        return bytes(self._memory[address : address + length])

    def write_memory(self, address: int, data: bytes) -> None:
        self._memory[address : address + len(data)] = data

    def cpu_identity(self) -> tuple[str, int]:
        return "GenuineIntel", 0

    def cpu_features(self) -> list[tuple[str, int]]:
        return []

    def log_writes(self) -> None:
        self._logged = bytes(self._memory)

    def _written(self) -> Iterator[tuple[int, memoryview]]:
        for address in range(0, len(self._memory), _PAGE):
            page = slice(address, address + _PAGE)
            if self._memory[page] != self._logged[page]:
                yield address, memoryview(bytes(self._memory[page]))

    def save_ram(self, descriptor: int, offset: int, *, written: bool = False) -> tuple[bytes, int]:
        table = b""
        for address, data in self._written() if written else runs(self, 0, len(self._memory)):
            os.pwrite(descriptor, data, offset)
            table += _RUN.pack(address, offset, len(data), zlib.crc32(data))
            offset += len(data)
        return table, offset

    def load_ram(self, layers: Sequence[tuple[str, int, bytes]]) -> None:
        for name, descriptor, table in layers:
            if len(table) % _RUN.size:
                raise EngineError(f"{name} has a table of RAM that ends in the middle")
            for address, offset, length, crc in _RUN.iter_unpack(table):
                if address + length > len(self._memory):
                    raise EngineError(f"{name} has RAM where the machine has none")
                there = offset + length <= os.fstat(descriptor).st_size
                data = os.pread(descriptor, length, offset) if there else b""
                if len(data) < length or zlib.crc32(data) != crc:
                    raise EngineError(f"{name} has RAM with a wrong checksum")
                self.write_memory(address, data)

    def attach_ports(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        mapped: bool = True,
    ) -> ScriptedRegion:
        region = ScriptedRegion(self._regions, base, length, device, sizes or (1, 2, 4, 8))
        if mapped:
            region.map()
        return region

    def attach_mmio(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        mapped: bool = True,
    ) -> ScriptedRegion:
        # The script accesses ports alone: what lies in memory is not called.
        region = ScriptedRegion([], base, length, device, sizes or (1, 2, 4, 8))
        if mapped:
            region.map()
        return region

    def irq_source(self, gsi: int) -> ScriptedSource:
        return ScriptedSource(self.lines, gsi)

    def irq_line(self, gsi: int, level: bool) -> None:
        self.lines.append((gsi, level))

    def msi(self, address: int, data: int) -> None:
        pass

    def clock_ns(self) -> int:
        return time.monotonic_ns() - self._begun

    def vcpu(self, index: int) -> ScriptedVcpu:
        return ScriptedVcpu(self)

    def hold(self, timeout: float = 5.0) -> None:
        with self._changed:
            self._holds += 1
            if not self._changed.wait_for(lambda: not self._busy, timeout):
                self._holds -= 1
                raise EngineError(f"vCPU 0 did not come to rest in {timeout:g} s")

    def resume(self) -> None:
        with self._changed:
            self._holds -= 1
            self._changed.notify_all()

    def save_state(self) -> bytes:
        return json.dumps(self.clock_ns()).encode()

    def load_state(self, data: bytes) -> None:
        self._begun = time.monotonic_ns() - int(json.loads(data))

    def keep_reset_state(self) -> None:
        self._reset_registers = dict(self.registers)

    def reset_vcpu(self, index: int) -> None:
        pass

    def reset(self) -> None:
        self.registers = dict(self._reset_registers)

    def set_debug_alert(self, descriptor: int | None) -> None:
        pass

    def take_debug_stops(self) -> list[tuple[int, str, int]]:
        """A script has no instructions to stop at."""
        return []

    def set_planted(self, addresses: Sequence[int]) -> None:
        pass

    def request_stop(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    def replay(self) -> None:
        return None

    def end_recording(self) -> None:
        return None

    def stats(self) -> dict[str, dict[str, int]]:
        return {"exits": {"io": 0}}

    def _run(self) -> str:
        with self._changed:
            if self._take_stop():
                return "stopped"
            self._busy = True
        try:
            self.rest()
            return self.script(self)
        finally:
            with self._changed:
                self._busy = False
                self._take_stop()
                self._changed.notify_all()

    def _take_stop(self) -> bool:
        """A request ends the run that goes on, or else the next one."""
        stop, self._stop = self._stop, False
        return stop

    # What a script uses.

    def rest(self) -> None:
        """Between two instructions: stays here while the machine is held."""
        if self._holds:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stop or not self._holds)
                self._busy = True

    def port_out(self, port: int, value: int, size: int = 1) -> None:
        self.rest()
        region = self._find(port, size)
        if region is not None:
            region.device.write(port - region.base, size, value)

    def port_in(self, port: int, size: int = 1) -> int:
        self.rest()
        region = self._find(port, size)
        if region is not None:
            return region.device.read(port - region.base, size)
        return (1 << 8 * size) - 1

    def _find(self, port: int, size: int) -> ScriptedRegion | None:
        found = (region for region in self._regions if region.answers(port, size))
        return next(found, None)

    def wait_for_stop(self) -> str:
        """As an idle guest: sleeps until it is stopped."""
        with self._changed:
            self._busy = False  # HLT is between two instructions
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stop)
            self._busy = True
        return "stopped"

    def spin_until_stop(self) -> str:
        """As a guest in an endless loop."""
        while not self._stop:
            self.rest()
        return "stopped"


class ScriptedRegion:
    """A range of ports where a device answers."""

    def __init__(
        self,
        regions: list[ScriptedRegion],
        base: int,
        length: int,
        device: Device,
        sizes: Sequence[int],
    ) -> None:
        self.base = base
        self.length = length
        self.device = device
        self._sizes = sizes
        self._regions = regions

    @property
    def mapped(self) -> bool:
        return self in self._regions

    def answers(self, port: int, size: int) -> bool:
        return self.base <= port < self.base + self.length and size in self._sizes

    def move(self, base: int) -> None:
        self.base = base

    def map(self) -> None:
        if not self.mapped:
            self._regions.append(self)

    def unmap(self) -> None:
        if self.mapped:
            self._regions.remove(self)

    def detach(self) -> None:
        self.unmap()


class ScriptedSource:
    """Drives an interrupt line of the machine."""

    # Not the machine: a device in Rust that holds both would keep them alive for ever.
    def __init__(self, lines: list[tuple[int, bool]], gsi: int) -> None:
        self._lines = lines
        self.gsi = gsi

    def set(self, level: bool) -> None:
        self._lines.append((self.gsi, level))

    def pulse(self) -> None:
        self.set(True)
        self.set(False)


class ScriptedVcpu:
    """Runs the machine's script."""

    def __init__(self, vm: ScriptedVm) -> None:
        self._vm = vm

    def run(self) -> str:
        return self._vm._run()

    def regs(self) -> dict[str, int]:
        return dict(self._vm.registers)

    def set_regs(self, values: dict[str, int]) -> None:
        self._vm.registers.update(values)

    def translate(self, linear: int) -> int | None:
        return linear

    def xsave(self) -> bytes:
        return bytes(832)

    def set_xsave(self, image: bytes) -> None:
        pass

    def msr(self, index: int) -> int | None:
        return None

    def set_msr(self, index: int, value: int) -> bool:
        return False

    def set_debug(
        self,
        *,
        step: bool = False,
        block_interrupts: bool = True,
        software: bool = False,
        hardware: Sequence[tuple[str, int, int]] | None = None,
    ) -> None:
        pass

    def set_present(self, present: bool) -> None:
        pass

    def set_frozen(self, frozen: bool) -> None:
        pass

    def dump(self) -> str:
        return "RIP=0000000000000000"

    def save_state(self) -> bytes:
        return json.dumps(self._vm.registers).encode()

    def load_state(self, data: bytes) -> None:
        self._vm.registers = json.loads(data)
