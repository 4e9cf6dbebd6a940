"""What cards have in common: a function, registers here and rings in Rust, and their life."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from tetrarch._native import EngineError
from tetrarch.devices._state import DeviceState, State
from tetrarch.errors import StateError

if TYPE_CHECKING:
    from tetrarch.net.network import OpenNetwork
    from tetrarch.pci.function import PciFunction

__all__ = ["NetworkCard"]


class _Rings(Protocol):
    @property
    def mac(self) -> bytes: ...
    def reset(self) -> None: ...
    def save(self) -> Any: ...
    def load(self, state: Any) -> None: ...
    def close(self) -> None: ...


class NetworkCard(ABC):
    """A card, as a device to plug in; its subclass has made what is declared here.

    Lock: ``_lock``, for its registers and what they say of the rings.
    """

    model: ClassVar[str]
    """For errors."""
    function: PciFunction
    state: DeviceState

    def __init__(self, network: OpenNetwork, name: str) -> None:
        self.name = name
        self.network = network
        self._lock = threading.Lock()
        self._changed_mac: bytes | None = None

    @property
    @abstractmethod
    def _rings(self) -> _Rings: ...

    @property
    def mac(self) -> bytes:
        """The address that the driver has given it, or its own."""
        return self._rings.mac

    def stats(self) -> dict[str, int]:
        """Frames, bytes, and what was dropped by the reason."""
        return self.network.native.stats()

    def change_mac(self, mac: bytes) -> None:
        """Another address of the card's own than the state that is loaded next has. A driver that
        runs keeps the one that it has found, until it starts anew."""
        self._changed_mac = mac

    def reset(self) -> None:
        with self._lock:
            self._rings.reset()
            self.state.reset()
        self.function.reset()

    def close(self) -> None:
        """Lets go of the network: the device is out, or the machine has ended."""
        self.network.leave()
        self._rings.close()
        self.network.close()

    def save(self) -> State:
        """To be called while the machine is held."""
        with self._lock:
            registers = self.state.save()
        rings = {
            name: list(value) for name, value in cast(State, self._rings.save()).items()
        }  # numbers alone, also of bytes
        return {"registers": registers, "rings": rings, "pci": self.function.save()}

    def load(self, state: State) -> None:
        self.reset()
        registers, pci = (state.get(part) for part in ("registers", "pci"))
        self.function.load(pci if isinstance(pci, dict) else {})
        with self._lock:
            self.state.load(registers if isinstance(registers, dict) else {})
            try:
                rings = state["rings"]
                if self._changed_mac is not None:
                    rings = {**rings, "permanent": self._changed_mac}
                self._rings.load(rings)
            except (EngineError, KeyError, TypeError, ValueError, OverflowError) as error:
                self.state.reset()
                raise StateError(
                    f"{self.name}: a saved {self.model} card is damaged, or of another",
                    mend="make the machine as it was when it was saved",
                ) from error
