"""Tetrarch: virtual machines from Python, with or without hardware virtualization."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetrarch._native import EngineError, GuestMemoryError, __version__
    from tetrarch.console import ExpectTimeout, MemoryConsole
    from tetrarch.errors import (
        BootError,
        ConfigError,
        HostError,
        ImageError,
        MachineStateError,
        StateError,
        TetrarchError,
    )
    from tetrarch.machine import ExitStatus, Machine, StopReason, engines

__all__ = [
    "BootError",
    "ConfigError",
    "EngineError",
    "ExitStatus",
    "ExpectTimeout",
    "GuestMemoryError",
    "HostError",
    "ImageError",
    "Machine",
    "MachineStateError",
    "MemoryConsole",
    "StateError",
    "StopReason",
    "TetrarchError",
    "__version__",
    "engines",
]

# Names are imported when they are first used: `tetrarch --version` and the
# start of `tetrarch run` need few of them.
_HOMES = {
    "__version__": "tetrarch._native",
    "BootError": "tetrarch.errors",
    "ConfigError": "tetrarch.errors",
    "EngineError": "tetrarch._native",
    "ExitStatus": "tetrarch.machine",
    "ExpectTimeout": "tetrarch.console",
    "GuestMemoryError": "tetrarch._native",
    "HostError": "tetrarch.errors",
    "ImageError": "tetrarch.errors",
    "Machine": "tetrarch.machine",
    "MachineStateError": "tetrarch.errors",
    "MemoryConsole": "tetrarch.console",
    "StateError": "tetrarch.errors",
    "StopReason": "tetrarch.machine",
    "TetrarchError": "tetrarch.errors",
    "engines": "tetrarch.machine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
