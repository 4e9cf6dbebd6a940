"""Tetrarch: virtual machines from Python, with or without hardware virtualization.

    from tetrarch import Machine

    with Machine(memory="512M") as vm:  # no kernel= is the default guest
        vm.start()
        vm.console.expect("# ")
        vm.console.send("uname -r\\n")
        print(vm.console.expect("# "))
        vm.console.send("poweroff\\n")
        print(vm.wait(timeout=60).reason)

``Machine`` is where to begin, and docs/python.md the guide; docs/devices.md tells how to write a
device, docs/platforms.md how to write what a guest finds beside the CPU.
"""

from typing import TYPE_CHECKING

from tetrarch._lazy import lazy_names

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
    from tetrarch.machine import (
        ExitStatus,
        Machine,
        MachineConfig,
        Phase,
        StopReason,
        engines,
        load_config,
    )
    from tetrarch.remote import connect

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
    "MachineConfig",
    "MachineStateError",
    "MemoryConsole",
    "Phase",
    "StateError",
    "StopReason",
    "TetrarchError",
    "__version__",
    "connect",
    "engines",
    "load_config",
]

_HOMES = {
    "__version__": "tetrarch._native",
    "BootError": "tetrarch.errors",
    "ConfigError": "tetrarch.errors",
    "EngineError": "tetrarch._native",
    "ExitStatus": "tetrarch.machine.status",
    "ExpectTimeout": "tetrarch.console",
    "GuestMemoryError": "tetrarch._native",
    "HostError": "tetrarch.errors",
    "ImageError": "tetrarch.errors",
    "Machine": "tetrarch.machine.machine",
    "MachineConfig": "tetrarch.machine.config",
    "MachineStateError": "tetrarch.errors",
    "MemoryConsole": "tetrarch.console",
    "Phase": "tetrarch.machine.lifecycle",
    "StateError": "tetrarch.errors",
    "StopReason": "tetrarch.machine.status",
    "TetrarchError": "tetrarch.errors",
    "connect": "tetrarch.remote",
    "engines": "tetrarch.machine.selection",
    "load_config": "tetrarch.machine.config_file",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())


def __dir__() -> list[str]:
    return sorted(__all__)
