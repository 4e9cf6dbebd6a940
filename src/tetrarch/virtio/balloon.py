"""Memory balloon (virtio 1.2, 5.5): memory that the guest gives back while it runs.

Pages are Rust's (``crates/virtio/src/balloon.rs``). Free pages come back by themselves, where the
driver reports them; the balloon takes more, as much as ``target`` says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import VirtioBalloon
from tetrarch.devices._balloon import PAGE, target_pages
from tetrarch.devices._state import DeviceState, register

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["BalloonKind", "BalloonState"]

# Feature bits (5.5.3).
STATS_VQ: Final = 1 << 1
DEFLATE_ON_OOM: Final = 1 << 2
REPORTING: Final = 1 << 5

#: struct virtio_balloon_config (5.5.4), without what belongs to features that are not offered.
_PAGES_MAX: Final = (1 << 32) - 1
_CONFIG: Final = struct.Struct("<II")
_ACTUAL: Final = 4

#: Tags of statistics (5.5.6.4), each in bytes but for those that count events or pages.
_STATISTICS: Final = (
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free",
    "total",
    "available",
    "caches",
    "hugetlb_allocations",
    "hugetlb_failures",
)


@dataclass
class BalloonState(DeviceState):
    """Sizes in pages."""

    kind = "balloon"

    target: int = register(0, _PAGES_MAX)
    actual: int = register(0, _PAGES_MAX)


class BalloonKind:
    """The balloon of a machine, as ``Machine.balloon`` gives it."""

    device_id: Final = 5
    features: Final = STATS_VQ | DEFLATE_ON_OOM | REPORTING
    queue_sizes: Final[Sequence[int]] = (64,) * 5
    name: Final = "balloon"

    def __init__(
        self, vm: Vm, memory: int, changed: Callable[[int], object] = lambda actual: None
    ) -> None:
        """``memory``: bytes of RAM that the machine has. ``changed`` is called, on a vCPU's
        thread, with the bytes that are in the balloon now."""
        self._changed = changed
        self.data_path = VirtioBalloon(vm, self.name)
        self._memory = min(memory, _PAGES_MAX * PAGE)
        self._state = BalloonState()

    @property
    def target(self) -> int:
        """Bytes that are to be in the balloon, which the guest does without. 0 at first.

        The guest follows as it can; one that is short of memory takes some back
        (DEFLATE_ON_OOM). Raises ConfigError for more than the machine has.
        """
        return self._state.target * PAGE

    @target.setter
    def target(self, size: int) -> None:
        self._state.target = target_pages(size, self._memory)
        self.data_path.config_changed()

    @property
    def actual(self) -> int:
        """Bytes that are in the balloon now, as the guest's driver says."""
        return self._state.actual * PAGE

    def stats(self, timeout: float = 5.0) -> dict[str, int]:
        """What the guest's kernel says of its memory, asked anew; or the answer that it still
        owes to a call which timed out.

        ``total``, ``free``, ``available``, ``caches``, ``swap_in`` and ``swap_out`` are bytes;
        ``major_faults``, ``minor_faults``, ``hugetlb_allocations`` and ``hugetlb_failures`` count.
        What its driver does not know is missing. Raises TimeoutError where there is no answer
        after ``timeout`` seconds: the guest has no driver, or is held.
        """
        found = self.data_path.statistics(timeout)
        if found is None:
            raise TimeoutError(f"the guest's balloon driver has not answered within {timeout:g} s")
        return {_STATISTICS[tag]: value for tag, value in found if tag < len(_STATISTICS)}

    # What the device's registers ask

    @property
    def config(self) -> bytes:
        return _CONFIG.pack(self._state.target, self._state.actual)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver says how large the balloon is; the target is not its to write."""
        start, end = max(offset, _ACTUAL), min(offset + len(data), _CONFIG.size)
        if start < end:
            config = bytearray(self.config)
            config[start:end] = data[start - offset : end - offset]
            self._state.actual = _CONFIG.unpack(config)[1]
            self._changed(self.actual)

    def negotiated(self, features: int) -> None:
        if not features:  # reset: the pages are the guest's again
            self._state.actual = 0

    def save(self) -> dict[str, Any]:
        return self._state.save()

    def load(self, state: dict[str, Any]) -> None:
        self._state.load(state)
