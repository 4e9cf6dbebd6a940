"""What a machine's balloon is to its owner, whichever driver the guest has for it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Balloon"]


class Balloon(Protocol):
    @property
    def target(self) -> int:
        """Bytes that are to be in the balloon, which the guest does without. 0 at first.

        The guest follows as it can. Raises ConfigError for more than the machine has.
        """

    @target.setter
    def target(self, size: int) -> None: ...

    @property
    def actual(self) -> int:
        """Bytes that are in the balloon now, as the guest's driver says."""

    def stats(self, timeout: float = 5.0) -> dict[str, int]:
        """What the guest's kernel says of its memory. Raises TimeoutError where it says nothing."""
