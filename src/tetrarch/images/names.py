"""Names that a Linux system takes: what is wrong with one is said before it is asked."""

from __future__ import annotations

import re
from pathlib import Path

from tetrarch.errors import ImageError, ValueProblem

__all__ = ["disk_name", "host_name", "public_key", "public_keys", "user_name"]

# hostname(7): labels of RFC 1123, and Linux takes 64 characters in all.
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_HOST_MAX = 64
_DISK = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
# What useradd(8) of Debian takes without a complaint.
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_MEND = "use lower-case letters and digits"


def disk_name(value: str) -> str:
    """Raises ValueProblem."""
    if not _DISK.fullmatch(value):
        raise ValueProblem(f"{value!r} is no name of a disk", mend=f"{_MEND}: --name")
    return value


def host_name(value: object) -> str:
    """Raises ValueProblem."""
    if not (isinstance(value, str) and len(value) <= _HOST_MAX and _HOST.fullmatch(value)):
        raise ValueProblem(f"{value!r} is no host name", mend=_MEND)
    return value


def user_name(value: object) -> str:
    """Raises ValueProblem."""
    if not (isinstance(value, str) and _USER.fullmatch(value)):
        raise ValueProblem(f"{value!r} is no user name", mend=_MEND)
    return value


def public_key(value: str) -> str:
    """A line as in authorized_keys(5). Raises ValueProblem."""
    line = value.strip()
    if len(line.split()) < 2 or "\n" in line or "PRIVATE" in line:
        raise ValueProblem(f"{line[:40]!r} is no public SSH key", mend="give a .pub file")
    return line


def public_keys(files: list[Path] | None) -> list[str]:
    """The lines of the given files, or of those that the user has. Raises ImageError."""
    if files is None:
        files = sorted((Path.home() / ".ssh").glob("id_*.pub"))
    try:
        return [public_key(file.read_text(encoding="utf-8")) for file in files]
    except ValueProblem as problem:
        raise ImageError(problem.cause, problem.mend) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"an SSH key cannot be read: {error}", "give a .pub file") from error
