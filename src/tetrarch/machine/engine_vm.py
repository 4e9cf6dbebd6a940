"""What a machine needs of the engine below it: ``tetrarch._native.Vm``, or a stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tetrarch import _native
from tetrarch.errors import HostError
from tetrarch.machine.config import MIB, MachineConfig
from tetrarch.platforms.platform import Platform

if TYPE_CHECKING:  # Device is a protocol: of the stub file alone
    from tetrarch._native import Device

__all__ = [
    "BusRegion",
    "EngineVcpu",
    "EngineVm",
    "InterruptWire",
    "create_vm",
    "engine_cause",
    "engine_mend",
]


class BusRegion(Protocol):
    """Where a device answers; see ``tetrarch._native.Region``."""

    @property
    def base(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def mapped(self) -> bool: ...
    def move(self, base: int) -> None: ...
    def map(self) -> None: ...
    def unmap(self) -> None: ...
    def detach(self) -> None: ...


class InterruptWire(Protocol):
    """A device's own wire to an interrupt line; see ``tetrarch._native.IrqSource``."""

    @property
    def gsi(self) -> int: ...
    def set(self, level: bool) -> None: ...
    def pulse(self) -> None: ...


class EngineVcpu(Protocol):
    def run(self) -> str: ...
    def regs(self) -> dict[str, int]: ...
    def set_regs(self, values: dict[str, int]) -> None: ...
    def dump(self) -> str: ...
    def save_state(self) -> bytes: ...
    def load_state(self, data: bytes) -> None: ...


class EngineVm(Protocol):
    """``tetrarch.testing.ScriptedVm`` is one without a CPU."""

    @property
    def ram(self) -> list[tuple[int, int]]: ...
    def read_memory(self, address: int, length: int) -> bytes: ...
    def write_memory(self, address: int, data: bytes) -> None: ...
    def attach_ports(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        mapped: bool = True,
    ) -> BusRegion: ...
    def attach_mmio(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        mapped: bool = True,
    ) -> BusRegion: ...
    def irq_source(self, gsi: int) -> InterruptWire: ...
    def irq_line(self, gsi: int, level: bool) -> None: ...
    def clock_ns(self) -> int: ...
    def vcpu(self, index: int) -> EngineVcpu: ...
    def hold(self, timeout: float = ...) -> None: ...
    def resume(self) -> None: ...
    def save_state(self) -> bytes: ...
    def load_state(self, data: bytes) -> None: ...
    def keep_reset_state(self) -> None: ...
    def reset(self) -> None: ...
    def request_stop(self) -> None: ...
    def stats(self) -> dict[str, dict[str, int]]: ...


def create_vm(engine: str, config: MachineConfig, platform: Platform) -> EngineVm:
    """Raises HostError where this host cannot give what is asked."""
    try:
        return _native.Vm(engine, config.memory, config.cpus, platform=platform)
    except (_native.EngineError, MemoryError, OSError, OverflowError) as error:
        raise HostError(
            f"cannot make a machine with {config.memory // MIB} MiB of memory and "
            f"{config.cpus} CPU{'s' if config.cpus > 1 else ''}: "
            f"{engine_cause(error) or type(error).__name__}",
            mend=engine_mend(error, "try less memory"),
        ) from error


def engine_cause(error: BaseException) -> str:
    """What went wrong in the engine, without what mends it."""
    return str(getattr(error, "cause", "") or error)


def engine_mend(error: BaseException, otherwise: str) -> str:
    """What mends an error of the engine, or ``otherwise`` where it does not say."""
    return str(getattr(error, "mend", "") or otherwise)
