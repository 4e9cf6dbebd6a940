"""Archives whose maker is not trusted: what tarfile takes of them, and how it fails."""

from __future__ import annotations

import tarfile
from typing import Final, Self

__all__ = ["TAR_ERRORS", "Member"]

#: What reading a damaged archive raises. The last two come of numbers that are infinite, and of
#: headers before headers without an end.
TAR_ERRORS: Final = (tarfile.TarError, EOFError, ValueError, ArithmeticError, RecursionError)

#: Far above any path, and above what Linux takes as an extended attribute (64 KiB).
_HEADER_BYTES_MAX: Final = 1 << 20
_HEADERS: Final = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class Member(tarfile.TarInfo):
    """For ``tarfile.open``: tarfile takes a header into memory whole, of any length."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADERS and not 0 <= member.size <= _HEADER_BYTES_MAX:
            raise tarfile.ReadError(f"a header has {member.size} bytes")
        return member
