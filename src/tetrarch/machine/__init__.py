"""Machines: what one is made of, how it is put together, how it runs and ends."""

from typing import TYPE_CHECKING

from tetrarch._lazy import lazy_names

if TYPE_CHECKING:
    from tetrarch.machine.config import MachineConfig
    from tetrarch.machine.config_file import load_config
    from tetrarch.machine.lifecycle import Phase
    from tetrarch.machine.machine import Machine
    from tetrarch.machine.selection import EngineInfo, engines
    from tetrarch.machine.status import ExitStatus, StopReason

__all__ = [
    "EngineInfo",
    "ExitStatus",
    "Machine",
    "MachineConfig",
    "Phase",
    "StopReason",
    "engines",
    "load_config",
]

_HOMES = {
    "EngineInfo": "tetrarch.machine.selection",
    "ExitStatus": "tetrarch.machine.status",
    "Machine": "tetrarch.machine.machine",
    "MachineConfig": "tetrarch.machine.config",
    "Phase": "tetrarch.machine.lifecycle",
    "StopReason": "tetrarch.machine.status",
    "engines": "tetrarch.machine.selection",
    "load_config": "tetrarch.machine.config_file",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
