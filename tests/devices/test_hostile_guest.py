"""Every device under accesses that no driver makes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrarch._native import EngineError, RustDevice
from tetrarch.devices import (
    I8042,
    AcpiPm,
    DebugConsole,
    DebugExit,
    FwCfg,
    Hpet,
    PFlash,
    Port92,
    ResetCf9,
    RtcCmos,
    Uart16550,
    Vga,
)
from tetrarch.devices import hpet as hpet_registers
from tetrarch.errors import StateError
from tetrarch.pci import PciBus
from tetrarch.testing import ScriptedVm


class Bench:
    """A device and what it does to the machine around it."""

    def __init__(self, name: str) -> None:
        self.now = 0
        self.level = False
        self.done: list[object] = []
        self.device, self.ports = DEVICES[name](self)

    def irq(self, level: bool) -> None:
        self.level = level

    def clock_ns(self) -> int:
        return self.now

    def note(self, *what: object) -> None:
        """Output, reset, power-off."""
        self.done.append(what)

    def access(self, step: Step) -> int | None:
        """The value that was read."""
        port, write, offset, size, value, later = step
        self.now += later
        device = self.ports[port % len(self.ports)]
        if isinstance(device, RustDevice) and not possible(offset, size, value):
            with pytest.raises((OverflowError, EngineError)):
                device.write(offset, size, value)
            return None
        if write:
            device.write(offset, size, value)
            return None
        got: int = device.read(offset, size)
        return got

    def close(self) -> None:
        if isinstance(self.device, (RtcCmos, Hpet)):
            self.device.close()


def possible(offset: int, size: int, value: int) -> bool:
    """Whether the bus can make such an access; a device in Rust refuses others."""
    return size in (1, 2, 4, 8) and 0 <= offset < 1 << 64 and 0 <= value < 1 << 64


def alone(device: Any) -> tuple[Any, list[Any]]:
    return device, [device]


def i8042(bench: Bench) -> tuple[Any, list[Any]]:
    device = I8042(bench.irq, bench.note)
    return device, [device.data, device.status]


def ps2(bench: Bench) -> tuple[Any, list[Any]]:
    device = I8042(bench.irq, bench.note, keyboard=True, mouse=True)
    return device, [device.data, device.status]


def hpet(bench: Bench) -> tuple[Any, list[Any]]:
    levels = {gsi: (lambda level: None) for gsi in hpet_registers.GSIS} | {20: bench.irq}
    wires = [hpet_registers.Wire(level, lambda: None) for level in levels.values()]
    return alone(Hpet(wires, bench.clock_ns))


def pci(bench: Bench) -> tuple[Any, list[Any]]:
    device = PciBus(ScriptedVm(lambda vm: "stopped"))
    return device, [device.address_port, device.data_ports, device.ecam]


class Nowhere:
    """Memory that ends soon."""

    def __init__(self) -> None:
        self._bytes = bytearray(64)

    def read_memory(self, address: int, length: int) -> bytes:
        if address + length > len(self._bytes):
            raise LookupError
        return bytes(self._bytes[address : address + length])

    def write_memory(self, address: int, data: bytes) -> None:
        if address + len(data) > len(self._bytes):
            raise LookupError
        self._bytes[address : address + len(data)] = data


def fw_cfg(bench: Bench) -> tuple[Any, list[Any]]:
    device = FwCfg(Nowhere(), LookupError)
    return device, [device.ports, device.dma]


class Wire:
    """As the bench has an interrupt line."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def set(self, level: bool) -> None:
        self._bench.irq(level)


def uart(bench: Bench) -> tuple[Any, list[Any]]:
    return alone(Uart16550(Wire(bench)))


