"""A device's state, declared once: reset, save and load follow from the declaration.

Each device has a dataclass whose fields know their reset value and what they may
hold. Saved state is a plain dictionary with the device's kind and a version; it
may come from a file that somebody damaged, so each value is checked and cut to
what the device itself could have left there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from tetrarch.errors import StateError

__all__ = ["DeviceState", "State", "counter", "flag", "memory", "queue", "register"]

State = dict[str, Any]
"""Values are int, bool, str, None, and lists of int: what JSON can hold."""


def register(reset: int, mask: int, *, survives_reset: bool = False) -> Any:
    """Bits, of which ``mask`` are there."""
    return _field(lambda: reset, lambda value: _int(value) & mask, survives_reset)


def flag(reset: bool = False) -> Any:
    return _field(lambda: reset, lambda value: bool(_int(value)), False)


def counter(reset: int = 0, *, survives_reset: bool = False) -> Any:
    """A moment or a span of time in ns: 64 bits and a sign."""
    bound = 1 << 63
    return _field(
        lambda: reset, lambda value: min(max(_int(value), -bound), bound - 1), survives_reset
    )


def queue(limit: int, mask: int = 0xFF) -> Any:
    """At most ``limit`` items, the oldest first."""
    return _field(deque, lambda value: deque(item & mask for item in _ints(value)[:limit]), False)


def memory(size: int, initial: bytes = b"", *, survives_reset: bool = False) -> Any:
    def clean(value: object) -> bytearray:
        return bytearray(item & 0xFF for item in _ints(value)[:size]).ljust(size, b"\0")

    return _field(lambda: bytearray(initial.ljust(size, b"\0")), clean, survives_reset)


@dataclass
class DeviceState:
    """The base of each device's state."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    """Counts up when a saved state means something else than before."""

    def reset(self) -> None:
        for item in fields(self):
            if not item.metadata["survives_reset"]:
                setattr(self, item.name, item.metadata["reset"]())

    def save(self) -> State:
        state: State = {"device": self.kind, "version": self.version}
        for item in fields(self):
            value = getattr(self, item.name)
            state[item.name] = value if isinstance(value, int) else list(value)
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes all of ``state``, or raises StateError and takes nothing."""
        if not isinstance(state, Mapping):
            raise StateError(f"saved state of {self.kind!r} is none", mend="save it again")
        found = state.get("device"), state.get("version")
        if found != (self.kind, self.version):
            raise StateError(
                f"saved state is of {found[0]!r} version {found[1]!r}, this device is "
                f"{self.kind!r} version {self.version}",
                mend="load it with the release that saved it",
            )
        values = {}
        for item in fields(self):
            try:
                values[item.name] = item.metadata["clean"](state[item.name])
            except (KeyError, TypeError):
                raise StateError(
                    f"saved state of {self.kind!r} has no usable {item.name}",
                    mend="save it again: it is damaged",
                ) from None
        for name, value in values.items():
            setattr(self, name, value)


def _field(
    reset: Callable[[], object], clean: Callable[[object], object], survives_reset: bool
) -> Any:
    return field(
        default_factory=reset,
        metadata={"reset": reset, "clean": clean, "survives_reset": survives_reset},
    )


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(value)
    return value


def _ints(value: object) -> list[int]:
    if not isinstance(value, list):
        raise TypeError(value)
    return [_int(item) for item in value]
