"""What a machine needs of the engine below it: ``tetrarch._native.Vm``, or a stand-in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from tetrarch import _native
from tetrarch.errors import HostError
from tetrarch.machine.config import MIB, MachineConfig
from tetrarch.machine.engine_errors import engine_cause, engine_mend
from tetrarch.machine.recording import opened
from tetrarch.platforms.platform import Platform

if TYPE_CHECKING:  # Device is a protocol: of the stub file alone
    from tetrarch._native import Device

__all__ = [
    "BusRegion",
    "EngineVcpu",
    "EngineVm",
    "InterruptWire",
    "MemoryAccess",
    "VcpuAccess",
    "create_vm",
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


class VcpuAccess(Protocol):
    """A look into a vCPU."""

    def regs(self) -> dict[str, int]: ...
    def set_regs(self, values: dict[str, int]) -> None: ...
    def dump(self) -> str: ...
    def translate(self, linear: int) -> int | None: ...
    def xsave(self) -> bytes: ...
    def set_xsave(self, image: bytes) -> None: ...
    def msr(self, index: int) -> int | None: ...
    def set_msr(self, index: int, value: int) -> bool: ...


class EngineVcpu(VcpuAccess, Protocol):
    def run(self) -> str: ...
    def set_debug(
        self,
        *,
        step: bool = False,
        block_interrupts: bool = True,
        software: bool = False,
        hardware: Sequence[tuple[str, int, int]] | None = None,
    ) -> None: ...
    def set_frozen(self, frozen: bool) -> None: ...
    def save_state(self) -> bytes: ...
    def load_state(self, data: bytes) -> None: ...


class MemoryAccess(Protocol):
    """Guest physical memory."""

    @property
    def ram(self) -> list[tuple[int, int]]: ...
    def read_memory(self, address: int, length: int) -> bytes: ...
    def write_memory(self, address: int, data: bytes) -> None: ...


class EngineVm(MemoryAccess, Protocol):
    """``tetrarch.testing.ScriptedVm`` is one without a CPU."""

    def cpu_features(self) -> list[tuple[str, int]]: ...
    def log_writes(self) -> None: ...
    def save_ram(
        self, descriptor: int, offset: int, *, written: bool = False
    ) -> tuple[bytes, int]: ...
    def load_ram(self, layers: Sequence[tuple[str, int, bytes]]) -> None: ...
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
    def end_recording(self) -> tuple[str, int, int] | None: ...
    def reset(self) -> None: ...
    def set_debug_alert(self, descriptor: int | None) -> None: ...
    def take_debug_stops(self) -> list[tuple[int, str, int]]: ...
    def set_planted(self, addresses: Sequence[int]) -> None: ...
    def request_stop(self) -> None: ...
    def stats(self) -> dict[str, dict[str, int]]: ...


def create_vm(
    engine: str,
    config: MachineConfig,
    platform: Platform,
    features: Mapping[str, int] | None = None,
) -> EngineVm:
    """``features``: the most that its CPU may have.

    Raises HostError where this host cannot give what is asked.
    """
    cpus = config.cpus
    try:
        with opened(config) as recording:
            return _native.Vm(
                engine,
                config.memory,
                (cpus.sockets, cpus.cores, cpus.threads),
                chaos=config.chaos,
                platform=platform,
                features=features,
                **recording,
            )
    except (_native.EngineError, MemoryError, OSError, OverflowError) as error:
        raise HostError(
            f"cannot make a machine with {config.memory // MIB} MiB of memory and "
            f"{cpus.count} CPU{'s' if cpus.count > 1 else ''}: "
            f"{engine_cause(error) or type(error).__name__}",
            mend=engine_mend(error, "try less memory"),
        ) from error