DEVICES: dict[str, Callable[[Bench], tuple[Any, list[Any]]]] = {
    "uart": uart,
    "rtc": lambda bench: alone(
        RtcCmos(bench.irq, bench.clock_ns, wall_ns=lambda: (1 << 60) + bench.clock_ns())
    ),
    "i8042": i8042,
    "ps2": ps2,
    "hpet": hpet,
    "pflash": lambda bench: alone(PFlash(bytes(8192), lambda offset, data: None)),
    "acpi": lambda bench: alone(AcpiPm(bench.irq, bench.clock_ns, bench.note)),
    "reset": lambda bench: alone(ResetCf9(bench.note)),
    "port 92": lambda bench: alone(Port92(bench.note)),
    "debug exit": lambda bench: alone(DebugExit(bench.note)),
    "debug console": lambda bench: alone(DebugConsole()),
    "fw_cfg": fw_cfg,
    "pci": pci,
    "vga": lambda bench: alone(Vga()),
}

# Which port, write or read, offset, size, value, and how much later in ns.
Step = tuple[int, bool, int, int, int, int]
SANE_STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.booleans(),
        st.integers(0, 12),
        st.sampled_from([1, 2, 4]),
        st.integers(0, 0xFF) | st.integers(0, 1 << 32),
        st.integers(0, 3_000_000_000),
    ),
    max_size=30,
)
OFFSETS = st.integers(-4, 16) | st.integers(-(1 << 64), 1 << 64)
SIZES = st.sampled_from([1, 2, 4, 8]) | st.integers(-1, 100)
JUNK = (
    st.none()
    | st.booleans()
    | st.text(max_size=3)
    | st.integers(-(1 << 70), 1 << 70)
    | st.lists(st.integers(-(1 << 70), 1 << 70), max_size=40)
    | st.lists(st.none(), max_size=2)
)
VALUES = st.integers(0, 0xFF) | st.integers(-(1 << 70), 1 << 70)


@pytest.mark.parametrize("name", DEVICES)
@given(st.lists(st.tuples(st.integers(0, 1), st.booleans(), OFFSETS, SIZES, VALUES, st.just(0))))
def test_any_access_is_harmless(name: str, steps: list[Step]) -> None:
    bench = Bench(name)
    try:
        for step in steps:
            got = bench.access(step)
            assert got is None or 0 <= got < 1 << 8 * max(0, min(step[3], 8))
    finally:
        bench.close()


@pytest.mark.parametrize("name", DEVICES)
@given(SANE_STEPS, SANE_STEPS)
def test_loaded_device_goes_on_as_the_saved_one(
    name: str, before: list[Step], after: list[Step]
) -> None:
    original, copy = Bench(name), Bench(name)
    try:
        for step in before:
            original.access(step)
        copy.now = original.now
        copy.device.load(json.loads(json.dumps(original.device.save())))
        original.done.clear()
        # What a timer thread raised is in the flags of both after the next access.
        for step in [(0, False, 1, 1, 0, 0), *after]:
            assert copy.access(step) == original.access(step)
            assert copy.device.save() == original.device.save()
            assert copy.level == original.level
        assert copy.done == original.done
    finally:
        original.close()
        copy.close()


# The clock's memory and time are kept by its battery, and a flash chip keeps what is in it.
@pytest.mark.parametrize("name", sorted(DEVICES.keys() - {"rtc", "acpi", "pflash"}))
@given(SANE_STEPS, SANE_STEPS)
def test_reset_device_is_as_a_new_one(name: str, before: list[Step], after: list[Step]) -> None:
    used, new = Bench(name), Bench(name)
    try:
        for step in before:
            used.access(step)
        used.device.reset()
        used.done.clear()
        for step in after:
            assert used.access(step) == new.access(step)
            assert used.level == new.level
        assert used.done == new.done
    finally:
        used.close()
        new.close()


@pytest.mark.parametrize("name", DEVICES)
@given(st.data())
def test_damaged_state_is_refused_or_harmless(name: str, data: st.DataObject) -> None:
    bench = Bench(name)
    try:
        state = bench.device.save()
        for key in data.draw(st.lists(st.sampled_from(sorted(state)), max_size=3)):
            if data.draw(st.booleans()):
                state.pop(key, None)
            else:
                state[key] = data.draw(JUNK)
        with contextlib.suppress(StateError):
            bench.device.load(state)
        for step in data.draw(SANE_STEPS):
            got = bench.access(step)
            assert got is None or 0 <= got < 1 << 8 * step[3]
    finally:
        bench.close()
