"""A keyboard and a mouse at the controller, as a driver finds them and a program uses them."""

from __future__ import annotations

import threading

import pytest

from tetrarch.devices import input_codes as codes
from tetrarch.devices.i8042 import I8042
from tetrarch.devices.input_user import InputUser
from tetrarch.devices.ps2_keyboard import KEYBOARD
from tetrarch.errors import ConfigError, StateError

AUX, TIMEOUT = 0x20, 0x40
ENABLED = 0x43
"""The command byte: both interrupts, both devices, translated."""


class Bench:
    def __init__(self, *, keyboard: bool = True, mouse: bool = True) -> None:
        self.lines = {1: False, 12: False}
        self.edges = {1: 0, 12: 0}
        self.device = I8042(
            lambda level: self.drive(1, level),
            lambda: None,
            lambda level: self.drive(12, level),
            keyboard=keyboard,
            mouse=mouse,
        )

    def drive(self, gsi: int, level: bool) -> None:
        self.edges[gsi] += level and not self.lines[gsi]
        self.lines[gsi] = level

    def command(self, value: int, data: int | None = None) -> None:
        self.device.status.write(0, 1, value)
        if data is not None:
            self.device.data.write(0, 1, data)

    def take(self) -> list[tuple[int, int]]:
        """What there is to read, each with the port that it is of: 1 or 2."""
        found = []
        while (status := self.device.status.read(0, 1)) & 1:
            assert not status & TIMEOUT
            port = 2 if status & AUX else 1
            assert self.lines[12 if port == 2 else 1]
            found.append((port, self.device.data.read(0, 1)))
        assert self.lines == {1: False, 12: False}
        return found

    def ask_keyboard(self, *values: int) -> list[int]:
        for value in values:
            self.device.data.write(0, 1, value)
        got = self.take()
        assert {port for port, _ in got} <= {1}
        return [value for _, value in got]

    def ask_mouse(self, *values: int) -> list[int]:
        for value in values:
            self.command(0xD4, value)
        got = self.take()
        assert {port for port, _ in got} <= {2}
        return [value for _, value in got]

    @property
    def keyboard(self) -> InputUser:
        assert self.device.keyboard is not None
        return self.device.keyboard

    @property
    def mouse(self) -> InputUser:
        assert self.device.mouse is not None
        return self.device.mouse


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.command(0x60, ENABLED)
    return bench


def test_keyboard_answers_its_commands(bench: Bench) -> None:
    bench.command(0x60, 0x03)  # not translated
    assert bench.ask_keyboard(0xFF) == [0xFA, 0xAA]
    assert bench.ask_keyboard(0xF2) == [0xFA, 0xAB, 0x83]
    assert bench.ask_keyboard(0xEE) == [0xEE]
    assert bench.ask_keyboard(0xF0, 0) == [0xFA, 0xFA, 2]
    assert bench.ask_keyboard(0xF0, 2) == [0xFA, 0xFA]
    assert bench.ask_keyboard(0xF0, 3) == [0xFA, 0xFE]
    assert bench.ask_keyboard(0xF3, 0x20) == [0xFA, 0xFA]
    assert bench.ask_keyboard(0xFE) == [0xFA]
    assert bench.ask_keyboard(0x00) == [0xFE]


def test_leds_are_those_that_the_guest_lit(bench: Bench) -> None:
    assert bench.keyboard.leds == frozenset()
    assert bench.ask_keyboard(0xED, 0x06) == [0xFA, 0xFA]
    assert bench.keyboard.leds == {"num", "caps"}


def test_keys_are_scan_codes_of_set_2(bench: Bench) -> None:
    bench.command(0x60, 0x03)
    assert bench.keyboard.key("leftctrl", "delete")
    assert [value for _, value in bench.take()] == [
        *(0x14, 0xE0, 0x71, 0xE0, 0xF0, 0x71, 0xF0, 0x14)
    ]
    assert bench.keyboard.press("pause")
    assert [value for _, value in bench.take()] == list(bytes.fromhex("e11477e1f014f077"))


def test_every_key_of_set_1_is_its_own_number(bench: Bench) -> None:
    """Linux numbers the keys of a PC by set 1, and the others by what is behind E0."""
    table = """
    kpenter 1c rightctrl 1d kpslash 35 sysrq 37 rightalt 38 home 47 up 48 pageup 49 left 4b
    right 4d end 4f down 50 pagedown 51 insert 52 delete 53 mute 20 volumedown 2e volumeup 30
    power 5e leftmeta 5b rightmeta 5c compose 5d sleep 5f wakeup 63
    """
    words = table.split()
    behind_e0 = {name: int(code, 16) for name, code in zip(words[::2], words[1::2], strict=True)}
    for name, number in KEYBOARD.keys.items():
        if number > 88 and name not in behind_e0:
            continue
        assert bench.keyboard.press(name)
        down = [value for _, value in bench.take()]
        assert bench.keyboard.release(name)
        up = [value for _, value in bench.take()]
        if name in behind_e0:
            assert (down, up) == ([0xE0, behind_e0[name]], [0xE0, behind_e0[name] | 0x80]), name
        else:
            assert (down, up) == ([number], [number | 0x80]), name
    assert set(range(1, 84)) <= set(KEYBOARD.keys.values())


def test_keyboard_that_is_off_drops_keys(bench: Bench) -> None:
    assert bench.ask_keyboard(0xF5) == [0xFA]
    assert not bench.keyboard.press("a")
    assert bench.take() == []
    assert bench.ask_keyboard(0xF4) == [0xFA]
    assert bench.keyboard.press("a")
    assert bench.take() == [(1, 0x1E)]


