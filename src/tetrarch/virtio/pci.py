"""virtio over PCI (virtio 1.2, 4.1): a function with four structures in one BAR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tetrarch._native import Interrupt, IsrStatus, MsixTable
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import State
from tetrarch.errors import StateError
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction
from tetrarch.virtio.kind import VirtioKind
from tetrarch.virtio.registers import NO_VECTOR, QueueRegisters, VirtioRegisters

if TYPE_CHECKING:
    from tetrarch._native import Device, Vm

__all__ = ["VirtioPci"]

VENDOR: Final = 0x1AF4
#: Device IDs of those that have no legacy interface (4.1.2).
FIRST_DEVICE: Final = 0x1040

# Structures (4.1.4), as offsets in the BAR. Each has a page of its own.
COMMON: Final = 0x0000
ISR: Final = 0x1000
DEVICE: Final = 0x2000
NOTIFY: Final = 0x3000
STRIDE: Final = 4
PAGE: Final = 0x1000
BAR_BYTES: Final = 0x4000
STRUCTURES_BAR: Final = 4
MSIX_BAR: Final = 1

VENDOR_CAPABILITY: Final = 0x09
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5

QUEUE_BIT: Final = 1
CONFIG_BIT: Final = 2

#: PCI class codes by device ID; others are "unclassified, virtio".
_CLASSES: Final = {
    1: 0x020000,  # network: Ethernet
    2: 0x018000,  # mass storage: other
    3: 0x078000,  # communication: other
    16: 0x038000,  # display: other
    18: 0x098000,  # input: other
    26: 0x018000,
}

#: (offset, area, shift) of the queue addresses in the common structure.
_ADDRESSES: Final = {0x20: "descriptors", 0x28: "driver_area", 0x30: "device_area"}


class VirtioPci:
    """A device of a kind on the PCI bus; ``function`` is what is plugged."""

    def __init__(self, vm: Vm, kind: VirtioKind) -> None:
        vectors = min(len(kind.queue_sizes) + 1, 128)
        self.msix = MsixTable(vm, vectors)
        self._kind = kind
        self.registers = VirtioRegisters(kind, self._interrupt)
        parts = [
            BarPart(COMMON, PAGE, _Common(self)),
            BarPart(ISR, PAGE, _Isr(self)),
            BarPart(DEVICE, PAGE, _DeviceConfig(self)),
            BarPart(NOTIFY, PAGE, kind.data_path.doorbells(STRIDE)),
        ]
        self.function = PciFunction(
            vm,
            Identity(
                VENDOR,
                FIRST_DEVICE + kind.device_id,
                _CLASSES.get(kind.device_id, 0x00FF00),
                revision=1,
                subsystem_vendor=VENDOR,
                subsystem=0x1100,
            ),
            [
                Bar(MSIX_BAR, PAGE, [BarPart(0, PAGE, self.msix)]),
                Bar(STRUCTURES_BAR, BAR_BYTES, parts, wide=True, prefetchable=True),
            ],
            read_hook=self._read_window,
            on_bus_master=kind.data_path.set_master,
        )
        self.isr = IsrStatus(self.function.intx)
        self.function.add_msix(self.msix, MSIX_BAR)
        self._add_structure(COMMON_CFG, COMMON, 0x40)
        self._add_structure(ISR_CFG, ISR, 1)
        if kind.config:
            self._add_structure(DEVICE_CFG, DEVICE, len(kind.config))
        stride = STRIDE.to_bytes(4, "little")
        self._add_structure(NOTIFY_CFG, NOTIFY, STRIDE * len(kind.queue_sizes), stride)
        # A window through configuration space, for firmware that maps no BAR (4.1.4.9).
        body = _structure(PCI_CFG, bar=0, more=bytes(4))
        writable = b"\0\0\xff\0\0\0" + b"\xff" * 8 + b"\xff" * 4
        self._window = self.function.add_capability(
            VENDOR_CAPABILITY, body, writable, self._write_window
        )

    def _add_structure(self, kind: int, offset: int, length: int, more: bytes = b"") -> None:
        body = _structure(kind, STRUCTURES_BAR, offset, length, more)
        self.function.add_capability(VENDOR_CAPABILITY, body)

    def _interrupt(self, queue: QueueRegisters | None) -> Interrupt:
        """By message where the driver has switched them on, else by status and line."""
        vector = self.registers.state.config_vector if queue is None else queue.vector
        line = self.isr.interrupt(CONFIG_BIT if queue is None else QUEUE_BIT)
        return self.msix.vector(vector, line)

    # Common configuration (4.1.4.3)

    def read_common(self, offset: int, size: int) -> int:
        with self.registers.lock:
            registers = self.registers
            state, queue = registers.state, registers.queue
            match offset:
                case 0x00:
                    return state.device_feature_select
                case 0x04:
                    return registers.device_features()
                case 0x08:
                    return state.driver_feature_select
                case 0x0C:
                    return registers.driver_features()
                case 0x10:
                    return state.config_vector
                case 0x12:
                    return len(registers.queues)
                case 0x14:
                    return registers.status
                case 0x15:
                    return registers.generation
                case 0x16:
                    return state.queue_select
                case 0x1E:
                    return state.queue_select  # queue_notify_off
            if queue is None:
                return 0
            match offset:
                case 0x18:
                    return queue.size
                case 0x1A:
                    return queue.vector
                case 0x1C:
                    return int(queue.enabled)
            area = _ADDRESSES.get(offset & ~7)
            if area is None:
                return 0
            address: int = getattr(queue, area)
            return address >> 8 * (offset & 7) & all_ones(size)

    def write_common(self, offset: int, size: int, value: int) -> None:
        with self.registers.lock:
            registers = self.registers
            state, queue = registers.state, registers.queue
            match offset:
                case 0x00:
                    state.device_feature_select = value & all_ones(4)
                case 0x08:
                    state.driver_feature_select = value & all_ones(4)
                case 0x0C:
                    registers.write_driver_features(value)
                case 0x10:
                    state.config_vector = self._vector(value)
                case 0x14:
                    registers.write_status(value)
                    if value & 0xFF == 0:
                        self.isr.set(0)
                case 0x16:
                    state.queue_select = value & 0xFFFF
                case 0x18:
                    registers.write_queue_size(value & 0xFFFF)
                case 0x1A:
                    if queue is not None:
                        queue.vector = self._vector(value)
                case 0x1C:
                    registers.enable_queue(value)
                case _ if offset & ~7 in _ADDRESSES and offset % 4 == 0 and size >= 4:
                    area = _ADDRESSES[offset & ~7]
                    registers.write_queue_address(area, 8 * (offset & 7), value)
                    if size == 8:
                        registers.write_queue_address(area, 32, value >> 32)

    def _vector(self, value: int) -> int:
        """What cannot be is answered by no vector, which the driver reads back (4.1.5.1.2)."""
        value &= 0xFFFF
        return value if value < self.msix.vectors else NO_VECTOR

    def read_isr(self) -> int:
        """Reading clears it (4.1.4.5)."""
        return self.isr.acknowledge(QUEUE_BIT | CONFIG_BIT)

    # The window in configuration space

    def _access(self) -> tuple[int, int, int] | None:
        """(BAR, offset, size) that the driver has set."""
        config = self.function.config
        bar = config.get(self._window + 4, 1)
        offset, length = config.get(self._window + 8, 4), config.get(self._window + 12, 4)
        good = bar == STRUCTURES_BAR and length in (1, 2, 4) and offset % length == 0
        return (bar, offset, length) if good and offset < BAR_BYTES else None

    def _read_window(self, offset: int, size: int) -> int | None:
        if offset != self._window + 16:
            return None
        access = self._access()
        if access is None:
            return 0
        _, at, length = access
        return self._structure_at(at).read(at % PAGE, length)

    def _write_window(self, offset: int, size: int) -> None:
        access = self._access()
        if offset == 16 and access is not None:
            _, at, length = access
            value = self.function.config.get(self._window + 16, length)
            self._structure_at(at).write(at % PAGE, length, value)

    def _structure_at(self, offset: int) -> Device:
        return self.function.bars[1].parts[offset // PAGE].device

    # Life

    def reset(self) -> None:
        with self.registers.lock:
            self.registers.reset()
            self.isr.set(0)
        self.function.reset()

    def close(self) -> None:
        """Out of its slot: what the kind has of the host's is given back."""
        if callable(close := getattr(self._kind, "close", None)):
            close()

    def save(self) -> State:
        with self.registers.lock:
            state = {**self.registers.save(), "isr": self.isr.status}
        return {**state, "pci": self.function.save()}

    def load(self, state: State) -> None:
        isr = state.get("isr") if isinstance(state, dict) else None
        pci = state.get("pci") if isinstance(state, dict) else None
        if not isinstance(isr, int) or not isinstance(pci, dict):
            raise StateError("a saved virtio device is none", mend="save it again: it is damaged")
        self.function.load(pci)
        with self.registers.lock:
            self.registers.load(state)
            self.isr.set(isr)


def _structure(kind: int, bar: int, offset: int = 0, length: int = 0, more: bytes = b"") -> bytes:
    """struct virtio_pci_cap behind its pointer (4.1.4)."""
    size = 16 + len(more)
    place = offset.to_bytes(4, "little") + length.to_bytes(4, "little")
    return bytes([size, kind, bar, 0, 0, 0]) + place + more


class _Common:
    def __init__(self, device: VirtioPci) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        # A register that is wider than the access gives its low bytes.
        return self._device.read_common(offset, size) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write_common(offset, size, value)


class _Isr:
    def __init__(self, device: VirtioPci) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        return self._device.read_isr() if offset == 0 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


class _DeviceConfig:
    """The kind's own configuration."""

    def __init__(self, device: VirtioPci) -> None:
        self._registers = device.registers

    def read(self, offset: int, size: int) -> int:
        with self._registers.lock:
            return self._registers.read_config(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._registers.lock:
            self._registers.write_config(offset, size, value)
