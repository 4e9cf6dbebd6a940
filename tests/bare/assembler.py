"""GNU as for the few instructions of each check, in one run for all of them."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_LIMIT_S = 60
_SHT_RELA = 4


@dataclass(frozen=True)
class Assembled:
    """Machine code, and offsets in it."""

    code: bytes
    marked: int
    """The instruction behind the mark ">", or the last one."""
    behind: int
    """The one behind that."""


Source = tuple[int, str]
"""Bits of the code; statements in Intel's syntax, separated by ";". The one that begins with ">"
is marked. ``start`` is the first byte; a label's address is an offset from there."""


def assemble(sources: Iterable[Source], constants: Mapping[str, int]) -> dict[Source, Assembled]:
    """All of them; an AssertionError shows what as says of those that are wrong."""
    sources = list(dict.fromkeys(sources))
    lines = [".intel_syntax noprefix", *(f".set {name}, {at}" for name, at in constants.items())]
    for n, (bits, text) in enumerate(sources):
        lines += [f".code{bits}", f"start{n}:", *_statements(n, text), f"end{n}:"]
    # Differences to the first byte need no relocation.
    lines += [
        f".long {name}{n} - start0"
        for n in range(len(sources))
        for name in ("start", "marked", "behind", "end")
    ]
    code = _run("\n".join([*lines, ""]))
    table = struct.iter_unpack("<4I", code[len(code) - 16 * len(sources) :])
    return {
        source: Assembled(code[start:end], marked - start, behind - start)
        for source, (start, marked, behind, end) in zip(sources, table, strict=True)
    }


def _statements(n: int, text: str) -> list[str]:
    statements = [re.sub(r"\bstart\b", f"start{n}", part.strip()) for part in text.split(";")]
    marks = [at for at, statement in enumerate(statements) if statement.startswith(">")]
    at = marks[0] if marks else len(statements) - 1
    statements[at] = f"marked{n}: {statements[at].removeprefix('>')}\nbehind{n}:"
    return statements


def _run(source: str) -> bytes:
    """The section .text, the first one of an object file of GNU as."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "o")
        done = subprocess.run(
            ["as", "--64", "-o", output],
            input=source,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        lines = source.split("\n")
        wrong = [lines[int(line) - 1] for line in re.findall(r":(\d+): Error", done.stderr)]
        assert done.returncode == 0, f"{done.stderr}{wrong}"
        elf = output.read_bytes()
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + size * n) for n in range(count)]
    assert all(kind != _SHT_RELA for _, kind, *_ in headers), "a name that is no constant"
    *_, offset, length = headers[1]
    return elf[offset : offset + length]
