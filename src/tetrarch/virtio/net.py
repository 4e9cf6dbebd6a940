"""Network device (virtio 1.2, 5.1): a card."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import VirtioNet
from tetrarch.devices._state import DeviceState, memory, queue, register
from tetrarch.virtio.kind import QUEUE_SIZE

if TYPE_CHECKING:
    from tetrarch._native import Vm
    from tetrarch.net.network import OpenNetwork

__all__ = ["NetKind", "NetState"]

# Feature bits (5.1.3).
CSUM: Final = 1 << 0
GUEST_CSUM: Final = 1 << 1
CTRL_GUEST_OFFLOADS: Final = 1 << 2
MTU: Final = 1 << 3
MAC: Final = 1 << 5
GUEST_TSO4: Final = 1 << 7
GUEST_TSO6: Final = 1 << 8
GUEST_ECN: Final = 1 << 9
HOST_TSO4: Final = 1 << 11
HOST_TSO6: Final = 1 << 12
HOST_ECN: Final = 1 << 13
MRG_RXBUF: Final = 1 << 15
STATUS: Final = 1 << 16
CTRL_VQ: Final = 1 << 17
CTRL_RX: Final = 1 << 18
CTRL_VLAN: Final = 1 << 19
CTRL_RX_EXTRA: Final = 1 << 20
GUEST_ANNOUNCE: Final = 1 << 21
MQ: Final = 1 << 22
CTRL_MAC_ADDR: Final = 1 << 23

#: What a driver leaves to the device is done whatever the network.
_ALWAYS: Final = (
    CSUM | GUEST_CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | MRG_RXBUF | MAC | STATUS
    | CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS
    | GUEST_ANNOUNCE
)  # fmt: skip

_CONTROL_SIZE: Final = 64
#: Addresses of each table that the data path keeps (net/rules.rs).
_ADDRESSES: Final = 256

#: struct virtio_net_config (5.1.4): mac, status, max_virtqueue_pairs, mtu.
CONFIG: Final = struct.Struct("<6sHHH")


@dataclass
class NetState(DeviceState):
    """What the driver has asked by commands."""

    kind = "virtio-net"

    permanent: Sequence[int] = memory(6)
    mac: Sequence[int] = memory(6)
    mode: int = register(0, 0xFF)
    unicast: Sequence[int] = queue(6 * _ADDRESSES)
    multicast: Sequence[int] = queue(6 * _ADDRESSES)
    vlans: Sequence[int] = memory(512)
    pairs: int = register(1, 0xFFFF)
    guest_offloads: int = register(0, (1 << 64) - 1)


class NetKind:
    device_id: Final = 1

    def __init__(self, vm: Vm, network: OpenNetwork, name: str, mac: bytes) -> None:
        self.name = name
        self.network = network
        self._pairs = network.native.queues
        self.queue_sizes: Sequence[int] = (*(QUEUE_SIZE,) * 2 * self._pairs, _CONTROL_SIZE)
        self.features = _ALWAYS | (MQ if self._pairs > 1 else 0)
        if network.native.offloads:
            self.features |= GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN
        self._mtu = network.spec.mtu
        if self._mtu is not None:
            self.features |= MTU
        self.data_path = VirtioNet(vm, name, network.native, mac)
        self._changed_mac: bytes | None = None

    @property
    def config(self) -> bytes:
        path = self.data_path
        return CONFIG.pack(path.mac, path.status, self._pairs, self._mtu or 0)

    def write_config(self, offset: int, data: bytes) -> None:
        pass  # the address alone could be written, by drivers of before virtio 1.0

    def negotiated(self, features: int) -> None:
        pass

    def stats(self) -> dict[str, int]:
        """Frames, bytes, and what was dropped by the reason."""
        return self.network.native.stats()

    def close(self) -> None:
        """Lets go of the network: the device is out, or the machine has ended."""
        self.network.leave()
        self.data_path.close()
        self.network.close()

    def change_mac(self, mac: bytes) -> None:
        """Another address of the card's own than the state that is loaded next has. A driver that
        runs keeps the one that it has found, and that is let through, until it starts anew."""
        self._changed_mac = mac

    def save(self) -> dict[str, Any]:
        return NetState(**self.data_path.state()).save()

    def load(self, state: dict[str, Any]) -> None:
        saved = NetState()
        saved.load(state)
        self.data_path.restore(
            {
                "permanent": self._changed_mac or bytes(saved.permanent),
                "mac": bytes(saved.mac),
                "mode": saved.mode,
                "unicast": bytes(saved.unicast),
                "multicast": bytes(saved.multicast),
                "vlans": bytes(saved.vlans),
                "pairs": saved.pairs,
                "guest_offloads": saved.guest_offloads,
            }
        )
