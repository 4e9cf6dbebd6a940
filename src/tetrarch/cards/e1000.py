"""Intel's 82540EM (PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual,
317453): its PCI function, and the registers of the card as a whole, the EEPROM and the PHY.

All others, and rings, are ``E1000Rings``, on the I/O thread. Of its family this is the part that
guests and firmware know best: QEMU's and VirtualBox's card is one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch._native import E1000Rings, Intx
from tetrarch.cards import m88e1011, microwire
from tetrarch.cards.card import NetworkCard
from tetrarch.cards.microwire import MicrowireState
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import memory, register
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction

if TYPE_CHECKING:
    from tetrarch._native import Vm
    from tetrarch.net.network import OpenNetwork

__all__ = ["E1000Card", "E1000RegistersState", "eeprom_words"]

VENDOR: Final = 0x8086
DEVICE: Final = 0x100E
#: PRO/1000 MT Desktop Adapter.
SUBSYSTEM: Final = 0x001E
#: Network, Ethernet.
CLASS: Final = 0x020000
REVISION: Final = 2

#: Base address registers: the registers, and ports by which they are reached too (13.1.2).
REGISTERS, PORTS = 0, 1
REGISTER_BYTES: Final = 0x2_0000
PORT_BYTES: Final = 0x40
IOADDR, IODATA = 0, 4

# Registers that are here (13.4).
CTRL, CTRL_DUP, STATUS, EECD, EERD, CTRL_EXT = 0x00, 0x04, 0x08, 0x10, 0x14, 0x18
MDIC: Final = 0x20
FCAL, FCAH, FCT = 0x28, 0x2C, 0x30

# CTRL: full duplex, link, 1000 Mbit/s as the EEPROM has it; tags; resets, which end by themselves.
CTRL_START: Final = 1 << 0 | 1 << 6 | 2 << 8
TAGS: Final = 1 << 30
RESET, PHY_RESET = 1 << 26, 1 << 31
CTRL_EXT_BITS: Final = 0x00FF_0FFF
# STATUS: full duplex and 1000 Mbit/s, also as it was found.
STATUS_START: Final = 1 << 0 | 2 << 6 | 2 << 8
LINK_UP: Final = 1 << 1

# EERD: start, done, address, data.
EERD_START, EERD_DONE = 1 << 0, 1 << 4
EERD_ADDRESS_SHIFT, EERD_DATA_SHIFT = 8, 16

# EECD: the wires of the EEPROM; whose they are; that there is one.
EECD_OUT: Final = 1 << 3
EECD_KEPT: Final = 0x77
EECD_REQUEST, EECD_GRANT, EECD_PRESENT = 1 << 6, 1 << 7, 1 << 8

# MDIC.
MDIC_READ, MDIC_WRITE = 2, 1
MDIC_READY, MDIC_INTERRUPT, MDIC_ERROR = 1 << 28, 1 << 29, 1 << 30
PHY_ADDRESS: Final = 1

# Causes of interrupts (13.4.17).
LINK_CHANGED, MDIO_DONE = 1 << 2, 1 << 9

# Words of the EEPROM (5.6), and what all of them add up to.
EEPROM_WORDS: Final = 64
CONTROL_1, SUBSYSTEM_ID, SUBSYSTEM_VENDOR, DEVICE_ID, VENDOR_ID, CONTROL_2 = range(0x0A, 0x10)
CONTROL_3: Final = 0x14
CHECKSUM: Final = 0x3F
EEPROM_SUM: Final = 0xBABA
_U32: Final = 0xFFFF_FFFF


def eeprom_words(mac: bytes) -> list[int]:
    """What is in the EEPROM of a card with an address."""
    words = [0xFFFF] * EEPROM_WORDS
    words[:3] = struct.unpack("<3H", mac)
    words[3:10] = [0] * 7
    words[CONTROL_1] = 0x4403  # it is valid, has these names, full duplex
    words[SUBSYSTEM_ID], words[SUBSYSTEM_VENDOR] = SUBSYSTEM, VENDOR
    words[DEVICE_ID], words[VENDOR_ID] = DEVICE, VENDOR
    words[CONTROL_2] = 0x3040  # flow control is offered, as wires go
    words[CONTROL_3] = 0  # nothing wakes
    words[CHECKSUM] = EEPROM_SUM - sum(words[:CHECKSUM]) & 0xFFFF
    return words


@dataclass
class E1000RegistersState(MicrowireState):
    kind = "e1000"

    control: int = register(CTRL_START, _U32 & ~(RESET | PHY_RESET))
    control_ext: int = register(0, CTRL_EXT_BITS)
    eecd: int = register(0, EECD_KEPT)
    eerd: int = register(0, _U32)
    mdic: int = register(MDIC_READY, _U32)
    fcal: int = register(0, _U32)
    fcah: int = register(0, 0xFFFF)
    fct: int = register(0, 0xFFFF)
    port: int = register(0, _U32)
    """The register that IODATA is."""
    phy: bytearray = memory(len(m88e1011.START), m88e1011.START)


class E1000Card(NetworkCard):
    """A card, as a device to plug in."""

    model = "e1000"
    state: E1000RegistersState

    def __init__(self, vm: Vm, network: OpenNetwork, name: str, mac: bytes) -> None:
        super().__init__(network, name)
        self.state = E1000RegistersState()
        line = Intx()
        self.rings = E1000Rings(vm, name, network.native, mac, line)
        first = self.rings.FIRST_REGISTER
        self.function = PciFunction(
            vm,
            Identity(VENDOR, DEVICE, CLASS, REVISION, subsystem_vendor=VENDOR, subsystem=SUBSYSTEM),
            [
                Bar(
                    REGISTERS,
                    REGISTER_BYTES,
                    [
                        BarPart(0, first, _Registers(self)),
                        BarPart(first, REGISTER_BYTES - first, self.rings),
                    ],
                ),
                Bar(PORTS, PORT_BYTES, [BarPart(0, PORT_BYTES, _Ports(self))], io=True),
            ],
            intx=line,
            on_bus_master=self.rings.set_master,
        )
        state = self.state
        self._readers: Mapping[int, Callable[[], int]] = {
            CTRL: lambda: state.control,
            CTRL_DUP: lambda: state.control,
            STATUS: lambda: STATUS_START | (LINK_UP if self._link else 0),
            EECD: self._read_eecd,
            EERD: lambda: state.eerd,
            CTRL_EXT: lambda: state.control_ext,
            MDIC: lambda: state.mdic,
            FCAL: lambda: state.fcal,
            FCAH: lambda: state.fcah,
            FCT: lambda: state.fct,
        }
        self._writers: Mapping[int, Callable[[int], None]] = {
            CTRL: self._write_control,
            CTRL_DUP: self._write_control,
            EECD: self._write_eecd,
            EERD: self._write_eerd,
            CTRL_EXT: self._keep("control_ext", CTRL_EXT_BITS),
            MDIC: self._write_mdic,
            FCAL: self._keep("fcal", _U32),
            FCAH: self._keep("fcah", 0xFFFF),
            FCT: self._keep("fct", 0xFFFF),
        }

    @property
    def _rings(self) -> E1000Rings:
        return self.rings

    @property
    def _link(self) -> bool:
        return m88e1011.has_link(self.state.phy, self.rings.link)

    # Registers

    def read_register(self, offset: int) -> int:
        """Of 32 bits, at a multiple of 4."""
        if offset >= self.rings.FIRST_REGISTER:
            return self.rings.read(offset - self.rings.FIRST_REGISTER, 4)
        with self._lock:
            read = self._readers.get(offset)
            return 0 if read is None else read()

    def write_register(self, offset: int, value: int) -> None:
        if offset >= self.rings.FIRST_REGISTER:
            if offset < REGISTER_BYTES:
                self.rings.write(offset - self.rings.FIRST_REGISTER, 4, value)
            return
        with self._lock:
            write = self._writers.get(offset)
            if write is not None:
                write(value)

    def _keep(self, name: str, bits: int) -> Callable[[int], None]:
        return lambda value: setattr(self.state, name, value & bits)

    def _write_control(self, value: int) -> None:
        state = self.state
        if value & RESET:
            # All but the PHY, and what is said of ports (13.4.1).
            kept = {name: getattr(state, name) for name in ("phy", "port")}
            self.rings.reset()
            state.reset()
            for name, one in kept.items():
                setattr(state, name, one)
        else:
            state.control = value & ~PHY_RESET
        self.rings.set_tags(bool(state.control & TAGS))
        if value & PHY_RESET:
            state.phy[:] = m88e1011.START
            self.rings.set_loopback(False)
            self.rings.raise_causes(LINK_CHANGED)

    def _read_eecd(self) -> int:
        state = self.state
        granted = EECD_GRANT if state.eecd & EECD_REQUEST else 0
        out = EECD_OUT if microwire.out(state, self._eeprom) else 0
        return state.eecd | granted | out | EECD_PRESENT

    def _write_eecd(self, value: int) -> None:
        self.state.eecd = value & EECD_KEPT
        microwire.drive(self.state, value)

    @property
    def _eeprom(self) -> list[int]:
        return eeprom_words(self.rings.permanent)

    def _write_eerd(self, value: int) -> None:
        """Done at once."""
        address = value >> EERD_ADDRESS_SHIFT & 0xFF
        if value & EERD_START:
            data = self._eeprom[address] if address < EEPROM_WORDS else 0xFFFF
            value = EERD_DONE | data << EERD_DATA_SHIFT
        else:
            value = 0
        self.state.eerd = address << EERD_ADDRESS_SHIFT | value

    def _write_mdic(self, value: int) -> None:
        """Done at once too; and negotiation, whose end the driver hears of."""
        state = self.state
        number, address, operation = value >> 16 & 31, value >> 21 & 31, value >> 26 & 3
        answer = value & ~(MDIC_READY | MDIC_ERROR) | MDIC_READY
        if address != PHY_ADDRESS or operation not in (MDIC_READ, MDIC_WRITE):
            answer |= MDIC_ERROR
        elif operation == MDIC_READ:
            data = m88e1011.read(state.phy, number, self.rings.link)
            answer = answer & ~0xFFFF | data
        else:
            begins = m88e1011.write(state.phy, number, value & 0xFFFF)
            self.rings.set_loopback(m88e1011.loops(state.phy))
            if begins:
                self.rings.raise_causes(LINK_CHANGED)
        state.mdic = answer
        if value & MDIC_INTERRUPT:
            self.rings.raise_causes(MDIO_DONE)

    # Life

    def reset(self) -> None:
        super().reset()
        self.rings.set_loopback(False)


class _Registers:
    """Those that are here: words of 32 bits. Of one a part is read, and two are written at once."""

    def __init__(self, card: E1000Card) -> None:
        self._card = card

    def read(self, offset: int, size: int) -> int:
        at = offset & ~3
        value = self._card.read_register(at)
        if size > 4 and at == offset:
            value |= self._card.read_register(at + 4) << 32
        return value >> 8 * (offset - at) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size >= 4 and offset & 3 == 0:
            self._card.write_register(offset, value & _U32)
            if size > 4:
                self._card.write_register(offset + 4, value >> 32)


class _Ports:
    """A register is named, and then read or written (13.1.2)."""

    def __init__(self, card: E1000Card) -> None:
        self._card = card

    def read(self, offset: int, size: int) -> int:
        state = self._card.state
        if size != 4 or offset not in (IOADDR, IODATA):
            return 0
        if offset == IOADDR:
            return state.port
        return self._card.read_register(state.port) if _is_register(state.port) else 0

    def write(self, offset: int, size: int, value: int) -> None:
        state = self._card.state
        if size != 4:
            return
        if offset == IOADDR:
            state.port = value
        elif offset == IODATA and _is_register(state.port):
            self._card.write_register(state.port, value)


def _is_register(offset: int) -> bool:
    return offset < REGISTER_BYTES and offset & 3 == 0
