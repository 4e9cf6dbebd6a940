"""The ELF vmlinux inside a bzImage.

Documentation/arch/x86/boot.rst: payload_offset and payload_length say where the
compressed kernel is. Decompressed it is the ELF file, followed by relocations.
"""

import lzma
import struct
import zlib
from typing import Final, Protocol

from tetrarch._native import unpack_lz4_block

__all__ = ["extract_vmlinux"]

MOST_BYTES: Final = 512 << 20

_LZ4_LEGACY_MAGIC: Final = b"\x02\x21\x4c\x18"
#: Of a block of that frame, unpacked.
_LZ4_BLOCK_BYTES: Final = 8 << 20
#: A window of 32 KiB, and gzip's header and end.
_GZIP: Final = 16 + zlib.MAX_WBITS


class _Unpacker(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def extract_vmlinux(bzimage: bytes) -> bytes:
    """Raises ValueError for what is no bzImage, is packed in a way that is not known here, or is
    more than any kernel is."""
    try:
        return _unpack(_payload(bzimage))
    except (LookupError, struct.error, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"no bzImage, or a damaged one: {error}") from error


def _payload(bzimage: bytes) -> bytes:
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    return bzimage[start : start + length]


def _unpack(payload: bytes) -> bytes:
    if payload.startswith(b"\xfd7zXZ\0"):
        return _whole(lzma.LZMADecompressor(), payload)
    if payload.startswith(_LZ4_LEGACY_MAGIC):
        return _unpack_lz4_legacy(payload)
    if payload.startswith(b"\x1f\x8b"):
        return _whole(zlib.decompressobj(_GZIP), payload[:-4])
    raise ValueError(f"a payload that starts with {payload[:6].hex()} is not known here")


def _whole(unpacker: _Unpacker, payload: bytes) -> bytes:
    vmlinux = unpacker.decompress(payload, MOST_BYTES)
    if not unpacker.eof:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB, or cut short")
    return vmlinux


def _unpack_lz4_legacy(payload: bytes) -> bytes:
    """The legacy frame of lz4's doc/lz4_Frame_format.md: blocks with their sizes before them.

    The kernel's build appends the size of the result (cmd_lz4_with_size), where the
    next block's size would stand.
    """
    out = bytearray()
    at = len(_LZ4_LEGACY_MAGIC)
    while at + 4 < len(payload):
        (size,) = struct.unpack_from("<I", payload, at)
        at += 4
        out += unpack_lz4_block(payload[at : at + size], _LZ4_BLOCK_BYTES)
        if len(out) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
        at += size
    return bytes(out)
