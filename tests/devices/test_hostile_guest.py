"""Every device under accesses that no driver makes."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrarch.devices import I8042, AcpiPm, DebugExit, ResetCf9, RtcCmos, Uart16550


def ignore(*_: object) -> None:
    pass


def zero() -> int:
    return 0


DEVICES: dict[str, Callable[[], Any]] = {
    "uart": lambda: Uart16550(ignore, ignore),
    "rtc": lambda: RtcCmos(ignore, zero, wall_ns=zero),
    "i8042 data": lambda: I8042(ignore, ignore).data,
    "i8042 status": lambda: I8042(ignore, ignore).status,
    "acpi": lambda: AcpiPm(ignore, zero, ignore),
    "reset": lambda: ResetCf9(ignore),
    "debug exit": lambda: DebugExit(ignore),
}

OFFSETS = st.integers(-4, 16) | st.integers(-(1 << 64), 1 << 64)
SIZES = st.sampled_from([1, 2, 4, 8]) | st.integers(-1, 100)
VALUES = st.integers(0, 0xFF) | st.integers(-(1 << 70), 1 << 70)


@pytest.mark.parametrize("name", DEVICES)
@given(st.lists(st.tuples(st.booleans(), OFFSETS, SIZES, VALUES)))
def test_any_access_is_harmless(name: str, accesses: list[Any]) -> None:
    device = DEVICES[name]()
    try:
        for is_write, offset, size, value in accesses:
            if is_write:
                device.write(offset, size, value)
            else:
                got = device.read(offset, size)
                assert 0 <= got < 1 << 8 * max(0, min(size, 8))
    finally:
        if isinstance(device, RtcCmos):
            device.close()


@pytest.mark.parametrize("name", ["uart", "rtc", "acpi", "reset", "debug exit"])
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from([1, 2, 4]), st.integers(0, 1 << 32))))
def test_state_survives_saving_and_loading(name: str, accesses: list[Any]) -> None:
    device, other = DEVICES[name](), DEVICES[name]()
    try:
        for offset, size, value in accesses:
            device.write(offset, size, value)
        state = device.save()
        other.load(state)
        assert other.save() == state
    finally:
        for rtc in (device, other):
            if isinstance(rtc, RtcCmos):
                rtc.close()
