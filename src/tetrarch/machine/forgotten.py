"""RAM of machines that nobody has any more.

A machine and its devices refer to each other, so Python's cyclic collector frees them; and that
counts objects, not what they hold: many machines, one after the other, would have the host's
memory before it runs.
"""

from __future__ import annotations

import gc

__all__ = ["MOST", "forget", "make_room"]

#: So many bytes of RAM may wait for the collector.
MOST = 2 << 30

_bytes = 0


def forget(ram: int) -> None:
    """Notes that a machine with ``ram`` bytes is nobody's any more. Lets nothing go itself: it is
    called where a machine is about to be freed."""
    global _bytes
    _bytes += ram


def make_room(ram: int) -> None:
    """Frees what is forgotten, if that and ``ram`` bytes more would be much."""
    global _bytes
    if _bytes and _bytes + ram > MOST:
        _bytes = 0
        gc.collect()
