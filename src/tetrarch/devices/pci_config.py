"""PCI configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2), and a host bridge on an empty bus.

The bridge is Intel's 82441FX by its identity: guests look for a host bridge before they trust the
mechanism (Linux, arch/x86/pci/direct.c, pci_sanity_check). It has nothing to configure.
"""

from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import MAX_ACCESS, all_ones
from tetrarch.devices._state import DeviceState, State, register

__all__ = [
    "ADDRESS_PORT",
    "DATA_PORT",
    "DATA_PORTS",
    "PciAddressPort",
    "PciConfigPorts",
    "PciConfigState",
    "PciDataPorts",
]

#: Takes dwords alone: bytes there are ordinary ports, such as the reset register.
ADDRESS_PORT: Final = 0xCF8
DATA_PORT: Final = 0xCFC
DATA_PORTS: Final = 4

ENABLE: Final = 1 << 31
#: Bus, device, function and register; bits 24 to 30 and the low two are reserved and 0.
ADDRESS_MASK: Final = ENABLE | 0x00FF_FFFC
FUNCTION_MASK: Final = 0x00FF_FF00

CONFIG_BYTES: Final = 256


def _host_bridge() -> bytes:
    space = bytearray(CONFIG_BYTES)
    space[0x00:0x04] = (0x8086).to_bytes(2, "little") + (0x1237).to_bytes(2, "little")
    # Memory space and bus master enabled; fast back-to-back, medium DEVSEL timing.
    space[0x04:0x08] = (0x0006).to_bytes(2, "little") + (0x0280).to_bytes(2, "little")
    space[0x08] = 0x02  # revision
    space[0x09:0x0C] = bytes([0x00, 0x00, 0x06])  # class: host bridge
    return bytes(space)


HOST_BRIDGE: Final = _host_bridge()


@dataclass
class PciConfigState(DeviceState):
    kind = "pci_config"

    address: int = register(0, ADDRESS_MASK)


class PciConfigPorts:
    """Attach ``address`` at ADDRESS_PORT, for dwords alone, and ``data`` at DATA_PORT."""

    def __init__(self) -> None:
        self.state = PciConfigState()
        self.address = PciAddressPort(self.state)
        self.data = PciDataPorts(self.state)

    def reset(self) -> None:
        self.state.reset()

    def save(self) -> State:
        return self.state.save()

    def load(self, state: State) -> None:
        self.state.load(state)


class PciAddressPort:
    def __init__(self, state: PciConfigState) -> None:
        self._state = state

    def read(self, offset: int, size: int) -> int:
        return self._state.address if offset == 0 and size == 4 else all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 4:
            self._state.address = value & ADDRESS_MASK


class PciDataPorts:
    def __init__(self, state: PciConfigState) -> None:
        self._state = state

    def read(self, offset: int, size: int) -> int:
        address = self._state.address
        if not address & ENABLE or address & FUNCTION_MASK or not 0 <= offset < DATA_PORTS:
            return all_ones(size)  # nobody answers: master abort
        first = (address & 0xFC) + offset
        data = HOST_BRIDGE[first : min(first + size, (first & ~3) + 4)]
        return int.from_bytes(data.ljust(min(max(size, 0), MAX_ACCESS), b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        pass  # every register of the bridge is read-only
