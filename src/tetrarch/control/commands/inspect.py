"""Registers and memory for programs. Of QEMU are pmemsave and memsave (qapi/machine.json)."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tetrarch._files import open_regular, open_to_write
from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor, as_file
from tetrarch.control.protocol import QmpError
from tetrarch.machine.engine_vm import EngineVcpu
from tetrarch.machine.memory import pages

__all__ = ["memory_write", "memsave", "msr", "pmemsave", "ram", "registers", "translate", "xsave"]

_CHUNK: Final = 1 << 20


@command("x-ram")
def ram(monitor: Monitor) -> list[dict[str, int]]:
    """Where there is RAM, by guest physical address."""
    return [{"base": base, "size": size} for base, size in monitor.machine.engine_vm.ram]


@command("pmemsave")
def pmemsave(monitor: Monitor, val: int, size: int, filename: str) -> None:
    """Guest physical memory, as bytes, to a file."""
    _require("val", val, 1 << 64)
    _require("size", size, 1 << 64)
    regions = monitor.machine.engine_vm.ram
    if not any(base <= val and val + size <= base + length for base, length in regions):
        raise QmpError(f"not all of {size} bytes at {val:#x} is RAM")
    steps = ((at, min(_CHUNK, val + size - at)) for at in range(val, val + size, _CHUNK))
    _save(monitor, steps, filename)


@command("memsave")
def memsave(
    monitor: Monitor, val: int, size: int, filename: str, cpu_index: int | None = None
) -> None:
    """Memory at linear addresses, as a vCPU has it mapped."""
    _require("val", val, 1 << 64)
    _require("size", size, (1 << 64) - val + 1)
    vcpu = _vcpu(monitor, cpu_index or 0)

    def steps() -> Iterable[tuple[int, int]]:
        for at, length in pages(val, size):
            physical = vcpu.translate(at)
            if physical is None:
                raise QmpError(f"the linear address {at:#x} is not mapped")
            yield physical, length

    _save(monitor, steps(), filename)


@command("x-memory-write")
def memory_write(monitor: Monitor, val: int, filename: str) -> None:
    """What is in a file into guest physical memory."""
    info = monitor.descriptors.in_set(filename)
    descriptor = open_regular(filename) if info is None else os.dup(info["fd"])
    with as_file(descriptor, "rb", filename) as file:
        file.seek(0)
        while data := file.read(_CHUNK):
            _require("val", val, 1 << 64)
            monitor.machine.write_memory(val, data)
            val += len(data)


@command("x-registers")
def registers(
    monitor: Monitor, cpu_index: int, set_: dict[str, int] | None = None
) -> dict[str, int]:
    """General, segment, control and table registers of a vCPU by name; those of ``set`` are set
    before, or none where one cannot be."""
    vcpu = _vcpu(monitor, cpu_index)
    for name, value in (set_ or {}).items():
        _require(name, value, 1 << 64)
    if set_:
        _require_settable(monitor, cpu_index)
        vcpu.set_regs(set_)
    return vcpu.regs()


@command("x-xsave")
def xsave(monitor: Monitor, cpu_index: int, set_: str | None = None) -> str:
    """x87, SSE and AVX registers as an XSAVE image in base64 (Intel SDM 1, 13.4)."""
    vcpu = _vcpu(monitor, cpu_index)
    if set_ is not None:
        _require_settable(monitor, cpu_index)
        vcpu.set_xsave(base64.b64decode(set_, validate=True))
    return base64.b64encode(vcpu.xsave()).decode()


@command("x-msr")
def msr(
    monitor: Monitor, cpu_index: int, index: int, set_: int | None = None
) -> dict[str, int | None]:
    """A model-specific register; ``value`` is null where the CPU has none of that number."""
    vcpu = _vcpu(monitor, cpu_index)
    _require("index", index, 1 << 32)
    if set_ is not None:
        _require("set", set_, 1 << 64)
        _require_settable(monitor, cpu_index)
        if not vcpu.set_msr(index, set_):
            raise QmpError(f"the CPU refuses {set_:#x} for the MSR {index:#x}")
    return {"value": vcpu.msr(index)}


@command("x-translate")
def translate(monitor: Monitor, cpu_index: int, address: int) -> dict[str, int | None]:
    """``physical`` is where a vCPU has a linear address mapped; null: nowhere."""
    _require("address", address, 1 << 64)
    return {"physical": _vcpu(monitor, cpu_index).translate(address)}


def _vcpu(monitor: Monitor, index: int) -> EngineVcpu:
    if index not in monitor.machine.pc.vcpus.numbers:
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    return monitor.machine.engine_vm.vcpu(index)


def _require_settable(monitor: Monitor, index: int) -> None:
    """The engine would take registers of a machine that records or replays, too."""
    monitor.machine.vcpu(index).require_settable()


def _require(name: str, value: int, end: int) -> None:
    if not 0 <= value < end:
        raise QmpError(f"Parameter '{name}' expects a number from 0 to {end - 1:#x}")


def _save(monitor: Monitor, steps: Iterable[tuple[int, int]], filename: str) -> None:
    info = monitor.descriptors.in_set(filename)
    opened = (
        open_to_write(Path(filename), buffering=_CHUNK)
        if info is None
        else as_file(os.dup(info["fd"]), "wb", filename)
    )
    with opened as file:
        for address, length in steps:
            file.write(monitor.machine.read_memory(address, length))
