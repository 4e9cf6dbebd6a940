"""What a program does with a keyboard, mouse or tablet of its guest, however that is attached."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from tetrarch.devices import input_codes as codes
from tetrarch.errors import ConfigError

__all__ = ["ABS_MAX", "Event", "InputModel", "InputUser"]

#: Both coordinates of a tablet go from 0 to this.
ABS_MAX: Final = 0x7FFF
_INT32: Final = range(-(1 << 31), 1 << 31)

Event = tuple[int, int, int]
"""Type, code, value."""


@dataclass(frozen=True)
class InputModel:
    """What makes a device a keyboard, a mouse or a tablet."""

    keys: Mapping[str, int]
    bits: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Codes of the events other than keys that it has, by type."""

    def codes(self, type_: int) -> Iterable[int]:
        return self.keys.values() if type_ == codes.EV_KEY else self.bits.get(type_, ())


class InputUser(ABC):
    """A device of ``Machine.inputs``. Its methods may be called from any thread.

    Those that send give False where the report was dropped: the guest has no driver for the
    device, or does not take what it has got. ConfigError: this model has no such key or axis.
    """

    def __init__(self, model: str, what: InputModel, lock: threading.Lock) -> None:
        """``model`` is its name as the option ``input`` has it; ``lock`` is the device's."""
        self.model = model
        self._model = what
        self._lock = lock
        self._moved_on = threading.Condition(lock)
        """To be told when there is room again for what is sent."""

    @property
    @abstractmethod
    def leds(self) -> frozenset[str]:
        """Those that the guest has lit: of "num", "caps", "scroll"."""

    @abstractmethod
    def _admit(self, events: Sequence[Event]) -> bool:
        """Takes all of them, or none. The lock is held."""

    def _sent(self) -> None:  # noqa: B027 - most have nothing to do
        """After something was taken, without the lock."""

    def press(self, *keys: str) -> bool:
        """Keys or buttons go down, in one report, and stay there. Names are those of Linux
        (devices/input_codes.py): "a", "enter", "leftctrl"; "left", "middle", "right"."""
        return self.send(*self._keys(keys, 1))

    def release(self, *keys: str) -> bool:
        return self.send(*self._keys(keys, 0))

    def key(self, *keys: str) -> bool:
        """Keys go down one after the other and up again, the last first: ("leftctrl", "c")."""
        return self._offer(self._stroke(keys))

    def type(self, text: str, timeout: float = 30.0) -> None:
        """The characters of a keyboard of the United States, each as ``key()`` sends it.

        Raises TimeoutError where the guest does not take them for ``timeout`` seconds.
        """
        for character in text:
            if character not in codes.CHARACTERS:
                raise ConfigError(
                    f"no key gives {character!r}", mend="type ASCII, or press keys by their names"
                )
        for character in text:
            events = self._stroke(codes.CHARACTERS[character])
            with self._moved_on:
                if not self._moved_on.wait_for(partial(self._admit, events), timeout):
                    raise TimeoutError(f"the guest has not taken the keys within {timeout:g} s")
            self._sent()

    def move(self, x: int, y: int) -> bool:
        """A mouse goes this far to the right and down; a tablet's pen is at this place, of 0 to
        ABS_MAX each."""
        if codes.EV_ABS in self._model.bits:
            return self.send((codes.EV_ABS, codes.ABS_X, x), (codes.EV_ABS, codes.ABS_Y, y))
        return self.send((codes.EV_REL, codes.REL_X, x), (codes.EV_REL, codes.REL_Y, y))

    def scroll(self, up: int, right: int = 0) -> bool:
        """Notches of the wheel."""
        vertical = (codes.EV_REL, codes.REL_WHEEL, up)
        horizontal = (codes.EV_REL, codes.REL_HWHEEL, right)
        return self.send(*(event for event in (vertical, horizontal) if event[2]))

    def send(self, *events: Event) -> bool:
        """One report of events as (type, code, value); its SYN_REPORT is added."""
        for event in events:
            self._check(event)
        return self._offer(_report(events))

    def has_key(self, code: int) -> bool:
        """Whether it has a key or button of this number."""
        return code in self._model.keys.values()

    def offer(self, events: Sequence[Event], timeout: float) -> bool:
        """As ``send``, and waits until the guest has taken what it has got; so long at most."""
        report = _report(events)
        with self._moved_on:
            taken = self._moved_on.wait_for(partial(self._admit, report), timeout)
        self._sent()
        return taken

    def _keys(self, names: Iterable[str], value: int) -> list[Event]:
        return [(codes.EV_KEY, self._code(name), value) for name in names]

    def _code(self, name: str) -> int:
        if (code := self._model.keys.get(name)) is None:
            raise ConfigError(
                f"a {self.model} has no {name!r}", mend="take a name of devices/input_codes.py"
            )
        return code

    def _stroke(self, keys: Sequence[str]) -> list[Event]:
        down, up = self._keys(keys, 1), self._keys(reversed(keys), 0)
        return [event for one in (*down, *up) for event in _report([one])]

    def _check(self, event: Event) -> None:
        type_, code, value = event
        if type_ in (codes.EV_LED, codes.EV_REP) or code not in self._model.codes(type_):
            raise ConfigError(
                f"a {self.model} has no event of type {type_:#x} with code {code:#x}",
                mend="send what it has",
            )
        if value not in (range(ABS_MAX + 1) if type_ == codes.EV_ABS else _INT32):
            raise ConfigError(
                f"an event's value is {value}",
                mend=f"give 0 to {ABS_MAX} to a tablet, and 32 bits to others",
            )

    def _offer(self, events: Sequence[Event]) -> bool:
        with self._lock:
            taken = self._admit(events)
        self._sent()
        return taken


def _report(events: Iterable[Event]) -> list[Event]:
    """Nothing of nothing."""
    found = list(events)
    return [*found, (codes.EV_SYN, codes.SYN_REPORT, 0)] if found else []
