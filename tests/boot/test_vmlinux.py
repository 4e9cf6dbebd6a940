"""The kernel inside a bzImage, as it is unpacked on the host."""

from __future__ import annotations

import gzip
import lzma
import struct

import pytest

from tetrarch.boot import vmlinux
from tetrarch.boot.vmlinux import extract_vmlinux
from tetrarch.testing import pvh_kernel

KERNEL = pvh_kernel(b"\xf4" * 5000)


def bzimage(payload: bytes) -> bytes:
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = struct.pack("<HH", 0x20F, 0)[:4]
    struct.pack_into("<II", setup, 0x248, 0, len(payload))
    return bytes(setup) + payload


def lz4(*blocks: bytes) -> bytes:
    """The legacy frame, with the size of the result behind it, as the kernel's build has it."""
    framed = b"".join(struct.pack("<I", len(block)) + block for block in blocks)
    return b"\x02\x21\x4c\x18" + framed + struct.pack("<I", 5000)


def literals(data: bytes) -> bytes:
    """A block without copies (doc/lz4_Block_format.md)."""
    more = len(data) - 15
    return b"\xf0" + b"\xff" * (more // 255) + bytes([more % 255]) + data


@pytest.mark.parametrize(
    "payload",
    [
        gzip.compress(KERNEL) + struct.pack("<I", len(KERNEL)),
        lzma.compress(KERNEL) + struct.pack("<I", len(KERNEL)),
        lz4(literals(KERNEL)),
        lz4(literals(KERNEL[:4000]), literals(KERNEL[4000:])),
    ],
    ids=["gzip", "xz", "lz4", "lz4 in blocks"],
)
def test_kernel_comes_out_whole(payload: bytes) -> None:
    assert extract_vmlinux(bzimage(payload)) == KERNEL


def test_copies_of_lz4_repeat() -> None:
    # "ab", then eight bytes from two before; then the last literals.
    block = b"\x24ab\x02\x00" + b"\x50hello"
    assert extract_vmlinux(bzimage(lz4(block))) == b"abababababhello"


@pytest.mark.parametrize(
    "payload",
    [
        b"\x28\xb5\x2f\xfd" + bytes(20),
        lz4(b"\x14a\x00\x00"),
        lz4(b"\x14a\x09\x00\x50hello"),
        lz4(b"\x1fa\x01\x00" + b"\xff" * 100_000 + b"\x00\x50hello"),
        lz4(literals(KERNEL))[:-2000],
        gzip.compress(KERNEL)[:-20] + bytes(4),
        lzma.compress(KERNEL)[:-100],
        b"\xfd7zXZ\0" + bytes(50),
        b"",
    ],
    ids=["zstd", "distance 0", "distance before", "bomb", "short", "gzip", "xz", "no xz", "none"],
)
def test_what_is_damaged_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        extract_vmlinux(bzimage(payload))


def test_more_than_any_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmlinux, "MOST_BYTES", 1000)
    for payload in (gzip.compress(KERNEL) + bytes(4), lzma.compress(KERNEL), lz4(literals(KERNEL))):
        with pytest.raises(ValueError, match="more than 0 MiB"):
            extract_vmlinux(bzimage(payload))
