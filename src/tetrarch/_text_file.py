"""Files of text that a user names, and that may be anything."""

from __future__ import annotations

from pathlib import Path

from tetrarch.errors import ConfigError

__all__ = ["read_text"]

#: Far above any description of a machine.
_BYTES_MAX = 1 << 20


def read_text(path: Path, what: str) -> str:
    """Raises ConfigError for a file that cannot be read, and so is no ``what``."""
    try:
        with path.open("rb") as file:
            data = file.read(_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", mend="name a readable file") from error
    except ValueError as error:  # a zero byte
        raise ConfigError(f"{str(path)!r} is no file name", mend="name a file") from error
    if len(data) > _BYTES_MAX:
        raise ConfigError(f"{path} is no {what}: it has more than 1 MiB", mend="name another")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no {what}: {error}", mend="correct it") from error
