"""Programs that networks start."""

from __future__ import annotations

import os
from pathlib import Path


def passts() -> set[int]:
    """Those that this process has started."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # proc(5): "pid (comm) state ppid"; comm may hold anything.
            before, _, after = (process / "stat").read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        state, parent = after.split()[:2]
        if int(parent) == os.getpid() and state != "Z" and "(passt" in before:
            found.add(int(process.name))
    return found
