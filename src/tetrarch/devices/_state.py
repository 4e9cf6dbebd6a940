"""Saved device state: plain dictionaries with a version."""

from typing import Any

from tetrarch.errors import StateError

__all__ = ["State", "check"]

#: Values are int, bool, str, None, and lists of int: what JSON can hold.
State = dict[str, Any]


def check(state: State, device: str, version: int) -> None:
    """Raises ``StateError`` unless ``state`` is of this device in this version."""
    found = state.get("device"), state.get("version")
    if found != (device, version):
        raise StateError(
            f"saved state is of {found[0]!r} version {found[1]!r}, this device is {device!r} "
            f"version {version}",
            mend="load it with the release that saved it",
        )
