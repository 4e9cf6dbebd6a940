"""Who is in the registry."""

from __future__ import annotations

import difflib
import os

from tetrarch.errors import HostError
from tetrarch.registry.about import About
from tetrarch.registry.claim import check_name, machine_directory, read_about, remove_if_dead
from tetrarch.registry.lock import is_locked
from tetrarch.registry.place import registry_directory

__all__ = ["alive", "find", "machines"]


def machines() -> list[About]:
    """The machines of this user that live, by name. What dead ones left is removed."""
    try:
        names = sorted(os.listdir(registry_directory() / "machines"))
    except FileNotFoundError:
        return []
    return [about for name in names if (about := _look(name)) is not None]


def find(name: str) -> About:
    """Raises HostError where no machine of that name lives, ConfigError for what is no name."""
    check_name(name)
    about = _look(name)
    if about is None:
        near = difflib.get_close_matches(name, [other.name for other in machines()], n=1)
        mend = f"did you mean {near[0]}?" if near else "tetrarch ps lists those that run"
        raise HostError(f"no machine named {name} runs", mend=mend)
    return about


def alive(name: str) -> bool:
    return is_locked(machine_directory(name) / "lock")


def _look(name: str) -> About | None:
    if not alive(name):
        remove_if_dead(name)
        return None
    return read_about(name)
