"""The keyboard controller: Linux's probe, and reset."""

import pytest

from tetrarch.devices.i8042 import I8042


class Bench:
    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.resets = 0
        self.device = I8042(self.levels.append, self._reset)

    def _reset(self) -> None:
        self.resets += 1

    @property
    def status(self) -> int:
        return self.device.status.read(0, 1)

    @property
    def data(self) -> int:
        return self.device.data.read(0, 1)

    def command(self, value: int, data: int | None = None) -> None:
        self.device.status.write(0, 1, value)
        if data is not None:
            self.device.data.write(0, 1, data)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_controller_is_idle_and_unlocked_at_start(bench: Bench) -> None:
    assert bench.status & 0x03 == 0
    assert bench.status & 0x10


def test_self_test_and_port_test_pass(bench: Bench) -> None:
    bench.command(0xAA)
    assert bench.status & 1
    assert bench.data == 0x55
    bench.command(0xAB)
    assert bench.data == 0
    assert not bench.status & 1


def test_command_byte_is_kept(bench: Bench) -> None:
    bench.command(0x60, 0x74)
    bench.command(0x20)
    assert bench.data == 0x74


def test_aux_loop_answers_as_a_controller_without_aux_port(bench: Bench) -> None:
    bench.command(0xD3, 0x5A)
    assert bench.status & 0x21 == 0x01
    assert bench.data == 0x5A
    bench.command(0xA9)
    assert bench.data not in (0x00, 0xFA, 0xFF)


def test_absent_keyboard_fails_at_once_with_an_interrupt(bench: Bench) -> None:
    bench.command(0x60, 0x05)
    bench.device.data.write(0, 1, 0xF2)  # identify
    assert bench.levels[-1] is True
    assert bench.status & 0x41 == 0x41
    assert bench.data == 0xFE
    assert bench.levels[-1] is False


def test_each_queued_byte_has_its_own_edge(bench: Bench) -> None:
    bench.device.data.write(0, 1, 0xF2)
    bench.device.data.write(0, 1, 0xF2)
    assert bench.levels == [True]
    assert bench.data == 0xFE
    assert bench.levels == [True, False, True]
    assert bench.data == 0xFE
    assert bench.levels == [True, False, True, False]


def test_no_interrupt_while_disabled(bench: Bench) -> None:
    bench.command(0x60, 0x04)
    bench.device.data.write(0, 1, 0xF2)
    assert bench.levels == []


@pytest.mark.parametrize("command", [0xFE, 0xF0])
def test_pulse_of_the_reset_line_resets(bench: Bench, command: int) -> None:
    bench.command(command)
    assert bench.resets == 1


@pytest.mark.parametrize("command", [0xFF, 0xFD])
def test_pulse_of_other_lines_does_not(bench: Bench, command: int) -> None:
    bench.command(command)
    assert bench.resets == 0


def test_output_port_can_reset_and_a20_stays_open(bench: Bench) -> None:
    bench.command(0xD1, 0xDD)
    assert bench.resets == 0
    bench.command(0xD0)
    assert bench.data & 0x02
    bench.command(0xD1, 0xFE)
    assert bench.resets == 1


def test_flood_of_commands_is_bounded(bench: Bench) -> None:
    for _ in range(1000):
        bench.command(0xAB)
    assert len(bench.device.save()["answers"]) <= 16


def test_saved_state_continues_where_it_was(bench: Bench) -> None:
    bench.command(0x60, 0x01)
    bench.device.data.write(0, 1, 0xED)
    other = Bench()
    other.device.load(bench.device.save())
    assert other.levels == [True]
    assert other.status & 0x41 == 0x41
    assert other.data == 0xFE
