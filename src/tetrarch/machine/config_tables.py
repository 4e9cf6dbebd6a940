"""What has options of its own, as a table of a configuration file.

    [[disk]]                            disk = ["a,,b.img,bus=nvme,readonly=on"]
    path = "a,b.img"
    bus = "nvme"
    readonly = true

A table becomes the text that means the same, so the checks and the words are those of the text.
"""

from __future__ import annotations

import difflib
from typing import Any

from tetrarch.errors import ValueProblem

__all__ = ["TABLES", "as_text"]

#: The options that can be tables; which keys say what it is, and how its text then begins.
TABLES: dict[str, dict[str, str]] = {
    "disk": {"path": "", "vhost-user": "vhost-user="},
    "cdrom": {"path": ""},
    "floppy": {"path": ""},
    "net": {"user": "user", "tap": "tap=", "socket": "socket=", "vhost-user": "vhost-user="},
    "share": {"directory": ""},
    "virtio_console": {"console": ""},
}


def as_text(option: str, table: dict[str, Any]) -> str:
    """Raises ValueProblem."""
    heads = TABLES[option]
    named = [key for key in table if key in heads]
    if len(named) != 1:
        near = [key for name in table for key in difflib.get_close_matches(name, heads, n=1)]
        mend = f"did you mean {near[0]}?" if near and not named else f"give {' or '.join(heads)}"
        raise ValueProblem(f"a table says {' and '.join(named) or 'nothing'} of what it is", mend)
    rest = dict(table)
    what = _word(named[0], rest.pop(named[0]))
    if named[0] == "user":
        if what != "on":
            raise ValueProblem("user is no switch", mend="write user = true, or no such table")
        what = ""
    elif not what:
        raise ValueProblem(f"{named[0]} is empty", mend="give it a value")
    if named[0] == "path" and what.startswith("vhost-user="):
        what = f"./{what}"
    if option == "virtio_console":
        return _port(what, rest)
    if option == "share":
        what = f"{what}:{_word('tag', rest.pop('tag', ''))}"
    words = [heads[named[0]] + what]
    for key, value in rest.items():
        several = value if isinstance(value, list) else [value]
        words += [f"{key}={_word(key, one)}" for one in several]
    return ",".join(word.replace(",", ",,") for word in words)


def _port(console: str, rest: dict[str, Any]) -> str:
    name = _word("name", rest.pop("name", ""))
    if rest:
        raise ValueProblem(f"{next(iter(rest))!r} is no option of a port", mend="there is name")
    return f"{console},name={name}" if name else console


def _word(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (str, int)):
        return str(value)
    raise ValueProblem(f"{key} is {value!r}", mend="give text, a number, true or false")
