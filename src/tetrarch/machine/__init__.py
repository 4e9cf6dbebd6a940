"""Machines: what one is made of, how it is put together, how it runs and ends."""

from tetrarch.machine.config import MachineConfig
from tetrarch.machine.machine import Machine
from tetrarch.machine.selection import EngineInfo, engines
from tetrarch.machine.status import ExitStatus, StopReason

__all__ = [
    "EngineInfo",
    "ExitStatus",
    "Machine",
    "MachineConfig",
    "StopReason",
    "engines",
]
