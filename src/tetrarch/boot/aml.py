"""ACPI Machine Language by small functions that return bytes (ACPI 6.5, chapter 20)."""

import struct
from typing import Final

__all__ = [
    "ARG_0",
    "ARG_1",
    "LOCAL_0",
    "bit_and",
    "buffer",
    "bus_numbers",
    "call",
    "device",
    "dma",
    "eisa_id",
    "end_tag",
    "give",
    "integer",
    "interrupt",
    "io_port",
    "io_window",
    "irq",
    "memory32",
    "memory_window",
    "method",
    "name",
    "name_string",
    "notify",
    "package",
    "port_registers",
    "resources",
    "scope",
    "store",
    "string",
    "when",
    "with_length",
]

ZERO_OP: Final = b"\x00"
ONE_OP: Final = b"\x01"
NAME_OP: Final = b"\x08"
STRING_PREFIX: Final = b"\x0d"
SCOPE_OP: Final = b"\x10"
BUFFER_OP: Final = b"\x11"
PACKAGE_OP: Final = b"\x12"
DEVICE_OP: Final = b"\x5b\x82"
METHOD_OP: Final = b"\x14"
STORE_OP: Final = b"\x70"
AND_OP: Final = b"\x7b"
NOTIFY_OP: Final = b"\x86"
IF_OP: Final = b"\xa0"
RETURN_OP: Final = b"\xa4"
REGION_OP: Final = b"\x5b\x80"
FIELD_OP: Final = b"\x5b\x81"
DUAL_PREFIX: Final = b"\x2e"
MULTI_PREFIX: Final = b"\x2f"


def integer(value: int) -> bytes:
    if value == 0:
        return ZERO_OP
    if value == 1:
        return ONE_OP
    for prefix, form in ((0x0A, "B"), (0x0B, "H"), (0x0C, "I"), (0x0E, "Q")):
        if 0 <= value < 1 << 8 * struct.calcsize(form):
            return struct.pack(f"<B{form}", prefix, value)
    raise ValueError(f"{value} is no 64-bit unsigned integer")


def string(text: str) -> bytes:
    return STRING_PREFIX + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """``PNP0501`` as the integer that _HID takes (19.3.4)."""
    vendor = 0
    for letter in text[:3]:
        vendor = vendor << 5 | ord(letter) - 0x40
    packed = vendor << 16 | int(text[3:], 16)
    return integer(int.from_bytes(packed.to_bytes(4, "big"), "little"))


def name_string(path: str) -> bytes:
    """``COM1``, ``_SB.COM1`` or ``\\_SB``: segments are padded with underscores (20.2.2)."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [segment.encode("ascii").ljust(4, b"_") for segment in path.lstrip("\\").split(".")]
    if len(segments) == 1:
        prefix = b""
    elif len(segments) == 2:
        prefix = DUAL_PREFIX
    else:
        prefix = MULTI_PREFIX + bytes([len(segments)])
    return root + prefix + b"".join(segments)


def with_length(body: bytes) -> bytes:
    """PkgLength (20.2.4), which counts itself, and the body."""
    if len(body) + 1 < 1 << 6:
        return bytes([len(body) + 1]) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            first = extra << 6 | total & 0xF
            return bytes([first]) + (total >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"{len(body)} bytes are too long for an AML package")


def name(path: str, value: bytes) -> bytes:
    return NAME_OP + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    return SCOPE_OP + with_length(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    return DEVICE_OP + with_length(name_string(path) + b"".join(terms))


def package(*elements: bytes) -> bytes:
    return PACKAGE_OP + with_length(bytes([len(elements)]) + b"".join(elements))


# Methods (20.2.5), as far as events of the hardware need them.

LOCAL_0: Final = b"\x60"
ARG_0: Final = b"\x68"
ARG_1: Final = b"\x69"
_NO_TARGET: Final = b"\x00"


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """One that others may run at the same time (not serialized)."""
    flags = bytes([arguments])
    return METHOD_OP + with_length(name_string(path) + flags + b"".join(terms))


def call(path: str, *arguments: bytes) -> bytes:
    return name_string(path) + b"".join(arguments)


def store(source: bytes, target: bytes) -> bytes:
    return STORE_OP + source + target


def bit_and(left: bytes, right: bytes) -> bytes:
    return AND_OP + left + right + _NO_TARGET


def when(condition: bytes, *terms: bytes) -> bytes:
    return IF_OP + with_length(condition + b"".join(terms))


def give(value: bytes) -> bytes:
    """What a method's call is."""
    return RETURN_OP + value


def notify(path: str, value: bytes) -> bytes:
    return NOTIFY_OP + name_string(path) + value


def port_registers(path: str, base: int, *fields: str, bits: int = 32) -> bytes:
    """A region of I/O ports (20.2.5.2) with registers in it, of 8 or 32 bits, side by side."""
    system_io, write_as_zeros = 0x01, 0x40
    access = {8: 1, 32: 3}[bits]
    length = bits // 8 * len(fields)
    region = name_string(path) + bytes([system_io]) + integer(base) + integer(length)
    listed = b"".join(name_string(field) + bytes([bits]) for field in fields)
    flags = bytes([access | write_as_zeros])
    return REGION_OP + region + FIELD_OP + with_length(name_string(path) + flags + listed)


def buffer(data: bytes) -> bytes:
    return BUFFER_OP + with_length(integer(len(data)) + data)


# Resource descriptors, ACPI 6.5, 6.4.


def io_port(base: int, length: int) -> bytes:
    """I/O port descriptor (6.4.2.5), 16-bit decode, fixed place."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq(line: int) -> bytes:
    """IRQ descriptor without flags (6.4.2.1): edge-triggered, active high."""
    return struct.pack("<BH", 0x22, 1 << line)


def dma(channel: int) -> bytes:
    """DMA descriptor (6.4.2.2): 8-bit transfers, at the speed of old."""
    return struct.pack("<BBB", 0x2A, 1 << channel, 0)


def interrupt(gsi: int, *, level: bool) -> bytes:
    """Extended interrupt descriptor (6.4.3.6): active high, of this device alone."""
    consumer_edge = 0x01 | (0 if level else 0x02)
    return struct.pack("<BHBBI", 0x89, 6, consumer_edge, 1, gsi)


def memory32(base: int, length: int) -> bytes:
    """32-bit fixed memory range (6.4.3.4), read-write."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, length)


_FIXED: Final = 0x0C  # minimum and maximum are as given; a producer of what lies below


def bus_numbers(first: int, last: int) -> bytes:
    """Word address space descriptor (6.4.3.5.3) of bus numbers."""
    values = (0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB5H", 0x88, 13, 2, _FIXED, 0, *values)


def io_window(first: int, last: int) -> bytes:
    """The same of I/O ports that a bus passes on."""
    values = (0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB5H", 0x88, 13, 1, _FIXED, 3, *values)


def memory_window(first: int, last: int) -> bytes:
    """QWord address space descriptor (6.4.3.5.1) of memory that a bus passes on."""
    values = (0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB5Q", 0x8A, 43, 0, _FIXED, 1, *values)


def end_tag() -> bytes:
    """End tag (6.4.2.9); a checksum of 0 counts as valid."""
    return b"\x79\x00"


def resources(*descriptors: bytes) -> bytes:
    return buffer(b"".join(descriptors) + end_tag())
