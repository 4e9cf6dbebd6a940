"""Names that a Linux system takes: what is wrong with one is said before it is asked."""

from __future__ import annotations

import base64
import re
from itertools import pairwise
from pathlib import Path

from tetrarch._files import read_bounded
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
        raise ValueProblem(
            f"{value!r} is no name of a disk",
            mend="give --name lower-case letters, digits, '.' and '-', up to 63",
        )
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
    if "PRIVATE KEY-----" in line:
        raise ValueProblem("it is no public SSH key but a private one", mend="give its .pub file")
    if "\n" in line or not _has_key(line):
        raise ValueProblem(f"{line[:40]!r} is no public SSH key", mend="give a .pub file")
    return line


def _has_key(line: str) -> bool:
    """Two words that are a key's type and, in base64, the key, which begins with its type
    (RFC 4253, 6.6). Options may stand before them, and a comment behind (sshd(8))."""
    words = line.split()
    for kind, text in pairwise(words):
        try:
            key = base64.b64decode(text, validate=True)
        except ValueError:
            continue
        name = kind.encode("utf-8", "replace")
        if key.startswith(len(name).to_bytes(4, "big") + name):
            return True
    return False


def public_keys(files: list[Path] | None) -> list[str]:
    """The lines of the given files, or of those that the user has. Raises ImageError."""
    if files is None:
        files = sorted((Path.home() / ".ssh").glob("id_*.pub"))
    return [_key_of(file) for file in files]


def _key_of(file: Path) -> str:
    try:
        return public_key(read_bounded(file).decode())
    except ValueProblem as problem:
        raise ImageError(f"{file}: {problem.cause}", problem.mend) from None
    except OSError as error:
        raise ImageError(
            f"the SSH key {file} cannot be read: {error.strerror}", "give a .pub file"
        ) from error
    except UnicodeDecodeError as error:
        raise ImageError(f"{file} is no public SSH key", "give a .pub file") from error
