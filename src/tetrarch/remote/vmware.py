"""What a machine of another process, on VMware's platform, shares with its guest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from tetrarch.platforms.vmware.tools import ToolsStatus

__all__ = ["RemoteGuestInfo", "RemoteTools"]


class RemoteGuestInfo(MutableMapping[str, str]):
    """As ``GuestInfo``."""

    def __init__(self, execute: Callable[..., Any]) -> None:
        self._execute = execute

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __setitem__(self, name: str, value: str) -> None:
        self._execute("x-guestinfo-set", {"name": name, "value": value})

    def __delitem__(self, name: str) -> None:
        if name not in self._all():
            raise KeyError(name)
        self[name] = ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, str]:
        return dict(self._execute("x-guestinfo"))


class RemoteTools:
    """As ``Tools``."""

    def __init__(self, execute: Callable[..., Any]) -> None:
        self._execute = execute

    @property
    def status(self) -> ToolsStatus:
        return ToolsStatus(**self._execute("x-tools"))

    def halt(self, timeout: float = 30.0) -> None:
        """As ``Tools.halt``."""
        self._ask("halt", timeout)

    def reboot(self, timeout: float = 30.0) -> None:
        """As ``Tools.reboot``."""
        self._ask("reboot", timeout)

    def synchronize_time(self, timeout: float = 30.0) -> None:
        """As ``Tools.synchronize_time``."""
        self._ask("synchronize-time", timeout)

    def set_resolution(self, width: int, height: int, timeout: float = 30.0) -> None:
        """As ``Tools.set_resolution``."""
        arguments = {"width": width, "height": height, "timeout": timeout}
        self._execute("x-tools-resolution", arguments, timeout=timeout + 10)

    def _ask(self, what: str, timeout: float) -> None:
        arguments = {"what": what, "timeout": timeout}
        self._execute("x-tools-ask", arguments, timeout=timeout + 10)
