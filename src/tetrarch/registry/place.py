"""Where the registry lies."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tetrarch.errors import HostError

__all__ = ["registry_directory"]


def registry_directory() -> Path:
    """``$XDG_RUNTIME_DIR/tetrarch``; without it ``/run/user/UID/tetrarch``, where the host has the
    first of it; else ``/tmp/tetrarch-UID``.

    TMPDIR has no say: all programs of a user are to find the same. Raises HostError where it
    cannot be made, or is not ours alone.
    """
    user = os.geteuid()
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    host = Path(f"/run/user/{user}")
    if os.path.isabs(given):
        place = Path(given) / "tetrarch"
    elif host.is_dir() and host.stat().st_uid == user:
        place = host / "tetrarch"
    else:
        place = Path(f"/tmp/tetrarch-{user}")
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
    except OSError as error:
        raise HostError(
            f"cannot make {place}, where running machines are listed: {error.strerror}",
            mend="set XDG_RUNTIME_DIR to a directory of yours",
        ) from error
    # In /tmp somebody else may have been first.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise HostError(
            f"{place}, where running machines are listed, is not a directory of yours alone",
            mend="remove it, or set XDG_RUNTIME_DIR to a directory of yours",
        )
    return place
