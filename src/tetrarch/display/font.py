"""The PC's font of 8 by 16 points, as a VGA BIOS has it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from tetrarch.errors import HostError

__all__ = ["GLYPH_ROWS", "SVGA_BIOS", "VGA_BIOS", "pc_font", "vga_bios"]

#: SeaBIOS's, for a VGA without PCI.
VGA_BIOS: Final = Path("/usr/share/seabios/vgabios-isavga.bin")
#: Its one for VMware's SVGA II.
SVGA_BIOS: Final = VGA_BIOS.with_name("vgabios-vmware.bin")
GLYPH_ROWS: Final = 16
#: The letter A: by it the font is found.
LETTER_A: Final = bytes.fromhex("000010386cc6c6fec6c6c6c600000000")


@cache
def vga_bios(path: Path = VGA_BIOS) -> bytes:
    """The program that drives a VGA for SeaBIOS, with the PC's font in it. Raises HostError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise HostError(
            f"no VGA BIOS for the screen: {path}: {error.strerror}", mend="apt install seabios"
        ) from error


@cache
def pc_font() -> bytes:
    """16 bytes for each of 256 characters of code page 437. Raises HostError."""
    image = vga_bios()
    start = image.find(LETTER_A) - GLYPH_ROWS * ord("A")
    font = image[start : start + 256 * GLYPH_ROWS] if start >= 0 else b""
    if len(font) != 256 * GLYPH_ROWS:
        raise HostError(f"no font is in {VGA_BIOS}", mend="install Debian's package seabios anew")
    return font
