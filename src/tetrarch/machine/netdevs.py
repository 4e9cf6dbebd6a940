"""Networks that wait for a card which is plugged in while the machine runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tetrarch.errors import ConfigError, MachineStateError
from tetrarch.machine.log import MachineLog
from tetrarch.net.spec import NetSpec

if TYPE_CHECKING:
    from tetrarch.net.network import OpenNetwork

__all__ = ["Netdev", "Netdevs"]


@dataclass
class Netdev:
    name: str
    spec: NetSpec
    network: OpenNetwork | None
    """Open until a card takes it."""
    device: str | None = None
    kept: bool = True
    """It stays when its device goes."""


class Netdevs:
    """Locks: ``_opening``, held while a network is opened, so that of two of one name one is; then
    ``_lock``, for a change of the list or of who has a network."""

    def __init__(self, machine: str, fail: Callable[[BaseException], None]) -> None:
        self._log = MachineLog(machine)
        self._fail = fail
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._netdevs: dict[str, Netdev] = {}

    def add(self, name: str, spec: NetSpec, *, kept: bool = True) -> None:
        """Raises HostError where the host does not give it, ConfigError for a name in use."""
        with self._opening:
            if name in self._netdevs:
                raise ConfigError(f"Duplicate ID '{name}' for netdev")
            netdev = Netdev(name, spec, self._open(name, spec), kept=kept)
            with self._lock:
                self._netdevs[name] = netdev

    def all(self) -> list[Netdev]:
        with self._lock:
            return list(self._netdevs.values())

    def take(self, name: str, device: str, driver: str) -> OpenNetwork:
        """For a card, until it is out; then the network is opened anew for another."""
        with self._lock:
            netdev = self._netdevs.get(name)
            if netdev is None or netdev.device is not None:
                why = "can't find value" if netdev is None else "is in use:"
                raise ConfigError(f"Property '{driver}.netdev' {why} '{name}'")
            netdev.device = device
            network, netdev.network = netdev.network, None
        return network or self._open(name, netdev.spec)

    def remove(self, name: str) -> None:
        with self._lock:
            netdev = self._netdevs.get(name)
            if netdev is None:
                raise LookupError(f"Device '{name}' not found")
            if netdev.device is not None:
                raise MachineStateError(
                    f"the network {name} is in use", mend=f"remove {netdev.device}"
                )
            del self._netdevs[name]
        if netdev.network is not None:
            netdev.network.close()

    def released(self, device: str) -> None:
        """The card is out, and has let go of its network."""
        for netdev in self.all():
            if netdev.device == device:
                netdev.device = None
                if not netdev.kept:
                    self.remove(netdev.name)

    def close(self) -> None:
        for netdev in self.all():
            if netdev.network is not None:
                netdev.network.close()

    def _open(self, name: str, spec: NetSpec) -> OpenNetwork:
        from tetrarch.net.network import open_network

        def cut_off(cause: str) -> None:
            self._log.warning("%s: %s; the link is down", name, cause)

        return open_network(spec, cut_off, self._fail)
