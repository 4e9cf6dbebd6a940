"""The examples of a Markdown document: its python blocks, and the text they print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Example:
    line: int
    """Where the code begins in the document, from 1."""
    code: str
    printed: str | None
    """What the text block behind it says; None without one."""


def examples(document: Path) -> list[Example]:
    text = document.read_text()
    found: list[Example] = []
    for block in _BLOCK.finditer(text):
        language, body = block.groups()
        if language == "python":
            line = text.count("\n", 0, block.start(2)) + 1
            found.append(Example(line, body, None))
        elif language == "text" and found and found[-1].printed is None:
            found[-1] = Example(found[-1].line, found[-1].code, body)
    return found


def program(document: Path) -> str:
    """All examples as one program; tracebacks name the document and its lines."""
    parts = []
    for example in examples(document):
        code = "\n" * (example.line - 1) + example.code
        parts.append(f"exec(compile({code!r}, {document.name!r}, 'exec'))\n")
        parts.append(f"print({SEPARATOR!r})\n")
    return "".join(parts)


SEPARATOR = "--- end of an example ---"
