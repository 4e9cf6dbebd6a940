"""What a process that was forked has of its parent's machines: their shadows, which do nothing.

fork(2) copies no threads, so there is no vCPU here; but RAM and descriptors are the parent's own.
Whoever used them would change the parent's machine, and taking them apart would wait for threads
that are not there. So a shadow refuses everything, and nothing of it is ever taken apart.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Protocol
from weakref import WeakSet

from tetrarch.errors import MachineStateError

__all__ = ["Elsewhere", "HasShadow", "elsewhere", "keep_for_ever", "watch_forks"]


class HasShadow(Protocol):
    def become_shadow(self) -> None:
        """Called in the child, where no other thread runs, and locks may be held for ever."""


_watched: WeakSet[Any] = WeakSet()


def watch_forks(one: HasShadow) -> None:
    _watched.add(one)


def _in_child() -> None:
    for one in list(_watched):
        one.become_shadow()
    _watched.clear()


os.register_at_fork(after_in_child=_in_child)


def elsewhere() -> MachineStateError:
    return MachineStateError(
        "this machine runs in the process that this one was forked from",
        mend="use it there, or make another here",
    )


class Elsewhere:
    """Stands for a part of it."""

    def __getattr__(self, name: str) -> Any:
        raise elsewhere()


def keep_for_ever(thing: object) -> None:
    """Also when the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
