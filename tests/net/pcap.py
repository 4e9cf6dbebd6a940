"""Files of frames (draft-ietf-opsawg-pcap)."""

from __future__ import annotations

import struct
from pathlib import Path


def frames_of(path: Path) -> list[bytes]:
    data = path.read_bytes()
    # Nanoseconds, version 2.4; Ethernet.
    assert struct.unpack_from("<IHH", data) == (0xA1B23C4D, 2, 4)
    assert struct.unpack_from("<I", data, 20) == (1,)
    frames, at = [], 24
    while at < len(data):
        _, nanoseconds, length, whole = struct.unpack_from("<IIII", data, at)
        assert length == whole
        assert nanoseconds < 10**9
        frames.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    assert at == len(data)
    return frames