def test_disabled_port_keeps_keys_back(bench: Bench) -> None:
    bench.command(0xAD)
    assert bench.keyboard.press("a")
    assert bench.take() == []
    bench.command(0xAE)
    assert bench.take() == [(1, 0x1E)]


def test_each_byte_has_its_own_interrupt(bench: Bench) -> None:
    assert bench.keyboard.press("up")
    assert bench.edges == {1: 1, 12: 0}
    assert bench.take() == [(1, 0xE0), (1, 0x48)]
    assert bench.edges == {1: 2, 12: 0}


def test_typing_waits_until_the_guest_has_read(bench: Bench) -> None:
    text = "Hello, World! 0123456789" * 2
    got: list[int] = []

    total = sum(2 * len(codes.CHARACTERS[one]) for one in text)

    def read() -> None:
        while len(got) < total:
            if bench.device.status.read(0, 1) & 1:
                got.append(bench.device.data.read(0, 1))

    reader = threading.Thread(target=read)
    reader.start()
    bench.keyboard.type(text, timeout=60)
    reader.join(60)
    shift = False
    letters: list[str] = []
    by_key = {keys[-1]: one for one, keys in codes.CHARACTERS.items() if len(keys) == 1}
    shifted = {keys[-1]: one for one, keys in codes.CHARACTERS.items() if len(keys) == 2}
    names = {number: name for name, number in codes.KEYS.items()}
    while len(letters) < len(text):
        value = got.pop(0)
        if value & 0x7F == 0x2A:
            shift = value < 0x80
        elif value < 0x80:
            letters.append((shifted if shift else by_key)[names[value]])
    assert "".join(letters) == text


def test_too_many_keys_at_once_are_dropped_as_a_whole(bench: Bench) -> None:
    names = list(KEYBOARD.keys)[:60]
    assert bench.keyboard.press(*names)
    assert not bench.keyboard.press(*names)
    assert len(bench.take()) == 60
    with pytest.raises(ConfigError, match="a ps2-keyboard has no 'www'"):
        bench.keyboard.press("www")


def test_mouse_answers_its_commands(bench: Bench) -> None:
    bench.command(0xA9)
    assert bench.take() == [(1, 0)]
    assert bench.ask_mouse(0xFF) == [0xFA, 0xAA, 0]
    assert bench.ask_mouse(0xF2) == [0xFA, 0]
    assert bench.ask_mouse(0xE8, 3) == [0xFA, 0xFA]
    assert bench.ask_mouse(0xF3, 40) == [0xFA, 0xFA]
    assert bench.ask_mouse(0xE7, 0xE9) == [0xFA, 0xFA, 0x10, 3, 40]
    assert bench.ask_mouse(0xF6, 0xE9) == [0xFA, 0xFA, 0, 2, 100]
    assert bench.ask_mouse(0xF3, 77) == [0xFA, 0xFE]
    assert bench.ask_mouse(0xEE, 0x12, 0xF4, 0xEC) == [0xFA, 0x12, 0xF4, 0xFA]
    assert bench.ask_mouse(0xD0) == [0xFE]


def test_mouse_moves_and_clicks(bench: Bench) -> None:
    assert not bench.mouse.move(1, 1)  # it does not report yet
    assert bench.ask_mouse(0xF4) == [0xFA]
    assert bench.mouse.move(5, 3)
    assert bench.take() == [(2, 0x28), (2, 5), (2, 0xFD)]  # 3 down
    assert bench.mouse.press("left", "middle")
    assert bench.take() == [(2, 0x0D), (2, 0), (2, 0)]
    assert bench.ask_mouse(0xE9) == [0xFA, 0x26, 2, 100]
    assert bench.mouse.release("left")
    assert bench.take() == [(2, 0x0C), (2, 0), (2, 0)]
    # Farther than a packet goes.
    assert bench.mouse.move(-300, 0)
    assert bench.take() == [(2, 0x1C), (2, 0), (2, 0), (2, 0x1C), (2, 0xD4), (2, 0)]


def test_mouse_with_a_wheel_and_five_buttons(bench: Bench) -> None:
    rates = [0xF3, 200, 0xF3, 100, 0xF3, 80]
    assert bench.ask_mouse(*rates, 0xF2) == [0xFA] * 7 + [3]
    bench.ask_mouse(0xF4)
    assert bench.mouse.scroll(2)
    assert bench.take() == [(2, 0x08), (2, 0), (2, 0), (2, 0xFE)]
    rates = [0xF3, 200, 0xF3, 200, 0xF3, 80]
    assert bench.ask_mouse(*rates, 0xF2) == [0xFA] * 7 + [4]
    assert bench.mouse.press("side")
    assert bench.take() == [(2, 0x08), (2, 0), (2, 0), (2, 0x10)]
    assert bench.ask_mouse(0xFF, 0xF2) == [0xFA, 0xAA, 0, 0xFA, 0]


def test_absurd_movement_is_dropped(bench: Bench) -> None:
    bench.ask_mouse(0xF4)
    assert not bench.mouse.move(1 << 30, 0)
    assert bench.take() == []


def test_saved_controller_has_what_was_typed(bench: Bench) -> None:
    bench.ask_mouse(0xF4)
    bench.keyboard.key("a")
    bench.mouse.move(1, 0)
    other = Bench()
    other.device.load(bench.device.save())
    assert sorted(other.take()) == sorted([(1, 0x1E), (1, 0x9E), (2, 8), (2, 1), (2, 0)])
    with pytest.raises(StateError, match="another keyboard or mouse"):
        Bench(mouse=False).device.load(bench.device.save())


def test_reset_forgets_them(bench: Bench) -> None:
    bench.ask_mouse(0xF4)
    bench.keyboard.key("a")
    bench.device.reset()
    assert bench.take() == []
    assert not bench.mouse.move(1, 0)
