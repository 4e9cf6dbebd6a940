"""Keys and pointers of viewers, as devices of the guest get them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from tetrarch.devices import input_codes as codes
from tetrarch.devices.input_codes import KEYS
from tetrarch.devices.input_user import ABS_MAX, Event, InputUser
from tetrarch.devices.ps2_keyboard import KEYBOARD
from tetrarch.devices.ps2_mouse import MOUSE
from tetrarch.virtio.input import MODELS
from tetrarch.vnc.hands import Hands, ViewerHands
from tetrarch.vnc.keys import key_of_keysym, key_of_scan_code

A, ONE, SHIFT, RIGHT_SHIFT = KEYS["a"], KEYS["1"], KEYS["leftshift"], KEYS["rightshift"]
NAMES = {code: name for name, code in KEYS.items()}
SHIFT_SYM, RETURN_SYM = 0xFFE1, 0xFF0D


class Device(InputUser):
    """One that keeps what it gets, or takes nothing."""

    def __init__(self, model: str, *, takes: bool = True) -> None:
        what = {"ps2-keyboard": KEYBOARD, "ps2-mouse": MOUSE}.get(model) or MODELS[model]
        super().__init__(model, what, threading.Lock())
        self.takes = takes
        self.got: list[Event] = []
        self.lit: frozenset[str] = frozenset()

    @property
    def leds(self) -> frozenset[str]:
        return self.lit

    def _admit(self, events: Sequence[Event]) -> bool:
        if self.takes:
            self.got += [event for event in events if event[0] != codes.EV_SYN]
        return self.takes

    @property
    def keys(self) -> str:
        """With + and -, which are of those that were sent since this was asked last."""
        said = [f"{'+' if down else '-'}{NAMES[code]}" for _, code, down in self.got]
        self.got.clear()
        return " ".join(said)


def viewer(*devices: InputUser) -> ViewerHands:
    return ViewerHands(Hands(devices))


def test_shift_goes_with_the_character() -> None:
    keyboard = Device("ps2-keyboard")
    hands = viewer(keyboard)
    for keysym in (ord("A"), ord("a"), ord(" "), RETURN_SYM):
        hands.key(keysym, True)
        hands.key(keysym, False)
    assert keyboard.keys == "+leftshift +a -leftshift -a +a -a +space -space +enter -enter"
    hands.key(SHIFT_SYM, True)
    for keysym in (ord("A"), ord("1"), ord("!"), RETURN_SYM):
        hands.key(keysym, True)
        hands.key(keysym, False)
    hands.key(SHIFT_SYM, False)
    assert keyboard.keys == (
        "+leftshift +a -a -leftshift +1 +leftshift -1 +1 -1 +enter -enter -leftshift"
    )


def test_caps_lock_of_the_guest_turns_letters_alone() -> None:
    keyboard = Device("ps2-keyboard")
    keyboard.lit = frozenset({"caps"})
    hands = viewer(keyboard)
    for keysym in (ord("A"), ord("a"), ord("1")):
        hands.key(keysym, True)
        hands.key(keysym, False)
    assert keyboard.keys == "+a -a +leftshift +a -leftshift -a +1 -1"


def test_key_that_is_released_is_the_one_that_was_pressed() -> None:
    keyboard = Device("ps2-keyboard")
    hands = viewer(keyboard)
    hands.key(SHIFT_SYM, True)
    hands.key(ord("!"), True)
    hands.key(SHIFT_SYM, False)
    hands.key(ord("1"), False)  # as viewers call it now
    assert keyboard.keys == "+leftshift +1 -leftshift -1"


def test_repeated_keys_are_for_keyboards_whose_guest_does_not_repeat() -> None:
    old, new = Device("ps2-keyboard"), Device("keyboard")
    for keyboard, said in ((old, "+a +a -a"), (new, "+a -a")):
        hands = viewer(keyboard)
        hands.key(ord("a"), True)
        hands.key(ord("a"), True)
        hands.key(ord("a"), False)
        assert keyboard.keys == said


def test_keyboard_that_the_guest_has_a_driver_for_gets_the_keys() -> None:
    virtio, ps2 = Device("keyboard", takes=False), Device("ps2-keyboard")
    hands = viewer(ps2, virtio)
    hands.key(ord("a"), True)
    virtio.takes = True
    hands.key(ord("a"), False)
    hands.key(ord("b"), True)
    assert (virtio.keys, ps2.keys) == ("+b", "+a -a")


def test_who_goes_lets_go_of_all() -> None:
    keyboard, tablet = Device("keyboard"), Device("tablet")
    hands = viewer(keyboard, tablet)
    hands.key(0xFFE3, True)
    hands.key(0, True, 0xD3)
    hands.point(5, 5, (640, 400), 1)
    tablet.got.clear()
    assert keyboard.keys == "+leftctrl +delete"
    hands.let_go()
    assert keyboard.keys == "-leftctrl -delete"
    assert (codes.EV_KEY, codes.BUTTONS["left"], 0) in tablet.got


def test_guest_that_takes_nothing_costs_a_moment_once() -> None:
    keyboard = Device("ps2-keyboard", takes=False)
    hands = viewer(keyboard)
    for _ in range(200):
        hands.key(ord("a"), True)
        hands.key(ord("a"), False)
    keyboard.takes = True
    hands.key(ord("b"), True)
    assert keyboard.keys == "+b"


def test_pointer_is_at_a_place_of_a_tablet() -> None:
    tablet, mouse = Device("tablet"), Device("ps2-mouse")
    hands = viewer(mouse, tablet)
    hands.point(639, 0, (640, 400), 0)
    hands.point(9999, 399, (640, 400), 4)
    hands.point(0, 0, (640, 400), 8)
    absolute, x, y = codes.EV_ABS, codes.ABS_X, codes.ABS_Y
    assert tablet.got == [
        *((absolute, x, ABS_MAX), (absolute, y, 0)),
        *((absolute, x, ABS_MAX), (absolute, y, ABS_MAX)),
        (codes.EV_KEY, codes.BUTTONS["right"], 1),
        *((absolute, x, 0), (absolute, y, 0)),
        (codes.EV_KEY, codes.BUTTONS["right"], 0),
        (codes.EV_REL, codes.REL_WHEEL, 1),
    ]
    assert mouse.got == []


def test_mouse_goes_as_far_as_the_pointer_has() -> None:
    tablet, mouse = Device("tablet", takes=False), Device("ps2-mouse")
    hands = viewer(mouse, tablet)
    hands.point(100, 100, (640, 400), 0)
    hands.point(110, 90, (640, 400), 1)
    hands.point(110, 90, (640, 400), 1 | 1 << 4)
    hands.point(110, 90, (640, 400), 1 << 6)
    assert mouse.got == [
        *((codes.EV_REL, codes.REL_X, 10), (codes.EV_REL, codes.REL_Y, -10)),
        (codes.EV_KEY, codes.BUTTONS["left"], 1),
        (codes.EV_REL, codes.REL_WHEEL, -1),
        (codes.EV_KEY, codes.BUTTONS["left"], 0),
    ]


def test_click_that_was_not_taken_comes_later() -> None:
    mouse = Device("mouse", takes=False)
    hands = viewer(mouse)
    hands.point(1, 1, (640, 400), 1)
    mouse.takes = True
    hands.point(1, 2, (640, 400), 1)
    assert (codes.EV_KEY, codes.BUTTONS["left"], 1) in mouse.got


@pytest.mark.parametrize("character", [chr(code) for code in range(0x20, 0x7F)])
def test_each_character_has_a_key(character: str) -> None:
    found = key_of_keysym(ord(character))
    assert found is not None
    code, shifted = found
    keys = codes.CHARACTERS[character]
    assert code == KEYS[keys[-1]]
    assert shifted == (None if character == " " else keys[0] == "leftshift")
    assert key_of_keysym(0x0100_0000 + ord(character)) == found


@pytest.mark.parametrize(
    ("keysym", "name"),
    [
        *((0xFF08, "backspace"), (0xFF1B, "esc"), (0xFFFF, "delete"), (0xFF52, "up")),
        *((0xFFBE, "f1"), (0xFFC9, "f12"), (0xFFE4, "rightctrl"), (0xFFEB, "leftmeta")),
        *((0xFFB7, "kp7"), (0xFF95, "kp7"), (0xFE03, "rightalt"), (0xFF8D, "kpenter")),
    ],
)
def test_keys_without_a_character_have_names(keysym: int, name: str) -> None:
    assert key_of_keysym(keysym) == (KEYS[name], None)


@pytest.mark.parametrize("keysym", [0, 0x1F, 0x7F, 0xE4, 0xFF00, 0xFE00, 0x0100_00E4, 0xFFFF_FFFF])
def test_what_no_key_gives_is_none(keysym: int) -> None:
    assert key_of_keysym(keysym) is None
    Hands([]).keysym(keysym, True)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        *((0x01, "esc"), (0x1E, "a"), (0x53, "kpdot"), (0x56, "102nd"), (0x58, "f12")),
        *((0x9D, "rightctrl"), (0xC8, "up"), (0xD3, "delete"), (0xC6, "pause"), (0x54, "sysrq")),
    ],
)
def test_scan_codes_are_keys(code: int, name: str) -> None:
    assert key_of_scan_code(code) == KEYS[name]


@pytest.mark.parametrize("code", [0, 0x55, 0x80, 0xFF, 0xFFFF_FFFF])
def test_scan_codes_that_no_key_has_are_none(code: int) -> None:
    assert key_of_scan_code(code) is None
