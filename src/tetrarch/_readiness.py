"""Waiting for one of several descriptors, whatever their numbers are."""

from __future__ import annotations

import select
from typing import Protocol

__all__ = ["HasDescriptor", "await_room", "readable"]


class HasDescriptor(Protocol):
    def fileno(self) -> int: ...


def readable(*sources: int | HasDescriptor, timeout: float | None = None) -> set[int]:
    """The descriptors of those that have something to be read, or that have ended; none after
    ``timeout`` seconds.

    select(2) would do for the first 1024 descriptors of a process alone.
    """
    poll = select.poll()
    for source in sources:
        poll.register(source, select.POLLIN)
    return {number for number, _ in poll.poll(None if timeout is None else timeout * 1000)}


def await_room(descriptor: int) -> None:
    """Until something can be written there, or nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()
