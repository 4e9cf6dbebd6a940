"""Flows, and who decides about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

__all__ = ["Address", "Flow", "FlowFilter"]

Address: TypeAlias = IPv4Address | IPv6Address

# Protocol numbers (IANA), by the names of /etc/protocols.
_NAMES = {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp", 132: "sctp"}


@dataclass(frozen=True)
class Flow:
    """Who talks to whom by IP, as the first packet says."""

    protocol: int
    """IANA's number: 6 is TCP, 17 UDP."""
    source: Address
    destination: Address
    source_port: int | None
    """None where the protocol has no ports."""
    destination_port: int | None
    outgoing: bool
    """The guest began it."""

    def __str__(self) -> str:
        name = _NAMES.get(self.protocol, f"protocol {self.protocol}")
        ends = (self.source, self.source_port), (self.destination, self.destination_port)
        return f"{name} " + " to ".join(_end(*end) for end in ends)


def _end(address: Address, port: int | None) -> str:
    if port is None:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


FlowFilter: TypeAlias = Callable[[Flow], bool]
"""Whether a flow, and what answers it, may pass. Asked once about each, on a thread of its own."""
