"""Variables that guest and host share: ``guestinfo.NAME``, which open-vm-tools' vmware-rpctool
reads and writes by ``info-get`` and ``info-set``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from threading import Lock
from typing import Any, Final

from tetrarch.errors import StateError

__all__ = ["MAX_BYTES", "PREFIX", "GuestInfo"]

PREFIX: Final = "guestinfo."
#: Names and values together: a guest cannot fill the host's memory.
MAX_BYTES: Final = 1 << 20
_LONGEST_NAME: Final = 256


class GuestInfo(MutableMapping[str, str]):
    """By name, without ``guestinfo.``; from any thread. They outlive the guest's resets.

    Setting one raises ValueError for a name that cannot be, or for more than ``MAX_BYTES`` in all.
    An empty value is as good as none.
    """

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = Lock()

    def __getitem__(self, name: str) -> str:
        with self._lock:
            return self._values[name]

    def __setitem__(self, name: str, value: str) -> None:
        if not name or len(name) > _LONGEST_NAME or not name.isprintable() or " " in name:
            raise ValueError(f"{name!r} is no name of a variable: printable words without blanks")
        with self._lock:
            others = (item for item in self._values.items() if item[0] != name)
            taken = sum(
                len(text.encode(errors="surrogateescape")) for pair in others for text in pair
            )
            wanted = len(name.encode()) + len(value.encode(errors="surrogateescape"))
            if taken + wanted > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 10} KiB of variables")
            if value:
                self._values[name] = value
            else:
                self._values.pop(name, None)

    def __delitem__(self, name: str) -> None:
        with self._lock:
            del self._values[name]

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(sorted(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def reset(self) -> None:
        pass

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {"device": "guestinfo", "version": 1, "values": dict(self._values)}

    def load(self, state: Mapping[str, Any]) -> None:
        values = state.get("values") if isinstance(state, Mapping) else None
        if not isinstance(values, dict) or state.get("version") != 1:
            raise StateError("saved state of 'guestinfo' is none", mend="save it again")
        fresh = GuestInfo()
        try:
            for name, value in values.items():
                fresh[name] = value
        except (AttributeError, TypeError, ValueError) as error:
            raise StateError(
                f"saved state of 'guestinfo' is damaged: {error}", mend="save it again"
            ) from None
        with self._lock:
            self._values = fresh._values
