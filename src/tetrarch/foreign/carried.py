"""What of another monitor's machine becomes one of ours, and what does not.

Each value is checked alone when it is carried over, so one that cannot be is named, and the rest
is a machine still.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tetrarch.errors import ConfigError, ValueProblem
from tetrarch.machine.config import MachineConfig, make_config
from tetrarch.machine.config_file import relative_to
from tetrarch.machine.config_tables import as_text
from tetrarch.machine.config_text import lines_for, toml_text
from tetrarch.net.spec import NetModel

__all__ = ["CARDS", "Carried", "NotCarried", "shown"]

#: Network cards by their names elsewhere, in small letters, and the models that they are here. A
#: guest has one driver for all e1000 of PCI; e1000e is another.
CARDS: Final[Mapping[str, NetModel]] = {
    "vmxnet3": "vmxnet3",
    "e1000": "e1000",
    "e1000-82540em": "e1000",
    "e1000-82544gc": "e1000",
    "e1000-82545em": "e1000",
}

#: Of one thing that is named in a message.
_SHOWN_MAX = 100
#: Of UTF-16, as JSON's escapes can write them.
_HALVES = re.compile("[\ud800-\udfff]")
#: Of all things together; more are counted.
_NAMED_MAX = 500


class NotCarried(NamedTuple):
    """Something that this machine has not, or that makes no sense here."""

    what: str
    why: str = ""
    times: int = 1

    def __str__(self) -> str:
        times = f" ({self.times} times)" if self.times > 1 else ""
        return f"{self.what}{times}: {self.why}" if self.why else f"{self.what}{times}"


class Carried:
    """A configuration that grows while another monitor's is read."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._sources: dict[str, list[str]] = {}
        self._lost: Counter[tuple[str, str]] = Counter()

    def set(self, name: str, value: object, source: str) -> None:
        """An option that has one value. ``source`` is where it stands, for people."""
        if isinstance(value, str) and _HALVES.search(value):
            self.lose(source, "it is no text")
        elif self._checked(name, value, source):
            self._values[name] = value
            self._sources[name] = [source]

    def add(self, name: str, value: str | Mapping[str, Any], source: str) -> None:
        """One more value of an option that can be repeated; a table as in a file for --config."""
        try:
            text = value if isinstance(value, str) else as_text(name, dict(value))
        except ValueProblem as problem:
            self.lose(source, problem.cause)
            return
        if _HALVES.search(text):
            self.lose(source, "it is no text")
            return
        several = [*self._values.get(name, []), text]
        if self._checked(name, several, source):
            self._values[name] = several
            self._sources.setdefault(name, []).append(source)

    def add_firmware(self, path: str, source: str) -> None:
        """What starts before the guest: an image, then the file of its variables."""
        named = path.replace(",", ",,")
        before = self._values.get("firmware")
        if before is None:
            self.set("firmware", named, source)
        elif ",variables=" in before:
            self.lose(source, "there is one image of firmware, with one file of variables")
        elif self._checked("firmware", text := f"{before},variables={named}", source):
            self._values["firmware"] = text
            self._sources["firmware"].append(source)

    def has(self, name: str) -> bool:
        return name in self._values

    def lose(self, what: str, why: str = "") -> None:
        self._lost[shown(what), shown(why)] += 1

    def lose_keys(self, of: str, keys: Mapping[str, object], why: str = "") -> None:
        """What is left of something whose other parts were carried over."""
        if keys:
            self.lose(f"{of}: {', '.join(f'{key}={value}' for key, value in keys.items())}", why)

    @property
    def lost(self) -> list[NotCarried]:
        """In the order in which they were met; each thing once."""
        named = [NotCarried(*what, times) for what, times in self._lost.items()]
        if len(named) > _NAMED_MAX:
            named[_NAMED_MAX:] = [NotCarried(f"{len(named) - _NAMED_MAX} more things")]
        return named

    def finish(self, directory: Path) -> MachineConfig:
        """The machine, with paths that were relative to ``directory``.

        Raises ConfigError where there is nothing that could run.
        """
        if self._values.get("virtio") == "mmio" and self._values.pop("firmware", None) is not None:
            self.lose(" ".join(self._sources.pop("firmware")), "it finds no virtio by MMIO")
        if not self.has("kernel"):
            if not self.has("disk") and not self.has("cdrom"):
                raise ConfigError(
                    "nothing is left to run: neither a kernel nor a disk was carried over",
                    mend="name one there",
                )
            by_firmware = self.has("firmware")
            if not by_firmware:
                why = "the default guest's kernel boots the system on the first disk"
                self.lose("firmware", why)
            for name in ("initrd", "append"):
                if self._values.pop(name, None) is not None:
                    self.lose(" ".join(self._sources.pop(name)), "it goes with a kernel")
            if not by_firmware:
                self.set("append_extra", "root=auto", "no kernel")
        try:
            config = make_config(self._values)
        except ConfigError as error:
            raise ConfigError(f"what was carried over is no machine: {error.cause}") from None
        return relative_to(config, directory)

    def toml(self, config: MachineConfig, heading: str) -> str:
        """The file for --config."""
        remarks = {
            name: shown(" ".join(dict.fromkeys(sources))) for name, sources in self._sources.items()
        }
        lines = (line for line in lines_for(config, remarks) if line.name in self._values)
        return toml_text(lines, [], heading)

    def _checked(self, name: str, value: object, source: str) -> bool:
        try:
            make_config({name: value}, lambda name, item: "")
        except ConfigError as error:
            self.lose(source, error.cause)
            return False
        return True


def shown(text: str) -> str:
    """On one line that fits a terminal, without what would move its cursor."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _SHOWN_MAX else f"{text[: _SHOWN_MAX - 1]}…"
