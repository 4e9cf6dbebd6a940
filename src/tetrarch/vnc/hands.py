"""What viewers do with a machine's keyboard and pointer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final, Protocol

from tetrarch.devices import input_codes as codes
from tetrarch.devices.input_user import ABS_MAX, Event, InputUser
from tetrarch.vnc.keys import SHIFT_KEYS, key_of_keysym, key_of_scan_code

__all__ = ["Hands", "Pointer", "ViewerHands"]

#: How long a viewer waits for its guest to take a key; while the guest takes none, the next ones
#: are tried once.
_PATIENCE_S: Final = 1.0

#: Buttons by their bits (RFC 6143, 7.5.5): left, middle, right, four of wheels, back, forward.
_BUTTONS: Final = {
    0: codes.BUTTONS["left"],
    1: codes.BUTTONS["middle"],
    2: codes.BUTTONS["right"],
    7: codes.BUTTONS["side"],
    8: codes.BUTTONS["extra"],
}
_WHEELS: Final = {
    3: (codes.REL_WHEEL, 1),
    4: (codes.REL_WHEEL, -1),
    5: (codes.REL_HWHEEL, -1),
    6: (codes.REL_HWHEEL, 1),
}
_CAPS_LETTERS: Final = frozenset(codes.KEYS[letter] for letter in "abcdefghijklmnopqrstuvwxyz")


class Pointer(Protocol):
    """A pointer that is at a place of the screen, beside those of ``Machine.inputs``."""

    def point(self, x: int, y: int, buttons: int, wheel: int) -> bool:
        """Coordinates are of 0 to ABS_MAX; ``buttons`` has a bit for the left, the middle and the
        right one, ``wheel`` are notches upwards. False where the guest does not use it."""


class Hands:
    """Those of all viewers of a machine: they share its devices. From any thread."""

    def __init__(
        self,
        inputs: Sequence[InputUser],
        pointers: Sequence[Pointer] = (),
        patience: float = _PATIENCE_S,
    ) -> None:
        by_model = {
            model: [one for one in inputs if one.model == model] for model in _KEYBOARDS + _POINTERS
        }
        self._keyboards = [one for model in _KEYBOARDS for one in by_model[model]]
        self._pointers = [one for model in _POINTERS for one in by_model[model]]
        self._at_places = tuple(pointers)
        self._patience = patience
        # Guards the rest, and keeps what a viewer sends at once together.
        self._lock = threading.RLock()
        self._down: dict[int, InputUser] = {}
        """Keys that are down, and where."""
        self._patient = True
        """The guest has taken the last key."""
        self._buttons: dict[InputUser, int] = {}
        """Those that each device has down."""

    def key(self, code: int, down: bool) -> None:
        with self._lock:
            event = (codes.EV_KEY, code, int(down))
            if not down:
                keyboard = self._down.pop(code, None)
                if keyboard is not None:
                    self._send_key(keyboard, event)
                return
            if (keyboard := self._down.get(code)) is not None:
                # A viewer repeats it. So does a guest by itself, but for keyboards of this kind.
                if keyboard.model == "ps2-keyboard":
                    keyboard.offer([event], 0.0)
                return
            for keyboard in self._keyboards:
                if keyboard.has_key(code) and self._send_key(keyboard, event):
                    self._down[code] = keyboard
                    return

    def _send_key(self, keyboard: InputUser, event: Event) -> bool:
        last = keyboard is self._keyboards[-1]
        taken = keyboard.offer([event], self._patience if self._patient and last else 0.0)
        if last:
            self._patient = taken
        return taken

    def keysym(self, keysym: int, down: bool) -> int | None:
        """The key of a character is pressed, with Shift as it needs it; which one it was."""
        found = key_of_keysym(keysym)
        if found is None:
            return None
        code, shifted = found
        with self._lock:
            held = [key for key in SHIFT_KEYS if key in self._down]
            if not down or shifted is None or (bool(held) ^ self._locked(code)) == shifted:
                self.key(code, down)
                return code
            turned = held or [codes.KEYS["leftshift"]]
            for key in turned:
                self.key(key, not held)
            self.key(code, down)
            for key in turned:
                self.key(key, bool(held))
        return code

    def _locked(self, code: int) -> bool:
        """Whether the key gives the other character, since Caps Lock is on."""
        return code in _CAPS_LETTERS and any("caps" in one.leds for one in self._keyboards)

    def point(self, x: int, y: int, buttons: int, moved: tuple[int, int], notches: int) -> None:
        """At a place of 0 to ABS_MAX, which is so far from the last one in points of the screen.
        Of ``buttons`` the bits are as in a message; ``notches`` are those of wheels, moved on."""
        with self._lock:
            up = (notches >> 3 & 1) - (notches >> 4 & 1)
            if any(one.point(x, y, buttons & 7, up) for one in self._at_places):
                return
            for device in self._pointers:
                if self._point(device, x, y, buttons, moved, notches):
                    return

    def _point(
        self,
        device: InputUser,
        x: int,
        y: int,
        buttons: int,
        moved: tuple[int, int],
        notches: int,
    ) -> bool:
        if device.model == "tablet":
            events = [(codes.EV_ABS, codes.ABS_X, x), (codes.EV_ABS, codes.ABS_Y, y)]
        else:
            axes = zip((codes.REL_X, codes.REL_Y), moved, strict=True)
            events = [(codes.EV_REL, axis, way) for axis, way in axes if way]
        pressed = self._buttons.get(device, 0) ^ buttons
        for bit, code in _BUTTONS.items():
            if pressed >> bit & 1:
                events.append((codes.EV_KEY, code, buttons >> bit & 1))
        for bit, (axis, way) in _WHEELS.items():
            if notches >> bit & 1 and not (device.model == "ps2-mouse" and axis != codes.REL_WHEEL):
                events.append((codes.EV_REL, axis, way))
        if not events:
            return True
        # A movement that is lost is followed by another one, but not a click.
        patience = self._patience / 4 if pressed and device is self._pointers[-1] else 0.0
        if not device.offer(events, patience):
            return False
        self._buttons[device] = buttons
        return True


_KEYBOARDS: Final = ("keyboard", "ps2-keyboard")
_POINTERS: Final = ("tablet", "mouse", "ps2-mouse")


class ViewerHands:
    """Those of one viewer, who lets go of all when it goes."""

    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._down: dict[int, int] = {}
        """What a viewer calls a key that it has down, and the key: Shift may change meanwhile."""
        self._at: tuple[int, int] | None = None
        self._size = 1, 1
        self._buttons = 0

    def key(self, keysym: int, down: bool, scan_code: int | None = None) -> None:
        code = None if scan_code is None else key_of_scan_code(scan_code)
        if code is not None:
            self._hands.key(code, down)
            self._remember(-code, code, down)
        elif not down and keysym in self._down:
            self._hands.key(self._down.pop(keysym), False)
        elif (found := self._hands.keysym(keysym, down)) is not None:
            self._remember(keysym, found, down)

    def _remember(self, name: int, code: int, down: bool) -> None:
        if down:
            self._down[name] = code
        else:
            self._down.pop(name, None)

    def point(self, x: int, y: int, size: tuple[int, int], buttons: int) -> None:
        """At a point of a screen of this size."""
        width, height = size
        x, y = min(x, width - 1), min(y, height - 1)
        last = self._at or (x, y)
        self._at, self._size = (x, y), size
        notches, self._buttons = buttons & ~self._buttons, buttons
        across, down = x * ABS_MAX // max(1, width - 1), y * ABS_MAX // max(1, height - 1)
        self._hands.point(across, down, buttons, (x - last[0], y - last[1]), notches)

    def let_go(self) -> None:
        for code in self._down.values():
            self._hands.key(code, False)
        self._down.clear()
        if self._buttons and self._at is not None:
            self.point(*self._at, self._size, 0)
