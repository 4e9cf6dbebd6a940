"""The state of a machine in memory: all of it but RAM and what is behind its devices.

The interrupt controllers come before the devices, both ways: a device that is
loaded drives its line to where it was, and a controller that knows the line high
already sees no edge in that. What changes a device meanwhile, typed input, comes
into the device's state and then is an edge, as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tetrarch._native import EngineError
from tetrarch.errors import HostError, StateError
from tetrarch.machine.attached import AttachedDevices
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.engine_errors import engine_cause, engine_mend
from tetrarch.machine.engine_vm import EngineVcpu, EngineVm
from tetrarch.machine.pc import Pc

__all__ = ["MachineParts", "MachineState", "load_state", "save_state"]


@dataclass(frozen=True)
class MachineParts:
    """What the state of a machine is in."""

    config: MachineConfig
    engine: str
    platform: str
    uptime: float
    vm: EngineVm
    pc: Pc
    attached: AttachedDevices

    @property
    def vcpus(self) -> dict[int, EngineVcpu]:
        """Those that are in the machine, by number."""
        return {number: self.vm.vcpu(number) for number in self.pc.vcpus.numbers}


@dataclass(frozen=True)
class MachineState:
    """Of the engine as sections of its own, which have versions; of devices what JSON can hold,
    by their names."""

    vm: bytes
    vcpus: Mapping[int, bytes]
    devices: Mapping[str, Any]
    pci: Mapping[str, Any]
    attached: Mapping[str, Any]


def save_state(parts: MachineParts) -> MachineState:
    """Of a machine that is held. Raises what a device that cannot be saved raises, HostError
    where the engine cannot."""
    attached = parts.attached.save()
    plugged = parts.pc.plugged.save()
    devices = parts.pc.save()
    try:
        return MachineState(
            parts.vm.save_state(),
            {number: vcpu.save_state() for number, vcpu in parts.vcpus.items()},
            devices,
            plugged,
            attached,
        )
    except EngineError as error:
        raise HostError(
            f"the engine cannot save the machine: {engine_cause(error)}",
            mend=engine_mend(error, "please report it"),
        ) from error


def load_state(parts: MachineParts, state: MachineState) -> None:
    """Into a machine that is held, with its RAM as it was. ``parts.attached.awaited`` and that of
    the plugged devices are then the states of devices that are still to come.

    Raises StateError.
    """
    try:
        parts.vm.load_state(state.vm)
        for number, saved in state.vcpus.items():
            parts.vm.vcpu(number).load_state(saved)
    except EngineError as error:
        raise StateError(
            f"the engine {parts.engine} cannot take the machine up: {engine_cause(error)}",
            mend=engine_mend(
                error, "restore it on the engine and the kind of host where it was saved"
            ),
        ) from error
    parts.pc.load(state.devices)
    parts.pc.plugged.load(state.pci)
    parts.attached.awaited = dict(state.attached)
