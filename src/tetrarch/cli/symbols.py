"""``tetrarch symbols``: a file of a Linux kernel's names for gdb."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tetrarch._files import read_bounded, write_all
from tetrarch.errors import HostError, ImageError
from tetrarch.gdb.symbols import kernel_frames, read_symbols, symbol_file

__all__ = ["make_symbols"]

#: Above any kernel with its debug symbols.
_BYTES_MAX: Final = 2 << 30


def make_symbols(names: Path, output: Path, kernel: Path | None) -> None:
    symbols = read_symbols(_read(names).decode("utf-8", "replace"), names)
    frames = b"" if kernel is None else kernel_frames(_read(kernel), symbols, kernel)
    try:
        write_all(output, symbol_file(symbols, frames))
    except OSError as error:
        raise HostError(f"cannot write {output}: {error.strerror}", mend="name another") from error


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, _BYTES_MAX)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}", mend="name a file") from error
