"""The PCI devices of a machine by name: plugged in and out, saved, reset."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tetrarch._patience import patience
from tetrarch.devices import AcpiPm
from tetrarch.devices._state import State
from tetrarch.devices.acpi_pm import PCI_HOTPLUG_EVENT
from tetrarch.errors import ConfigError, MachineStateError, StateError
from tetrarch.pci import PciBus, PciFunction
from tetrarch.pci.hotplug import PciHotplug

__all__ = ["PciDevice", "PluggedDevices"]


class PciDevice(Protocol):
    """What can be plugged in. It may also have ``reset``, ``save`` and ``load``, which then see
    to its function too, and ``close``, called when it was taken out."""

    @property
    def function(self) -> PciFunction: ...


@dataclass
class _Plugged:
    slot: int
    device: PciDevice
    leaving: bool = False
    """The guest was asked to give it up."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when it is out, or nobody will take it out any more."""
    out: bool = False

    def method(self, name: str) -> Callable[..., Any]:
        """The device's own, else its function's."""
        found: Callable[..., Any] | None = getattr(self.device, name, None)
        return getattr(self.device.function, name) if found is None else found


class PluggedDevices:
    """Lock: ``_lock``, held for a change of who is there; then the bus's. Devices are called
    without it."""

    def __init__(
        self,
        bus: PciBus,
        acpi: AcpiPm,
        release: Callable[[str], object] = lambda name: None,
        tell: Callable[[str], object] = lambda name: None,
    ) -> None:
        """Called with the name of a device that was taken out: ``release`` lets go of what it had,
        then its name is free; ``tell`` is called at last."""
        self._release = release
        self._tell = tell
        self.hotplug = PciHotplug(lambda level: acpi.set_gpe(PCI_HOTPLUG_EVENT, level), self._eject)
        self._bus = bus
        self._lock = threading.Lock()
        self._devices: dict[str, _Plugged] = {}
        self._leaving: set[str] = set()
        """Those that are out, and have not let go of all that they had: their names are theirs."""
        self._ended = False
        self.awaited: dict[str, tuple[int, State]] = {}
        """Slot and state of devices of a saved machine that have not been plugged in yet."""

    def plug(
        self, name: str, device: PciDevice, slot: int | None = None, *, announce: bool = False
    ) -> int:
        """Puts a device into a slot; ``announce`` tells the guest, which runs."""
        with self._lock:
            if name in self._devices or name in self._leaving:
                raise ConfigError(f"there is a device {name!r} already", mend="name it otherwise")
            if any(plugged.device is device for plugged in self._devices.values()):
                raise ConfigError(
                    f"the device {name!r} is in a slot already", mend="detach it before"
                )
            saved = self.awaited.get(name)
            if saved is not None:
                slot = saved[0]
            slot = self._bus.plug(device.function, slot)
            plugged = self._devices[name] = _Plugged(slot, device)
        if saved is not None:
            plugged.method("load")(saved[1])
            del self.awaited[name]
        elif announce:
            self.hotplug.announce(slot)
        return slot

    def unplug(
        self, device: PciDevice | str, *, ask: bool, timeout: float | None = None
    ) -> bool | None:
        """Takes a device out; ``ask``: when the guest has given it up. False: it has not in time;
        None: the machine has ended."""
        limit = patience(timeout)
        with self._lock:
            for name, plugged in self._devices.items():
                if device in (name, plugged.device):
                    break
            else:
                raise MachineStateError(
                    f"the machine has no PCI device {device!r}", mend="name one that it has"
                )
            plugged.leaving = True
            if self._ended:
                return None
        if ask:
            self.hotplug.request(plugged.slot)
        else:
            self._eject(plugged.slot)
        if not plugged.gone.wait(limit):
            return False
        return True if plugged.out else None

    def _eject(self, slot: int) -> None:
        """Nothing if the slot is empty: a guest may say so at any time."""
        with self._lock:
            found = [name for name, plugged in self._devices.items() if plugged.slot == slot]
            if not found:
                return
            (name,) = found
            plugged = self._devices.pop(name)
            self._leaving.add(name)
            self._bus.unplug(slot)
        self.hotplug.forget(slot)
        try:
            # No access reaches it any more; now it lets go of guest memory, then of the host's.
            plugged.method("reset")()
            if callable(close := getattr(plugged.device, "close", None)):
                close()
        finally:
            try:
                self._release(name)
            finally:
                with self._lock:
                    self._leaving.discard(name)
                plugged.out = True
                plugged.gone.set()
                self._tell(name)

    def close(self) -> None:
        """The machine has ended: nobody waits for its guest any longer."""
        with self._lock:
            self._ended = True
            for plugged in self._devices.values():
                plugged.gone.set()

    def has(self, name: str) -> bool:
        """Whether a device of that name is there, or has yet to let go of what it had."""
        with self._lock:
            return name in self._devices or name in self._leaving

    @property
    def slots(self) -> dict[int, str]:
        """Which device is in which slot."""
        return {plugged.slot: name for name, plugged in self._all().items()}

    def request_unplug(self, name: str) -> None:
        """Asks the guest to give a device up; returns at once. Raises LookupError."""
        with self._lock:
            plugged = self._devices.get(name)
            if plugged is None:
                raise LookupError(f"Device '{name}' not found")
            plugged.leaving = True
        self.hotplug.request(plugged.slot)

    def _all(self) -> dict[str, _Plugged]:
        with self._lock:
            return dict(self._devices)

    # Life

    def reset(self) -> None:
        """Of what the guest was asked to give up, a reset is an answer."""
        for plugged in self._all().values():
            if plugged.leaving:
                self._eject(plugged.slot)
            else:
                plugged.method("reset")()

    def save(self) -> dict[str, Any]:
        devices = self._all().items()
        return {name: {"slot": one.slot, "state": one.method("save")()} for name, one in devices}

    def load(self, states: Mapping[str, Any]) -> None:
        """Puts the devices that the machine has into the slots where they were. One that it has
        and the saved machine had not was unplugged."""
        saved = {}
        for name, entry in states.items():
            slot = entry.get("slot") if isinstance(entry, dict) else None
            state = entry.get("state") if isinstance(entry, dict) else None
            # Slot 0 is the host bridge's.
            if type(slot) is not int or not 0 < slot < 32 or not isinstance(state, dict):
                raise StateError(
                    f"the saved PCI device {name!r} is none", mend="save it again: it is damaged"
                )
            saved[name] = slot, state
        if len({slot for slot, _ in saved.values()}) != len(saved):
            raise StateError(
                "two saved PCI devices are in one slot", mend="save it again: it is damaged"
            )
        ours = self._all()
        for name, plugged in ours.items():
            if name in saved:
                with self._lock:
                    del self._devices[name]
                    self._bus.unplug(plugged.slot)
            else:
                self._eject(plugged.slot)
        self.awaited = saved
        for name, plugged in ours.items():
            if name in saved:
                self.plug(name, plugged.device)

    def require_all(self) -> None:
        """Raises StateError where the saved machine had a device that this one has not."""
        for name in self.awaited:
            raise StateError(
                f"the saved machine had a PCI device {name!r}",
                mend="plug it in before start(), or give restore() its disk= and vsock=",
            )
