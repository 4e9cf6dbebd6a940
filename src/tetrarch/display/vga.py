"""What a VGA shows of its memory: text, and the linear mode of 256 colours."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

from tetrarch.devices.vga import VgaState
from tetrarch.display.font import GLYPH_ROWS, pc_font
from tetrarch.display.screen import Screen
from tetrarch.errors import MachineStateError

__all__ = ["vga_screen"]

TEXT_MEMORY: Final = 0xB_8000
TEXT_BYTES: Final = 0x8000
LINEAR_MEMORY: Final = 0xA_0000
GLYPH_COLUMNS: Final = 8
LINEAR_COLUMNS, LINEAR_LINES = 320, 200
#: More than any text mode has.
COLUMNS_MAX, LINES_MAX = 160, 120


def vga_screen(state: VgaState, read: Callable[[int, int], bytes]) -> Screen:
    """``read`` gives guest memory. Raises MachineStateError for a mode of planes."""
    if not state.graphics[6] & 1:
        return _text(state, read)
    if state.graphics[5] & 0x40:
        return _linear(state, read)
    raise MachineStateError(
        "the screen is in a mode of planes, which is not shown",
        mend="let the guest use text, or 320 by 200 points of 256 colours",
    )


def _colour(state: VgaState, index: int) -> bytes:
    """Of the DAC, whose samples have 6 bits."""
    entry = state.dac[3 * index : 3 * index + 3]
    return bytes(sample << 2 | sample >> 4 for sample in entry)


def _linear(state: VgaState, read: Callable[[int, int], bytes]) -> Screen:
    palette = [_colour(state, index & state.pel_mask) for index in range(256)]
    memory = read(LINEAR_MEMORY, LINEAR_COLUMNS * LINEAR_LINES)
    return Screen(LINEAR_COLUMNS, LINEAR_LINES, b"".join(palette[index] for index in memory))


def _text(state: VgaState, read: Callable[[int, int], bytes]) -> Screen:
    crtc = state.crtc
    columns = min(crtc[1] + 1, COLUMNS_MAX)
    height = (crtc[0x12] | (crtc[7] & 2) << 7 | (crtc[7] & 0x40) << 3) + 1
    lines = max(1, min(height // ((crtc[9] & 31) + 1), LINES_MAX))
    pitch = 4 * crtc[0x13] or 2 * columns
    start = 2 * (crtc[0x0C] << 8 | crtc[0x0D])
    # The address wraps within the window.
    memory = read(TEXT_MEMORY, TEXT_BYTES)
    rows = []
    for line in range(lines):
        at = (start + line * pitch) % TEXT_BYTES
        rows.append((memory[at:] + memory)[: 2 * columns])
    palette = [_colour(state, state.attribute[index] & 0x3F) for index in range(16)]
    pixels = b"".join(_text_line(row, palette) for row in rows)
    text = "\n".join(row[::2].replace(b"\0", b" ").decode("cp437").rstrip() for row in rows)
    return Screen(GLYPH_COLUMNS * columns, GLYPH_ROWS * lines, pixels, text.rstrip("\n"))


def _text_line(cells: bytes, palette: list[bytes]) -> bytes:
    font = pc_font()
    rows = []
    for row in range(GLYPH_ROWS):
        rows += [
            _points(font[GLYPH_ROWS * code + row], palette[colours & 15], palette[colours >> 4 & 7])
            for code, colours in zip(cells[::2], cells[1::2], strict=True)
        ]
    return b"".join(rows)


# Not without end: the colours are the guest's.
@lru_cache(maxsize=1 << 14)
def _points(bits: int, ink: bytes, paper: bytes) -> bytes:
    return b"".join(ink if bits & 0x80 >> column else paper for column in range(GLYPH_COLUMNS))
