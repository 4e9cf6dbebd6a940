"""virtio over MMIO (virtio 1.2, 4.2): a page of registers and a line for each device."""

from __future__ import annotations

from typing import Final

from tetrarch._native import Interrupt, IsrStatus, RustDevice
from tetrarch.devices._state import State
from tetrarch.errors import StateError
from tetrarch.machine.engine_vm import InterruptWire
from tetrarch.virtio.kind import VirtioKind
from tetrarch.virtio.registers import QueueRegisters, VirtioRegisters

__all__ = ["NOTIFY", "REGISTERS", "VirtioMmio"]

#: The registers, and the part of them that is Rust's: QueueNotify.
REGISTERS: Final = 0x1000
NOTIFY: Final = 0x50
CONFIG: Final = 0x100

MAGIC: Final = int.from_bytes(b"virt", "little")
VERSION: Final = 2
VENDOR: Final = int.from_bytes(b"TTRA", "little")

QUEUE_BIT: Final = 1
CONFIG_BIT: Final = 2

#: Which area, and which half of its address, a register is (QueueDescLow and on).
_ADDRESSES: Final = {
    0x80: ("descriptors", 0),
    0x84: ("descriptors", 32),
    0x90: ("driver_area", 0),
    0x94: ("driver_area", 32),
    0xA0: ("device_area", 0),
    0xA4: ("device_area", 32),
}


class VirtioMmio:
    """The registers of a device: ``below`` and ``above`` QueueNotify, which is ``doorbells``."""

    def __init__(self, kind: VirtioKind, wire: InterruptWire) -> None:
        self.isr = IsrStatus(wire)
        self.registers = VirtioRegisters(kind, self._interrupt)
        self.doorbells: RustDevice = kind.data_path.doorbells(0)
        self.below = _Part(self, 0)
        self.above = _Part(self, NOTIFY + 4)

    def _interrupt(self, queue: QueueRegisters | None) -> Interrupt:
        return self.isr.interrupt(CONFIG_BIT if queue is None else QUEUE_BIT)

    def read(self, offset: int, size: int) -> int:
        with self.registers.lock:
            if offset >= CONFIG:
                return self.registers.read_config(offset - CONFIG, size)
            return self._read(offset) if size == 4 and offset % 4 == 0 else 0

    def _read(self, offset: int) -> int:
        registers = self.registers
        queue = registers.queue
        match offset:
            case 0x00:
                return MAGIC
            case 0x04:
                return VERSION
            case 0x08:
                return registers.kind.device_id
            case 0x0C:
                return VENDOR
            case 0x10:
                return registers.device_features()
            case 0x34:
                select = registers.state.queue_select
                return registers.kind.queue_sizes[select] if queue is not None else 0
            case 0x44:
                return int(queue is not None and queue.enabled)
            case 0x60:
                return self.isr.status
            case 0x70:
                return registers.status
            case 0xB0 | 0xB4 | 0xB8 | 0xBC:
                return 0xFFFF_FFFF  # no shared memory (4.2.2.2)
            case 0xFC:
                return registers.generation
            case _:
                return 0  # not there, or for writing

    def write(self, offset: int, size: int, value: int) -> None:
        with self.registers.lock:
            if offset >= CONFIG:
                self.registers.write_config(offset - CONFIG, size, value)
            elif size == 4 and offset % 4 == 0:
                self._write(offset, value)

    def _write(self, offset: int, value: int) -> None:
        registers = self.registers
        match offset:
            case 0x14:
                registers.state.device_feature_select = value
            case 0x20:
                registers.write_driver_features(value)
            case 0x24:
                registers.state.driver_feature_select = value
            case 0x30:
                registers.state.queue_select = value & 0xFFFF
            case 0x38:
                registers.write_queue_size(value)
            case 0x44 if value == 0:
                registers.disable_queue()
            case 0x44:
                registers.enable_queue(value)
            case 0x64:
                self.isr.acknowledge(value)
            case 0x70:
                registers.write_status(value)
                if value == 0:
                    self.isr.set(0)
            case _ if offset in _ADDRESSES:
                area, shift = _ADDRESSES[offset]
                registers.write_queue_address(area, shift, value)
            case _:
                pass

    def reset(self) -> None:
        with self.registers.lock:
            self.registers.reset()
            self.isr.set(0)

    def save(self) -> State:
        with self.registers.lock:
            return {**self.registers.save(), "isr": self.isr.status}

    def load(self, state: State) -> None:
        isr = state.get("isr") if isinstance(state, dict) else None
        if not isinstance(isr, int):
            raise StateError("a saved virtio device has no interrupt status", mend="save it again")
        with self.registers.lock:
            self.registers.load(state)
            self.isr.set(isr)


class _Part:
    """The registers from an offset on."""

    def __init__(self, device: VirtioMmio, start: int) -> None:
        self._device = device
        self._start = start

    def read(self, offset: int, size: int) -> int:
        return self._device.read(self._start + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(self._start + offset, size, value)
