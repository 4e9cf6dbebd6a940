"""Where viewers of a machine come by VNC, as other monitors write it."""

from __future__ import annotations

from typing import Final

from tetrarch.foreign.carried import Carried

__all__ = ["VNC_PORT", "carry_path", "carry_port"]

#: That of the first display; where a monitor counts displays, it counts from here.
VNC_PORT: Final = 5900
_HERE: Final = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})


def carry_port(carried: Carried, host: str, port: str, source: str) -> None:
    """``host`` is empty where it is to be reached from this one alone. Whoever comes from another
    would use the machine, so that needs a password, which no other monitor has in a file."""
    if not port.isascii() or not port.isdecimal() or len(port) > 5:
        carried.lose(source, "it is no place for viewers")
    elif host in _HERE:
        named = f"[{host}]" if ":" in host.strip("[]") and "[" not in host else host
        carry_path(carried, f"{named}:{port}", source)
    else:
        carry_path(carried, port, source)
        if host:
            carried.lose(source, "other hosts come there with a password-file alone")


def carry_path(carried: Carried, place: str, source: str) -> None:
    carried.set("display", f"vnc={place.replace(',', ',,')}", source)
