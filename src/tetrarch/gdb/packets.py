"""Packets of gdb's remote protocol on the wire ("Overview", Appendix E of gdb's manual)."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

__all__ = ["PACKET_MAX", "PacketReader", "Signal", "escape", "frame", "unescape"]

#: Bytes between '$' and '#', either way.
PACKET_MAX = 0x4000

_END = ord("#")
_START = ord("$")
_ESCAPE = ord("}")
_ESCAPED = frozenset(b"$#}*")


class Signal(Enum):
    """What comes beside packets."""

    INTERRUPT = "Ctrl-C"
    AGAIN = "the last packet did not arrive whole"
    DAMAGED = "a packet did not arrive whole"


class PacketReader:
    """Finds packets in what arrives, in pieces of any size."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes | Signal]:
        """Payloads, still escaped, and signals. What makes no sense is passed over."""
        self._data += data
        while self._data:
            first = self._data[0]
            if first != _START:
                del self._data[0]
                if first == 0x03:
                    yield Signal.INTERRUPT
                elif first == ord("-"):
                    yield Signal.AGAIN
                continue
            end = self._data.find(_END)
            if end < 0:
                if len(self._data) > PACKET_MAX + 1:
                    self._data.clear()
                    yield Signal.DAMAGED
                return
            if len(self._data) < end + 3:
                return
            payload, checksum = bytes(self._data[1:end]), bytes(self._data[end + 1 : end + 3])
            del self._data[: end + 3]
            yield payload if checksum.lower() == _checksum(payload) else Signal.DAMAGED


def frame(payload: bytes) -> bytes:
    """A packet of a payload that is escaped where it has to be."""
    return b"$%b#%b" % (payload, _checksum(payload))


def escape(data: bytes) -> bytes:
    """Any bytes as part of a payload."""
    escaped = bytearray()
    for byte in data:
        escaped += bytes((_ESCAPE, byte ^ 0x20)) if byte in _ESCAPED else bytes((byte,))
    return bytes(escaped)


def unescape(data: bytes) -> bytes:
    plain = bytearray()
    flip = 0
    for byte in data:
        if byte == _ESCAPE and not flip:
            flip = 0x20
            continue
        plain.append(byte ^ flip)
        flip = 0
    return bytes(plain)


def _checksum(payload: bytes) -> bytes:
    return b"%02x" % (sum(payload) & 0xFF)
