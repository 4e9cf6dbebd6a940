"""What a machine's RAM costs the host."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

Made = TypeVar("Made")


def with_resident(make: Callable[[], Made]) -> tuple[Made, Callable[[], int]]:
    """Makes a machine; tells how many bytes of the host's its RAM takes."""
    before = _memfds()
    made = make()
    (descriptor,) = _memfds() - before
    return made, lambda: os.stat(f"/proc/self/fd/{descriptor}").st_blocks * 512


def _memfds() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing
            continue
        if "tetrarch-ram" in target:
            found.add(name)
    return found
