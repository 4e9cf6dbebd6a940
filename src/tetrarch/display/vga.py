"""What a VGA shows of its memory: text, and the linear mode of 256 colours."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple

from tetrarch.devices.vga import Vga, VgaState
from tetrarch.display.display import Shown
from tetrarch.display.font import GLYPH_ROWS, pc_font
from tetrarch.display.frame import Cursor, Frame
from tetrarch.display.screen import Screen
from tetrarch.errors import MachineStateError

__all__ = ["VgaSource", "vga_screen"]

TEXT_MEMORY: Final = 0xB_8000
TEXT_BYTES: Final = 0x8000
LINEAR_MEMORY: Final = 0xA_0000
GLYPH_COLUMNS: Final = 8
LINEAR_COLUMNS, LINEAR_LINES = 320, 200
#: More than any text mode has.
COLUMNS_MAX, LINES_MAX = 160, 120


def vga_screen(state: VgaState, read: Callable[[int, int], bytes]) -> Screen:
    """``read`` gives guest memory. Raises MachineStateError for a mode of planes."""
    return _frame(_shown(state, read), {}).screen()


class VgaSource:
    """What who watches sees has the text's cursor, which stands where the guest writes next."""

    def __init__(self, vga: Vga, read: Callable[[int, int], bytes]) -> None:
        self._vga, self._read = vga, read
        self._last: _Shown | None = None
        self._frame = Frame(0, 0, b"")
        self._lines: dict[_Line, bytes] = {}
        """Of the last frame, as they are drawn: most of them are in the next, maybe elsewhere."""

    def still(self) -> Frame | None:
        return _frame(_shown(self._vga.registers(), self._read), {})

    def look(self) -> Shown | None:
        shown = _shown(self._vga.registers(), self._read, cursor=True)
        if shown != self._last:
            self._frame = _frame(shown, self._lines)
            self._last = shown
        return self._frame, None

    def cursor(self) -> Cursor | None:
        return None


class _Line(NamedTuple):
    """Of text."""

    cells: bytes
    palette: tuple[bytes, ...]
    cursor: tuple[int, int, int] | None
    """Its column, and from which row of points to which it is, if it stands there."""


class _Shown(NamedTuple):
    """What a frame is made of: of text the lines, else points and their colours."""

    lines: tuple[_Line, ...] = ()
    points: bytes = b""
    palette: tuple[bytes, ...] = ()


def _shown(state: VgaState, read: Callable[[int, int], bytes], *, cursor: bool = False) -> _Shown:
    if not state.graphics[6] & 1:
        return _Shown(_text(state, read, cursor))
    if state.graphics[5] & 0x40:
        palette = tuple(_colour(state, index & state.pel_mask) for index in range(256))
        return _Shown((), read(LINEAR_MEMORY, LINEAR_COLUMNS * LINEAR_LINES), palette)
    raise MachineStateError(
        "the screen is in a mode of planes, which is not shown",
        mend="let the guest use text, or 320 by 200 points of 256 colours",
    )


def _colour(state: VgaState, index: int) -> bytes:
    """A point's bytes, of the DAC, whose samples have 6 bits."""
    red, green, blue = state.dac[3 * index : 3 * index + 3]
    return bytes([*(sample << 2 | sample >> 4 for sample in (blue, green, red)), 0])


def _text(
    state: VgaState, read: Callable[[int, int], bytes], with_cursor: bool
) -> tuple[_Line, ...]:
    crtc = state.crtc
    columns = min(crtc[1] + 1, COLUMNS_MAX)
    height = (crtc[0x12] | (crtc[7] & 2) << 7 | (crtc[7] & 0x40) << 3) + 1
    glyph = (crtc[9] & 31) + 1
    lines = max(1, min(height // glyph, LINES_MAX))
    pitch = 4 * crtc[0x13] or 2 * columns
    start = 2 * (crtc[0x0C] << 8 | crtc[0x0D])
    # The address wraps within the window.
    memory = read(TEXT_MEMORY, TEXT_BYTES)
    palette = tuple(_colour(state, state.attribute[index] & 0x3F) for index in range(16))
    # Cursor start, end, and location; bit 5 of the first switches it off.
    cursor = 2 * (crtc[0x0E] << 8 | crtc[0x0F]) if with_cursor and not crtc[0x0A] & 0x20 else None
    first, last = ((crtc[index] & 31) * GLYPH_ROWS // glyph for index in (0x0A, 0x0B))
    rows = []
    for line in range(lines):
        at = (start + line * pitch) % TEXT_BYTES
        cells = (memory[at:] + memory)[: 2 * columns]
        column = -1 if cursor is None else (cursor - at) // 2
        here = (column, first, last) if 0 <= column < columns else None
        rows.append(_Line(cells, palette, here))
    return tuple(rows)


def _frame(shown: _Shown, lines: dict[_Line, bytes]) -> Frame:
    """``lines`` are those that are drawn already, and become those of this frame."""
    if not shown.lines:
        points = b"".join(shown.palette[index] for index in shown.points)
        return Frame(LINEAR_COLUMNS, LINEAR_LINES, points)
    drawn = {line: lines.get(line) or _draw(line) for line in set(shown.lines)}
    lines.clear()
    lines.update(drawn)
    columns = len(shown.lines[0].cells) // 2
    texts = (line.cells[::2].replace(b"\0", b" ").decode("cp437") for line in shown.lines)
    return Frame(
        GLYPH_COLUMNS * columns,
        GLYPH_ROWS * len(shown.lines),
        b"".join(drawn[line] for line in shown.lines),
        "\n".join(text.rstrip() for text in texts).rstrip("\n"),
    )


def _draw(line: _Line) -> bytes:
    font, palette = pc_font(), line.palette
    rows: list[bytes] = []
    for row in range(GLYPH_ROWS):
        points = [
            _points(font[GLYPH_ROWS * code + row], palette[colours & 15], palette[colours >> 4 & 7])
            for code, colours in zip(line.cells[::2], line.cells[1::2], strict=True)
        ]
        _put_cursor(line, row, points)
        rows += points
    return b"".join(rows)


def _put_cursor(line: _Line, row: int, points: list[bytes]) -> None:
    """It has the colour of its cell's ink, and does not blink."""
    if line.cursor is not None:
        column, first, last = line.cursor
        if first <= row <= last:
            ink = line.palette[line.cells[2 * column + 1] & 15]
            points[column] = GLYPH_COLUMNS * ink


# Not without end: the colours are the guest's.
@lru_cache(maxsize=1 << 14)
def _points(bits: int, ink: bytes, paper: bytes) -> bytes:
    return b"".join(ink if bits & 0x80 >> column else paper for column in range(GLYPH_COLUMNS))
