"""What makes a virtio device the kind that it is: its number, features, queues, configuration.

Transport, negotiation and queues are the same for all kinds. A kind in Python beside which the
data path is written in Rust is a file here; docs/virtio.md shows one that is Python alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tetrarch._native import VirtioDevice

__all__ = ["QUEUE_SIZE", "VirtioKind"]

#: Descriptors of a queue where a kind has no other wish.
QUEUE_SIZE = 256


class VirtioKind(Protocol):
    """One device of a kind (virtio 1.2, section 5)."""

    @property
    def name(self) -> str:
        """What messages and saved states call it."""

    @property
    def device_id(self) -> int:
        """Of the list in section 5."""

    @property
    def features(self) -> int:
        """The feature bits of the kind that are offered; those of rings and transport are added."""

    @property
    def queue_sizes(self) -> Sequence[int]:
        """How many descriptors each queue has at most."""

    @property
    def data_path(self) -> VirtioDevice: ...

    @property
    def config(self) -> bytes:
        """The configuration space as it is now (2.5), little-endian."""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes configuration fields; those that it must not write stay."""

    def negotiated(self, features: int) -> None:
        """The driver is ready, with these features; 0: it has reset the device."""

    def save(self) -> dict[str, Any]:
        """What belongs to the kind alone."""

    def load(self, state: dict[str, Any]) -> None: ...
