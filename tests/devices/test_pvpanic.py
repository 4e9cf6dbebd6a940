"""The port by which a guest tells of its panic."""

from hypothesis import given
from hypothesis import strategies as st

from tetrarch.devices import PvPanic


def port() -> tuple[PvPanic, list[str]]:
    told: list[str] = []
    return PvPanic(lambda: told.append("panicked"), lambda: told.append("crash loaded")), told


def test_port_shows_the_events_that_it_knows() -> None:
    device, told = port()
    assert device.read(0, 1) == 3
    assert device.read(0, 4) == 0xFFFF_FF03
    assert told == []


def test_writes_tell_of_a_panic_or_of_a_crash_kernel() -> None:
    device, told = port()
    for value in (1, 2, 3, 0, 4, 0xFC):
        device.write(0, 1, value)
    assert told == ["panicked", "crash loaded", "panicked"]


@given(st.integers(-(1 << 64), 1 << 64), st.integers(-1, 16), st.integers(-(1 << 70), 1 << 70))
def test_any_access_is_harmless(offset: int, size: int, value: int) -> None:
    device, _ = port()
    device.write(offset, size, value)
    assert 0 <= device.read(offset, size) < 1 << 8 * max(size, 0)
