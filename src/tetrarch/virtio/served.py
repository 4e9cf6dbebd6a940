"""Virtio devices written in Python: their queues are served on a thread of their own.

docs/virtio.md shows how one is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tetrarch._native import VirtioChain, VirtioServed
from tetrarch.errors import ConfigError, HostError, MachineStateError

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["DeviceQueues", "ServedKind", "VirtioUserDevice"]

# A device that does not return by then is in the way of its machine's end.
_PATIENCE_S = 10.0

# The rest is of rings and transports, or not used yet (virtio 1.2, 2.2).
_OWN_FEATURES = (1 << 24) - 1 | ((1 << 64) - 1) ^ ((1 << 50) - 1)


class DeviceQueues:
    """The queues of one device, for the device itself: from any thread."""

    def __init__(self, data_path: VirtioServed) -> None:
        self._data_path = data_path

    def take(self, queue: int) -> VirtioChain | None:
        """The next chain of a queue; None where the driver has given none."""
        return self._data_path.take(queue)

    def config_changed(self) -> None:
        """Tells the driver that ``config`` has changed."""
        self._data_path.config_changed()


class VirtioUserDevice(Protocol):
    """What a virtio device in Python has.

    It may have more: ``inputs``, a collection of queues whose chains wait until the device
    takes them, and ``attached(queues)``, which gives it a ``DeviceQueues`` for that;
    ``buffers(queue)``, called when there are new ones in such a queue; ``negotiated(features)``
    and ``write_config(offset, data)`` as in ``VirtioKind``; ``save()`` and ``load(state)``.
    """

    @property
    def device_id(self) -> int:
        """Of the list in virtio 1.2, section 5."""

    @property
    def features(self) -> int:
        """The feature bits of this kind of device that it offers."""

    @property
    def queue_sizes(self) -> Sequence[int]:
        """How many descriptors each queue has at most: a power of 2."""

    @property
    def config(self) -> bytes:
        """The configuration space as it is now, little-endian."""

    def handle(self, queue: int, chain: VirtioChain) -> None:
        """Serves a request of the driver; the chain goes back to it on return."""


class ServedKind:
    """The kind of device that an object in Python makes."""

    def __init__(
        self,
        vm: Vm,
        device: VirtioUserDevice,
        name: str,
        end: Callable[[BaseException], None],
    ) -> None:
        """``end`` is called with what the device raises: it ends the machine."""
        _check(device)
        self.name = name
        self.device_id = device.device_id
        self.features = device.features
        self.queue_sizes = tuple(device.queue_sizes)
        self.data_path = VirtioServed(vm, name, len(self.queue_sizes))
        self._device = device
        self._inputs = frozenset(getattr(device, "inputs", ()))
        self._end = end
        self._thread: threading.Thread | None = None
        _call(device, "attached", DeviceQueues(self.data_path))

    @property
    def config(self) -> bytes:
        return self._device.config

    def write_config(self, offset: int, data: bytes) -> None:
        _call(self._device, "write_config", offset, data)

    def negotiated(self, features: int) -> None:
        _call(self._device, "negotiated", features)
        if features and self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)
            self._thread.start()

    def save(self) -> dict[str, Any]:
        if not callable(save := getattr(self._device, "save", None)):
            raise MachineStateError(
                f"the device {self.name!r} cannot be saved: it has no save()",
                mend="give it save() and load(state)",
            )
        return {"device": save()}

    def load(self, state: dict[str, Any]) -> None:
        _call(self._device, "load", state.get("device"))

    @property
    def current(self) -> bool:
        """Whether the caller is the device, in its handle()."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Raises HostError where the device does not return."""
        self.data_path.close()
        if self._thread is not None and not self.current:
            self._thread.join(_PATIENCE_S)
            if self._thread.is_alive():
                raise HostError(
                    f"the device {self.name!r} does not return from a request",
                    mend="end its handle()",
                )

    def _serve(self) -> None:
        try:
            while (queue := self.data_path.wait()) is not None:
                if queue in self._inputs:
                    _call(self._device, "buffers", queue)
                    continue
                while (chain := self.data_path.take(queue)) is not None:
                    try:
                        self._device.handle(queue, chain)
                    finally:
                        chain.done()
        except BaseException as error:  # it comes out of wait()
            self._end(error)


def _call(device: VirtioUserDevice, method: str, *arguments: Any) -> None:
    """Calls a method that a device need not have."""
    if callable(found := getattr(device, method, None)):
        found(*arguments)


def _check(device: VirtioUserDevice) -> None:
    kind = type(device).__qualname__
    for name in ("device_id", "features", "queue_sizes", "config", "handle"):
        if not hasattr(device, name):
            raise ConfigError(f"{kind} is no virtio device: it has no {name}", mend="give it one")
    if not 1 <= device.device_id <= 63:
        raise ConfigError(
            f"{kind}: {device.device_id} is no number of a virtio device",
            mend="take one of the list in virtio 1.2, section 5: 1 to 63",
        )
    if device.features & ~_OWN_FEATURES:
        raise ConfigError(
            f"{kind}: {device.features:#x} has feature bits of queues and transports",
            mend="offer those of its kind alone, 0 to 23 and 50 to 63: the others are added",
        )
    for size in device.queue_sizes:
        if not 1 <= size <= 1 << 15 or size & size - 1:
            raise ConfigError(
                f"{kind}: a queue of {size} descriptors", mend="give a power of 2 up to 32768"
            )
    if not device.queue_sizes:
        raise ConfigError(f"{kind} has no queues", mend="give it one")
