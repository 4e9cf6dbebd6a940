"""Frames between a card and its network."""

from __future__ import annotations

import socket
import struct
from typing import Final

from tests.net.card import MAC, OTHER, udp

__all__ = ["MAC", "MESSAGE", "OTHER", "TO_NETWORK", "sum16", "tcp", "to_guest"]

MESSAGE: Final = udp(("10.0.0.2", 4000), ("10.0.0.1", 4001), b"message")
TO_NETWORK: Final = OTHER + MAC + b"\x88\xb5" + bytes(range(50))


def to_guest(data: bytes, to: bytes = MAC, kind: bytes = b"\x88\xb5") -> bytes:
    return to + OTHER + kind + data.ljust(46, b"\0")


def sum16(data: bytes | bytearray) -> int:
    even = bytes(data) + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(even) // 2}H", even))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp(data: bytes, *, prepared: bool = True) -> bytes:
    """From MAC to OTHER by IPv4; its sums right, or as a driver leaves them that wants segments."""
    addresses = socket.inet_aton("10.0.0.1") + socket.inet_aton("10.0.0.2")
    length = 20 + len(data)
    ip = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 7, 0x4000, 64, 6, 0) + addresses)
    segment = bytearray(struct.pack(">HHIIBBHHH", 4096, 80, 1000, 0, 0x50, 0x18, 64, 0, 0) + data)
    if prepared:
        ip[10:12] = struct.pack(">H", ~sum16(ip) & 0xFFFF)
        pseudo = addresses + struct.pack(">HH", 6, length)
        segment[16:18] = struct.pack(">H", ~sum16(pseudo + segment) & 0xFFFF)
    return OTHER + MAC + b"\x08\x00" + bytes(ip) + bytes(segment)
