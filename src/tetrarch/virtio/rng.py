"""Entropy device (virtio 1.2, 5.4): the host's random numbers for the guest's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import VirtioRng

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["RngKind"]


class RngKind:
    device_id: Final = 4
    features: Final = 0
    queue_sizes: Final[Sequence[int]] = (64,)
    config: Final = b""

    def __init__(self, vm: Vm, name: str = "rng") -> None:
        self.name = name
        self.data_path = VirtioRng(vm, name)

    def write_config(self, offset: int, data: bytes) -> None:
        pass

    def negotiated(self, features: int) -> None:
        pass

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass
