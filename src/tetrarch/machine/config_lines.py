"""On which line of a TOML file (TOML 1.0) what stands: tomllib does not tell.

Only for text that tomllib has taken, so nothing is checked here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

__all__ = ["Place", "lines_of"]

Place = tuple[str | int, ...]
"""Keys from the outside in; of an array, or of tables of one name, a number from 0."""

_TOKEN = re.compile(
    r'(?P<string>"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*')"
    r"|(?P<comment>\#[^\n]*)"
    r"|(?P<newline>\n)"
    r"|(?P<space>[ \t\r]+)"
    r"|(?P<mark>[\[\]{},=.])"
    r"|(?P<bare>[^\[\]{},=.\"'\#\s]+)",
    re.DOTALL,
)
_Token = tuple[str, str, int]
"""Kind, text and line."""


def lines_of(text: str) -> dict[Place, int]:
    """The line of each key, each item of an array that is a key's value, and each table."""
    lines: dict[Place, int] = {}
    tables = Counter[Place]()
    table: Place = ()
    tokens = _tokens(text)
    for kind, word, line in tokens:
        if kind == "newline":
            continue
        if word == "[" and kind == "mark":
            table = _header(tokens, tables)
            lines[table] = line
        else:
            key = table + _key((kind, word, line), tokens, "=")
            lines[key] = line
            _value(key, tokens, lines)
    return lines


def _tokens(text: str) -> Iterator[_Token]:
    """Without spaces and comments."""
    line = 1
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind not in ("space", "comment"):
            yield kind, match[0], line
        line += match[0].count("\n")


def _header(tokens: Iterator[_Token], tables: Counter[Place]) -> Place:
    """``[a.b]`` or ``[[a.b]]`` behind the first bracket; which it is of those of one name."""
    first = next(tokens)
    several = first[1] == "["
    names = _key(next(tokens) if several else first, tokens, "]")
    place: Place = ()
    for name in names[:-1]:
        place += (name,)
        if tables[place]:
            place += (tables[place] - 1,)
    place += names[-1:]
    if several:
        next(tokens)  # the second bracket
        tables[place] += 1
        place += (tables[place] - 1,)
    return place


def _key(first: _Token, tokens: Iterator[_Token], end: str) -> Place:
    """A key with dots, up to ``end``, which is taken."""
    names: list[str | int] = []
    token = first
    while token[1] != end or token[0] != "mark":
        if token[0] == "string":
            # As it is written; one with escapes is no name of an option.
            names.append(token[1][1:-1])
        elif token[0] == "bare":
            names.append(token[1])
        token = next(tokens)
    return tuple(names)


def _value(key: Place, tokens: Iterator[_Token], lines: dict[Place, int]) -> None:
    """A value, up to the end of its line."""
    depth = item = 0
    awaited = False
    for count, (kind, word, line) in enumerate(tokens):
        if kind == "newline":
            if depth == 0:
                return
            continue
        mark = word if kind == "mark" else ""
        if awaited and mark != "]":
            lines[(*key, item)] = line
            item += 1
            awaited = False
        if mark in ("[", "{"):
            depth += 1
            awaited = awaited or (count == 0 and mark == "[")
        elif mark in ("]", "}"):
            depth -= 1
        elif mark == "," and depth == 1:
            awaited = item > 0
