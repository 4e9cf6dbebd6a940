"""What a driver negotiates and sets up, whatever the transport (virtio 1.2, sections 2 and 3)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch._native import EngineError, Interrupt
from tetrarch._seldom import Seldom
from tetrarch.devices._state import DeviceState, State, flag, register
from tetrarch.errors import StateError
from tetrarch.virtio.kind import VirtioKind

if TYPE_CHECKING:  # a form of the stub file alone
    from tetrarch._native import VirtioQueue

__all__ = [
    "ACKNOWLEDGE",
    "DRIVER",
    "DRIVER_OK",
    "FAILED",
    "FEATURES_OK",
    "NEEDS_RESET",
    "NO_VECTOR",
    "RING_FEATURES",
    "VERSION_1",
    "NegotiationState",
    "QueueRegisters",
    "VirtioRegisters",
]

log = logging.getLogger(__name__)

# Device status (2.1).
ACKNOWLEDGE: Final = 1 << 0
DRIVER: Final = 1 << 1
DRIVER_OK: Final = 1 << 2
FEATURES_OK: Final = 1 << 3
NEEDS_RESET: Final = 1 << 6
FAILED: Final = 1 << 7

# Feature bits that are no kind's own (section 6).
INDIRECT_DESC: Final = 1 << 28
EVENT_IDX: Final = 1 << 29
VERSION_1: Final = 1 << 32
RING_PACKED: Final = 1 << 34
RING_FEATURES: Final = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED

#: No MSI-X vector (4.1.5.1.2).
NO_VECTOR: Final = 0xFFFF

_U32: Final = (1 << 32) - 1
_U64: Final = (1 << 64) - 1


@dataclass
class NegotiationState(DeviceState):
    kind = "virtio"

    status: int = register(0, 0xFF)
    device_feature_select: int = register(0, _U32)
    driver_feature_select: int = register(0, _U32)
    driver_features: int = register(0, _U64)
    queue_select: int = register(0, 0xFFFF)
    config_vector: int = register(NO_VECTOR, 0xFFFF)
    generation: int = register(0, 0xFF)


@dataclass
class QueueRegisters(DeviceState):
    """One queue as its driver sets it up."""

    kind = "virtio-queue"

    size: int = register(0, 0xFFFF)
    enabled: bool = flag()
    descriptors: int = register(0, _U64)
    driver_area: int = register(0, _U64)
    device_area: int = register(0, _U64)
    vector: int = register(NO_VECTOR, 0xFFFF)
    # Where the device was in it when it was saved.
    started: bool = flag()
    available: int = register(0, 0xFFFF)
    used: int = register(0, 0xFFFF)


class VirtioRegisters:
    """The device side of negotiation, for one transport to show.

    ``interrupt`` gives what a queue, or None for the configuration, interrupts by; it is asked
    when the driver is ready. Methods are called under ``lock``, by the transport.
    """

    def __init__(
        self, kind: VirtioKind, interrupt: Callable[[QueueRegisters | None], Interrupt]
    ) -> None:
        self.kind = kind
        self.state = NegotiationState()
        self.queues = [QueueRegisters(size=size) for size in kind.queue_sizes]
        self.lock = threading.Lock()
        self._interrupt = interrupt
        self._complaint = Seldom()
        self._config = kind.config

    @property
    def offered(self) -> int:
        return self.kind.features | RING_FEATURES

    @property
    def queue(self) -> QueueRegisters | None:
        """The queue that is selected."""
        select = self.state.queue_select
        return self.queues[select] if select < len(self.queues) else None

    # Status and features

    @property
    def status(self) -> int:
        needs_reset = self.state.status & DRIVER_OK and self.kind.data_path.needs_reset
        return self.state.status | (NEEDS_RESET if needs_reset else 0)

    def write_status(self, value: int) -> None:
        """0 resets. Else bits are added: a driver clears none (2.1.1)."""
        if value & 0xFF == 0:
            self.reset()
            return
        new = value & ~self.state.status & ~NEEDS_RESET & 0xFF
        if new & FEATURES_OK and not self._acceptable():
            new &= ~FEATURES_OK  # the driver reads it back (3.1.1, step 6)
        self.state.status |= new
        if new & DRIVER_OK and self.state.status & FEATURES_OK:
            self._start()

    def _acceptable(self) -> bool:
        features = self.state.driver_features
        return not features & ~self.offered and bool(features & VERSION_1)

    def _start(self) -> None:
        features = self.state.driver_features
        self.kind.negotiated(features)
        queues = [self._setup(queue, features) if queue.enabled else None for queue in self.queues]
        try:
            self.kind.data_path.start(features, queues, self._interrupt(None))
        except EngineError as error:
            if self._complaint.due():
                log.warning(
                    "%s: its driver set it up in a way that cannot be: %s", self.kind.name, error
                )
            self.state.status |= NEEDS_RESET
            self._interrupt(None).trigger()

    def _setup(self, queue: QueueRegisters, features: int) -> VirtioQueue:
        return {
            "size": queue.size,
            "descriptors": queue.descriptors,
            "driver": queue.driver_area,
            "device": queue.device_area,
            "packed": bool(features & RING_PACKED),
            "event_index": bool(features & EVENT_IDX),
            "indirect": bool(features & INDIRECT_DESC),
            "position": (queue.available, queue.used) if queue.started else None,
            "interrupt": self._interrupt(queue),
        }

    def device_features(self) -> int:
        """The 32 of them that are selected."""
        return _half(self.offered, self.state.device_feature_select)

    def driver_features(self) -> int:
        return _half(self.state.driver_features, self.state.driver_feature_select)

    def write_driver_features(self, value: int) -> None:
        if self.state.status & FEATURES_OK or self.state.driver_feature_select > 1:
            return
        shift = 32 * self.state.driver_feature_select
        kept = self.state.driver_features & ~(_U32 << shift)
        self.state.driver_features = kept | (value & _U32) << shift

    # Queues

    def write_queue_size(self, size: int) -> None:
        queue = self._changeable()
        if queue is not None and 0 < size <= self.kind.queue_sizes[self.state.queue_select]:
            queue.size = size

    def write_queue_address(self, area: str, shift: int, value: int) -> None:
        """Half of the address of an area (a field of ``QueueRegisters``), 32 bits of it."""
        queue = self._changeable()
        if queue is not None:
            kept = getattr(queue, area) & ~(_U32 << shift)
            setattr(queue, area, kept | (value & _U32) << shift)

    def enable_queue(self, value: int) -> None:
        """A driver cannot disable a queue in this way (4.1.4.3.2)."""
        queue = self._changeable()
        if queue is not None and value & 1:
            queue.enabled = True

    def disable_queue(self) -> None:
        """For good, if the driver was ready: until a reset (4.2.2.2)."""
        queue = self.queue
        if queue is not None and queue.enabled:
            queue.enabled = False
            self.kind.data_path.stop_queue(self.state.queue_select)

    def _changeable(self) -> QueueRegisters | None:
        """The selected queue, unless the driver has enabled it: it is the device's then."""
        queue = self.queue
        busy = queue is None or queue.enabled or self.state.status & DRIVER_OK
        return None if busy else queue

    # Configuration

    @property
    def generation(self) -> int:
        """Another number when the configuration has changed since it was asked last (2.5)."""
        config = self.kind.config
        if config != self._config:
            self._config = config
            self.state.generation = (self.state.generation + 1) & 0xFF
        return self.state.generation

    def read_config(self, offset: int, size: int) -> int:
        data = self.kind.config[offset : offset + size]
        return int.from_bytes(data, "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.kind.write_config(offset, value.to_bytes(8, "little")[:size])

    # Life

    def reset(self) -> None:
        self.kind.data_path.reset()
        self.kind.negotiated(0)
        self.state.reset()
        for queue, size in zip(self.queues, self.kind.queue_sizes, strict=True):
            queue.reset()
            queue.size = size

    def save(self) -> State:
        """To be called while the machine is held."""
        positions = self.kind.data_path.positions()
        for index, queue in enumerate(self.queues):
            position = positions[index] if index < len(positions) else None
            queue.started = position is not None
            queue.available, queue.used = position or (0, 0)
        return {
            "registers": self.state.save(),
            "queues": [queue.save() for queue in self.queues],
            "kind": self.kind.save(),
        }

    def load(self, state: State) -> None:
        self.reset()
        queues = state.get("queues")
        if not isinstance(queues, list) or len(queues) != len(self.queues):
            raise StateError(
                f"the saved {self.kind.name} has other queues than this one",
                mend="make the machine as it was when it was saved",
            )
        self.state.load(state.get("registers", {}))
        for queue, saved, limit in zip(self.queues, queues, self.kind.queue_sizes, strict=True):
            queue.load(saved)
            queue.size = min(queue.size, limit)
        self.kind.load(state.get("kind", {}))
        if self.state.status & DRIVER_OK and self.state.status & FEATURES_OK:
            self._start()


def _half(features: int, select: int) -> int:
    return features >> 32 * select & _U32 if select < 2 else 0
