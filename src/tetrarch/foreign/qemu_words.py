"""A command line of QEMU, taken apart: options, and what they say of keys and values.

The syntax is that of QEMU's manual (qemu-options.hx): ``-name VALUE``, where a value often is
``key=value,key=value`` with commas in values doubled, or the same as a JSON object.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tetrarch.errors import ConfigError

__all__ = ["REPEATED", "Option", "is_qemu", "options_of", "words_of_script"]

#: Between the values of a key that may be there several times: hostfwd, guestfwd.
REPEATED = "\0"
_PROGRAM = re.compile(r"(?:.*/)?(?:qemu-system-([a-z0-9_]+)|qemu-kvm|kvm)")
#: As the programs are called.
_X86 = ("x86_64", "i386")
#: Options that are followed by no value.
_ALONE = frozenset(
    """S async-teardown audio-help daemonize enable-kvm enable-sync-profile full-screen h help
    mem-prealloc no-acpi no-fd-bootchk no-hpet no-reboot no-shutdown no-user-config nodefaults
    nographic only-migratable portrait preconfig s singlestep snapshot usb version win2k-hack
    xen-attach xen-domid-restrict""".split()  # noqa: SIM905 - a word a line would be a page
)
#: What ends a command of a shell.
_BETWEEN = ";&|<>\n"
#: JSON that is deeper is no option of QEMU's.
_DEPTH_MAX = 16


class Option(NamedTuple):
    name: str
    """Without dashes; ``hda`` for a word that is none."""
    value: str | None

    def __str__(self) -> str:
        return f"-{self.name}" if self.value is None else f"-{self.name} {self.value}"

    def keys(self, implied: str = "") -> dict[str, str]:
        """What its value says, in order; a first word without ``=`` is that of ``implied``."""
        text = self.value or ""
        if text.startswith("{"):
            try:
                return dict(_flat("", json.loads(text), 0))
            except (ValueError, RecursionError):
                return {implied: text}
        keys: dict[str, str] = {}
        for index, word in enumerate(_split(text)):
            key, equals, value = word.partition("=")
            if index == 0 and not equals and implied:
                key, value = implied, key
            elif not equals:
                value = "on"
            if key in keys and key.endswith("fwd"):
                keys[key] += f"{REPEATED}{value}"
            elif key:
                keys[key] = value
        return keys


def is_qemu(word: str) -> bool:
    """Whether it is the name of one of its programs."""
    return _PROGRAM.fullmatch(word) is not None


def words_of_script(text: str) -> list[str]:
    """The words of the command line in a shell script, or in a file of nothing else.

    Raises ConfigError.
    """
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=_BETWEEN)
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    lexer.commenters = ""
    commands: list[list[str]] = [[]]
    remark = ended = False
    try:
        for word in lexer:
            if word and set(word) <= set(_BETWEEN):
                remark = remark and "\n" not in word
                ended = True
            elif remark or word.startswith("#"):
                remark = True
            else:
                # Without a shell nobody ends the lines of one command.
                if ended and not word.startswith("-"):
                    commands.append([])
                ended = False
                commands[-1].append(word)
    except ValueError as error:  # quotes that do not end
        raise ConfigError(f"this is no command line: {error}", mend="correct it") from error
    named = (words for words in commands if any(map(is_qemu, words)))
    return next(named, [word for words in commands for word in words])


def options_of(words: Sequence[str]) -> Iterator[Option]:
    """Of a command line of QEMU, whatever the program is started by. Raises ConfigError."""
    start = next((at for at, word in enumerate(words, 1) if is_qemu(word)), 0)
    if not start and not (words and words[0].startswith("-")):
        raise ConfigError(
            "no word is a program of QEMU's", mend="give qemu-system-x86_64 and its options"
        )
    program = _PROGRAM.fullmatch(words[start - 1]) if start else None
    if program is not None and program[1] not in (None, *_X86):
        raise ConfigError(
            f"qemu-system-{program[1]} runs guests of another CPU",
            mend="give a command line of qemu-system-x86_64",
        )
    rest = iter(words[start:])
    for word in rest:
        if not word.startswith("-") or word == "-":
            yield Option("hda", word)
            continue
        name = word.removeprefix("-").removeprefix("-")
        yield Option(name, None if name in _ALONE else next(rest, None))


def _split(text: str) -> list[str]:
    """At single commas: a doubled one is a comma of the value."""
    return [part.replace("\0\0", ",") for part in text.replace(",,", "\0\0").split(",")]


def _flat(prefix: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    """Objects in objects as keys with dots, which QEMU takes for the same."""
    if isinstance(value, (dict, list)) and depth < _DEPTH_MAX:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in items:
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), one, depth + 1)
    elif isinstance(value, bool):
        yield prefix, "on" if value else "off"
    elif value is not None:
        yield prefix, str(value)
