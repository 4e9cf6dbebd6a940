"""VMware's VMXNET3 (Linux, drivers/net/vmxnet3/vmxnet3_defs.h): its PCI function, and the registers
of addresses and commands.

Rings, interrupt masks and doorbells are ``Vmxnet3Rings``, on the I/O thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch._native import (
    EngineError,
    Intx,
    MsiVectors,
    MsixTable,
    Vmxnet3Causes,
    Vmxnet3Rings,
)
from tetrarch._seldom import Seldom
from tetrarch.cards.card import NetworkCard
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, register
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction

if TYPE_CHECKING:
    from tetrarch._native import Vm
    from tetrarch.net.network import OpenNetwork

__all__ = ["Vmxnet3Card", "Vmxnet3RegistersState"]

log = logging.getLogger(__name__)

VENDOR: Final = 0x15AD
DEVICE: Final = 0x07B0
#: Network, Ethernet.
CLASS: Final = 0x020000
REVISION: Final = 1

PAGE: Final = 0x1000
#: Base address registers: rings, commands, and MSI-X.
RINGS, COMMANDS, MSIX = 0, 1, 2

# Registers of the second.
VRRS, UVRS, DSAL, DSAH, CMD, MACL, MACH, ICR, ECR = range(0, 9 * 8, 8)

#: Bits of the revisions that there are: two of the card, one of its pass-through.
FIRST, SECOND = 1, 2
REVISIONS: Final = FIRST | SECOND
UPT_REVISIONS: Final = 1

# Commands that set something.
ACTIVATE_DEV, QUIESCE_DEV, RESET_DEV = 0xCAFE_0000, 0xCAFE_0001, 0xCAFE_0002
UPDATE_RX_MODE, UPDATE_MAC_FILTERS, UPDATE_VLAN_FILTERS = 0xCAFE_0003, 0xCAFE_0004, 0xCAFE_0005
UPDATE_RSSIDT, UPDATE_IML, UPDATE_PMCFG = 0xCAFE_0006, 0xCAFE_0007, 0xCAFE_0008
UPDATE_FEATURE = 0xCAFE_0009
# Those that ask for something, which the register then has.
GET_QUEUE_STATUS, GET_STATS, GET_LINK = 0xF00D_0000, 0xF00D_0001, 0xF00D_0002
GET_PERM_MAC_LO, GET_PERM_MAC_HI = 0xF00D_0003, 0xF00D_0004
GET_DID_LO, GET_DID_HI, GET_DEV_EXTRA_INFO = 0xF00D_0005, 0xF00D_0006, 0xF00D_0007
GET_CONF_INTR = 0xF00D_0008

#: What a link that is up says: so many Mbit/s, and bit 0.
LINK_UP: Final = 10_000 << 16 | 1
#: The driver chooses between messages and the line, and interrupts mask themselves.
INTERRUPTS: Final = 0
FAILED: Final = 1
_U32: Final = 0xFFFF_FFFF


@dataclass
class Vmxnet3RegistersState(DeviceState):
    kind = "vmxnet3"

    revision: int = register(FIRST, REVISIONS)
    """The bit of the one that the driver has chosen."""
    shared_low: int = register(0, _U32)
    shared_high: int = register(0, _U32)
    mac_low: int = register(0, _U32)
    """Written, and an address with the high part."""
    answer: int = register(0, _U32)
    """To the last command."""


class Vmxnet3Card(NetworkCard):
    """A card, as a device to plug in."""

    model = "VMXNET3"
    state: Vmxnet3RegistersState

    def __init__(self, vm: Vm, network: OpenNetwork, name: str, mac: bytes) -> None:
        super().__init__(network, name)
        self.state = Vmxnet3RegistersState()
        self._complaint = Seldom()
        line, count = Intx(), Vmxnet3Rings.MAX_INTERRUPTS
        messages, self.msix = MsiVectors(vm, 1), MsixTable(vm, count)
        causes = Vmxnet3Causes(line)
        interrupts = [
            self.msix.vector(number, messages.vector(0, causes.interrupt(number)))
            for number in range(count)
        ]
        self.rings = Vmxnet3Rings(vm, name, network.native, mac, causes, interrupts)
        self.function = PciFunction(
            vm,
            Identity(VENDOR, DEVICE, CLASS, REVISION, subsystem_vendor=VENDOR, subsystem=DEVICE),
            [
                Bar(RINGS, PAGE, [BarPart(0, PAGE, self.rings)]),
                Bar(COMMANDS, PAGE, [BarPart(0, PAGE, _Registers(self))]),
                Bar(MSIX, PAGE, [BarPart(0, PAGE, self.msix)]),
            ],
            intx=line,
            on_bus_master=self.rings.set_master,
        )
        self.function.add_msi(messages)
        self.function.add_msix(self.msix, MSIX)
        rings = self.rings
        self._readers: Mapping[int, Callable[[], int]] = {
            VRRS: lambda: REVISIONS,
            UVRS: lambda: UPT_REVISIONS,
            DSAL: lambda: self.state.shared_low,
            DSAH: lambda: self.state.shared_high,
            CMD: lambda: self.state.answer,
            MACL: lambda: _low(rings.mac),
            MACH: lambda: _high(rings.mac),
            ICR: rings.take_causes,
            ECR: lambda: rings.events,
        }
        self._commands: Mapping[int, Callable[[], int | None]] = {
            ACTIVATE_DEV: self._activate,
            QUIESCE_DEV: rings.quiesce,
            RESET_DEV: rings.reset,
            UPDATE_RX_MODE: rings.update_rx_mode,
            UPDATE_MAC_FILTERS: rings.update_mac_filters,
            UPDATE_VLAN_FILTERS: rings.update_vlan_filters,
            UPDATE_RSSIDT: rings.update_rss,
            UPDATE_FEATURE: rings.update_features,
            GET_QUEUE_STATUS: rings.put_status,
            GET_STATS: rings.put_statistics,
            GET_LINK: lambda: LINK_UP if rings.link else 0,
            GET_PERM_MAC_LO: lambda: _low(rings.permanent),
            GET_PERM_MAC_HI: lambda: _high(rings.permanent),
            GET_DID_LO: lambda: DEVICE,
            GET_DID_HI: lambda: REVISION,
            GET_CONF_INTR: lambda: INTERRUPTS,
        }
        """Those that are none of them do nothing, and read as 0: as a card that moderates no
        interrupts does with UPDATE_IML, and one that wakes nobody with UPDATE_PMCFG."""

    @property
    def _rings(self) -> Vmxnet3Rings:
        return self.rings

    # Registers

    def read_register(self, offset: int) -> int:
        """Of 32 bits, at a multiple of 8."""
        read = self._readers.get(offset)
        return 0 if read is None else read()

    def write_register(self, offset: int, value: int) -> None:
        with self._lock:
            state = self.state
            if offset == VRRS and value in (FIRST, SECOND):
                state.revision = value
            elif offset == DSAL:
                state.shared_low = value
            elif offset == DSAH:
                state.shared_high = value
            elif offset == CMD:
                self._execute(value)
            elif offset == MACL:
                state.mac_low = value
            elif offset == MACH:
                mac = state.mac_low | (value & 0xFFFF) << 32
                self.rings.set_mac(mac.to_bytes(6, "little"))
            elif offset == ECR:
                self.rings.clear_events(value)

    def _execute(self, command: int) -> None:
        carry_out = self._commands.get(command)
        answer = carry_out() if carry_out is not None else None
        self.state.answer = answer or 0

    def _activate(self) -> int:
        try:
            shared = self.state.shared_low | self.state.shared_high << 32
            self.rings.activate(shared, self.state.revision == SECOND)
        except EngineError as error:
            if self._complaint.due():
                log.warning("%s: its driver cannot activate it: %s", self.name, error)
            return FAILED
        return 0


def _low(mac: bytes) -> int:
    return int.from_bytes(mac[:4], "little")


def _high(mac: bytes) -> int:
    return int.from_bytes(mac[4:], "little")


class _Registers:
    """The page of the registers: words of 32 bits, 8 bytes apart."""

    def __init__(self, card: Vmxnet3Card) -> None:
        self._card = card

    def read(self, offset: int, size: int) -> int:
        at = offset & ~7
        return self._card.read_register(at) >> 8 * (offset - at) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size >= 4:
            self._card.write_register(offset, value & _U32)
