"""Where gdb finds a machine, as it is written down: ``PORT``, ``HOST:PORT`` or a path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tetrarch.endpoint import Endpoint

__all__ = ["GdbSpec"]


@dataclass(frozen=True)
class GdbSpec(Endpoint):
    """A TCP port, or a Unix socket."""

    WHO: ClassVar[str] = "gdb"
