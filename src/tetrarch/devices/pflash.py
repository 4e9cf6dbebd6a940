"""A NOR flash chip of bytes, in which firmware keeps its variables.

It is found by the Common Flash Interface (JEDEC JESD68.01) and takes the commands of Intel's basic
command set (command set 0001; Intel, AP-646 and the data sheet of the 28F320J5). Programming and
erasing are done at once: the chip is never seen busy.
"""

from __future__ import annotations

import base64
import binascii
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from tetrarch.devices._access import MAX_ACCESS, read_bytes, write_bytes
from tetrarch.devices._state import DeviceState, State, register
from tetrarch.errors import StateError

__all__ = ["BLOCK_BYTES", "Command", "PFlash", "PFlashCore", "PFlashState"]

#: What is erased at once: OVMF takes its flash for one of such blocks.
BLOCK_BYTES: Final = 4096
ERASED: Final = 0xFF


class Command(IntEnum):
    PROGRAM_OTHER = 0x10
    ERASE = 0x20
    PROGRAM = 0x40
    CLEAR_STATUS = 0x50
    READ_STATUS = 0x70
    READ_ID = 0x90
    READ_QUERY = 0x98
    CONFIRM = 0xD0
    READ_ARRAY = 0xFF


PROGRAMS: Final = (Command.PROGRAM, Command.PROGRAM_OTHER)

# Of the status register.
READY: Final = 0x80
ERASE_ERROR: Final = 0x20
PROGRAM_ERROR: Final = 0x10

#: Intel, and a chip that none of its own is.
IDS: Final = bytes([0x89, 0x18])
QUERY_AT: Final = 0x10


def _query(size: int) -> bytes:
    """What the chip tells of itself, from QUERY_AT on (JESD68.01, tables 1 to 4)."""
    blocks = size // BLOCK_BYTES - 1
    return bytes(
        [
            *b"QRY",
            *(1, 0, 0, 0),  # Intel's command set, without a table of its own
            *(0, 0, 0, 0),  # no other
            *(0x45, 0x55, 0, 0),  # 4.5 to 5.5 V, and no other voltage to program with
            *(7, 0, 10, 0),  # 128 us for a byte, no buffer, 1 s for a block, none for all
            *(4, 0, 4, 0),  # at most 16 times as long
            (size - 1).bit_length(),
            *(0, 0),  # 8 bits alone
            *(0, 0),  # no buffer to write
            1,  # blocks of one size:
            *blocks.to_bytes(2, "little"),
            *(BLOCK_BYTES >> 8).to_bytes(2, "little"),
        ]
    )


@dataclass
class PFlashState(DeviceState):
    kind = "pflash"

    mode: int = register(Command.READ_ARRAY, 0xFF)
    """The command that says what is read."""
    expects: int = register(0, 0xFF)
    """The command whose second write is still to come; 0 is none."""
    status: int = register(READY, READY | ERASE_ERROR | PROGRAM_ERROR)


class PFlashCore:
    """The chip. No bus, no threads, no I/O."""

    def __init__(self, content: bytes) -> None:
        """``content`` is of whole blocks."""
        self.state = PFlashState()
        self.content = bytearray(content)
        self._query = _query(len(content))
        self._changed: tuple[int, int] | None = None

    def take_changed(self) -> tuple[int, int] | None:
        """From where to where the content has changed since the last call."""
        changed, self._changed = self._changed, None
        return changed

    def read(self, offset: int) -> int:
        match self.state.mode:
            case Command.READ_ARRAY:
                return self.content[offset] if 0 <= offset < len(self.content) else 0xFF
            case Command.READ_ID:
                at = offset & 0xFF
                return IDS[at] if at < len(IDS) else 0  # 2: the block is not locked
            case Command.READ_QUERY:
                at = (offset & 0xFF) - QUERY_AT
                return self._query[at] if 0 <= at < len(self._query) else 0
            case _:
                return self.state.status

    def write(self, offset: int, value: int) -> None:
        if not 0 <= offset < len(self.content):
            return
        expects, self.state.expects = self.state.expects, 0
        if expects in PROGRAMS:
            self._change(offset, bytes([self.content[offset] & value]))
        elif expects == Command.ERASE:
            if value == Command.CONFIRM:
                self._change(offset - offset % BLOCK_BYTES, bytes([ERASED]) * BLOCK_BYTES)
            else:
                # Of a sequence that is none both are set (AP-646, "status register").
                self.state.status |= READY | ERASE_ERROR | PROGRAM_ERROR
        else:
            self._command(value)

    def _command(self, value: int) -> None:
        match value:
            case Command.PROGRAM | Command.PROGRAM_OTHER | Command.ERASE:
                self.state.expects = value
                self.state.mode = Command.READ_STATUS
            case Command.CLEAR_STATUS:
                # Ready is cleared with the errors until something is done, and the array is
                # read: so OVMF tells a flash from RAM and ROM (QemuFlashDetected).
                self.state.status = 0
                self.state.mode = Command.READ_ARRAY
            case Command.READ_STATUS | Command.READ_ID | Command.READ_QUERY:
                self.state.mode = value
            case _:
                self.state.mode = Command.READ_ARRAY

    def _change(self, start: int, data: bytes) -> None:
        end = start + len(data)
        self.content[start:end] = data
        self.state.status |= READY
        before = self._changed or (start, end)
        self._changed = min(before[0], start), max(before[1], end)


class PFlash:
    """The chip on a machine.

    ``keep`` is given each change, offset and bytes, before the guest goes on; what it raises ends
    the machine. The content outlasts a reset.
    """

    def __init__(self, content: bytes, keep: Callable[[int, bytes], None]) -> None:
        self._core = PFlashCore(content)
        self._keep = keep
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> int:
        size = min(max(size, 0), MAX_ACCESS)
        with self._lock:
            core = self._core
            if core.state.mode == Command.READ_ARRAY and 0 <= offset <= len(core.content) - size:
                return int.from_bytes(core.content[offset : offset + size], "little")
            return read_bytes(core.read, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            write_bytes(self._core.write, offset, size, value)
            self._keep_changes()

    def _keep_changes(self) -> None:
        if (changed := self._core.take_changed()) is not None:
            start, end = changed
            self._keep(start, bytes(self._core.content[start:end]))

    def reset(self) -> None:
        with self._lock:
            self._core.state.reset()

    def save(self) -> State:
        with self._lock:
            packed = base64.b64encode(zlib.compress(bytes(self._core.content))).decode()
            return self._core.state.save() | {"content": packed}

    def load(self, state: Mapping[str, Any]) -> None:
        """Also what was in the chip then, which is kept as if the guest had written it."""
        with self._lock:
            content = _unpacked(state.get("content"), len(self._core.content))
            self._core.state.load(state)
            self._core.content[:] = content
            self._keep(0, content)


def _unpacked(packed: object, size: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(base64.b64decode(str(packed), validate=True), size + 1)
    except (binascii.Error, zlib.error, ValueError):
        content = b""
    if len(content) != size:
        raise StateError(
            f"saved state of 'pflash' has no content of {size} bytes",
            mend="give the machine the firmware that it had",
        )
    return content
