"""The devices that a program attached to its machine, by name, for saved machines and resets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tetrarch.errors import ConfigError, MachineStateError, StateError

if TYPE_CHECKING:
    from tetrarch._native import Device
    from tetrarch.machine.pc import SavedDevice
    from tetrarch.virtio.served import ServedKind

__all__ = ["AttachedDevices"]


class AttachedDevices:
    def __init__(self) -> None:
        self._devices: dict[str, object] = {}
        self._served: list[ServedKind] = []
        self.awaited: dict[str, Any] = {}
        """States of a saved machine whose devices have not been attached yet."""

    def add(self, name: str | None, base: int, device: Device) -> None:
        if name is None:
            if any(device is other for other in self._devices.values()):
                return  # another range of the same one
            name = f"{type(device).__qualname__}@{base:#x}"
        self._add(name, device)

    def require_free(self, name: str) -> None:
        if name in self._devices:
            raise ConfigError(f"there is a device {name!r} already", mend="name it otherwise")

    def add_virtio(self, name: str, kind: ServedKind, transport: SavedDevice | None) -> None:
        """A virtio device: what is saved and reset is its transport, and through it the kind.
        None: by the PCI bus."""
        self._served.append(kind)
        if transport is not None:
            self._add(name, transport)

    @property
    def current(self) -> bool:
        """Whether the caller is one of the virtio devices, on its thread."""
        return any(kind.current for kind in self._served)

    def close(self) -> None:
        """Ends the threads of virtio devices. Raises HostError where one does not return."""
        for kind in self._served:
            kind.close()

    def _add(self, name: str, device: object) -> None:
        if self._devices.get(name, device) is not device:
            raise ConfigError(f"there is a device {name!r} already", mend="name it otherwise")
        self._devices[name] = device
        if name in self.awaited:
            _method(name, device, "load")(self.awaited.pop(name))

    def require_all(self) -> None:
        """Raises StateError where the saved machine had a device that this one has not."""
        for name in self.awaited:
            raise StateError(
                f"the saved machine had a device {name!r}", mend="attach it before start()"
            )

    def reset(self) -> None:
        """Resets those that can be: a device need not have a state."""
        for device in self._devices.values():
            if callable(reset := getattr(device, "reset", None)):
                reset()

    def save(self) -> dict[str, Any]:
        return {name: _method(name, device, "save")() for name, device in self._devices.items()}


def _method(name: str, device: object, method: str) -> Any:
    found = getattr(device, method, None)
    if not callable(found):
        raise MachineStateError(
            f"the device {name!r} cannot be saved: it has no {method}()",
            mend="give it save() and load(state)",
        )
    return found
