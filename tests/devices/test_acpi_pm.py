"""ACPI fixed hardware, reset register, port 0x92 and debug exit."""

import pytest

from tetrarch.devices.acpi_pm import AcpiPm
from tetrarch.devices.debug_exit import DebugExit
from tetrarch.devices.port_92 import Port92
from tetrarch.devices.reset_cf9 import ResetCf9

STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8


class Bench:
    def __init__(self) -> None:
        self.now = 0
        self.levels: list[bool] = []
        self.poweroffs = 0
        self.device = AcpiPm(self.levels.append, lambda: self.now, self._poweroff)

    def _poweroff(self) -> None:
        self.poweroffs += 1

    def get(self, offset: int, size: int = 2) -> int:
        return self.device.read(offset, size)

    def put(self, offset: int, value: int, size: int = 2) -> None:
        self.device.write(offset, size, value)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_timer_counts_at_its_rate_and_wraps(bench: Bench) -> None:
    bench.now = 1_000_000_000
    assert bench.get(TIMER, 4) == 3_579_545
    bench.now = 3600 * 1_000_000_000
    assert bench.get(TIMER, 4) == 3600 * 3_579_545 % (1 << 32)


def test_timer_event_comes_with_the_top_bit(bench: Bench) -> None:
    bench.now = 500 * 1_000_000_000
    assert not bench.get(STATUS) & 1
    bench.now = 700 * 1_000_000_000
    assert bench.get(STATUS) & 1


def test_machine_is_in_acpi_mode_and_stays(bench: Bench) -> None:
    assert bench.get(CONTROL) & 1
    bench.put(CONTROL, 0)
    assert bench.get(CONTROL) & 1


def test_soft_off_powers_off_once(bench: Bench) -> None:
    bench.put(CONTROL, 5 << 10)
    assert bench.poweroffs == 0
    bench.put(CONTROL, 5 << 10 | 1 << 13)
    assert bench.poweroffs == 1
    assert not bench.get(CONTROL) & 1 << 13


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 6, 7])
def test_other_sleep_states_do_nothing(bench: Bench, kind: int) -> None:
    bench.put(CONTROL, kind << 10 | 1 << 13)
    assert bench.poweroffs == 0


def test_power_button_raises_the_sci_until_it_is_cleared(bench: Bench) -> None:
    bench.put(ENABLE, 1 << 8)
    bench.device.press_power_button()
    assert bench.levels == [True]
    assert bench.get(STATUS) == 1 << 8
    bench.put(STATUS, 1 << 8)
    assert bench.levels == [True, False]
    assert bench.get(STATUS) == 0


def test_button_pressed_while_disabled_waits_for_the_enable(bench: Bench) -> None:
    bench.device.press_power_button()
    assert bench.levels == []
    bench.put(ENABLE, 1 << 8)
    assert bench.levels == [True]


def test_status_and_enable_as_one_double_word(bench: Bench) -> None:
    bench.device.press_power_button()
    bench.put(STATUS, 1 << 24, size=4)
    assert bench.get(STATUS, 4) == 1 << 24 | 1 << 8


def test_saved_state_continues_where_it_was(bench: Bench) -> None:
    bench.put(ENABLE, 1 << 8)
    bench.device.press_power_button()
    other = Bench()
    other.device.load(bench.device.save())
    assert other.levels == [True]


def test_reset_register_resets_with_the_value_of_the_fadt() -> None:
    resets: list[int] = []
    device = ResetCf9(lambda: resets.append(1))
    device.write(0, 1, 0x02)
    assert resets == []
    assert device.read(0, 1) == 0x02
    device.write(0, 1, 0x06)
    assert resets == [1]


def test_debug_exit_reports_the_value() -> None:
    values: list[int] = []
    device = DebugExit(values.append)
    device.write(0, 4, 0x1234_5678)
    device.write(0, 1, 0x1FF)
    assert values == [0x1234_5678, 0xFF]


def test_port_92_resets_on_the_rising_edge_of_init_and_reads_back() -> None:
    resets: list[int] = []
    device = Port92(lambda: resets.append(1))
    assert device.read(0, 1) == 0x02, "A20 is open"
    device.write(0, 1, 0x00)
    assert device.read(0, 1) == 0x00
    device.write(0, 1, 0xFE)
    assert (device.read(0, 1), resets) == (0x02, [])
    device.write(0, 1, 0x03)
    device.write(0, 1, 0x03)
    assert (device.read(0, 1), resets) == (0x03, [1])
    device.write(0, 1, 0x02)
    device.write(0, 1, 0x03)
    assert resets == [1, 1]
