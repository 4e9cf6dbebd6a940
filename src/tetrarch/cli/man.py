"""Man pages (man-pages(7), groff_man(7)) of what ``--help`` shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import typer
from typer.main import get_command

from tetrarch import __version__

__all__ = ["man_pages", "write_pages"]

_SECTION: Final = 1


def write_pages(app: typer.Typer, directory: Path) -> None:
    """One file for each command, in DIR/man1."""
    folder = directory / f"man{_SECTION}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in man_pages(app):
        (folder / f"{name}.{_SECTION}").write_text(text)


def man_pages(app: typer.Typer) -> Iterator[tuple[str, str]]:
    """Name and text of each page; that of the program itself first."""
    command = get_command(app)
    yield from _pages(command, command.context_class(command, info_name="tetrarch"))


def _pages(command: Any, context: Any) -> Iterator[tuple[str, str]]:
    name = context.command_path.replace(" ", "-")
    yield name, _page(name, command, context)
    for word, child in _children(command):
        yield from _pages(child, child.context_class(child, info_name=word, parent=context))


def _children(command: Any) -> list[tuple[str, Any]]:
    children = getattr(command, "commands", {})
    return [(word, child) for word, child in children.items() if not child.hidden]


def _page(name: str, command: Any, context: Any) -> str:
    summary, *paragraphs = _paragraphs(command.help or "")
    lines = [
        f'.TH {name.upper()} {_SECTION} "" "tetrarch {__version__}" "Tetrarch"',
        ".SH NAME",
        f"{_text(name)} \\- {_text(_summary(summary))}",
        ".SH SYNOPSIS",
        f".B {_text(context.command_path)}",
        _text(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        _text(summary),
        *(line for paragraph in paragraphs for line in (".PP", _text(paragraph))),
    ]
    records = [record for one in command.get_params(context) if (record := _record(one, context))]
    arguments = [record for is_option, record in records if not is_option]
    options = [record for is_option, record in records if is_option]
    for heading, entries in (("ARGUMENTS", arguments), ("OPTIONS", options)):
        lines += _tagged(heading, entries)
    children = _children(command)
    lines += _tagged(
        "COMMANDS",
        [(f"{name}-{word}(1)", _paragraphs(child.help or "")[0]) for word, child in children],
    )
    others = [f"{name}-{word}" for word, _ in children]
    if context.parent is not None:
        others.insert(0, context.parent.command_path.replace(" ", "-"))
    lines.append(".SH SEE ALSO")
    lines.append(_text(", ".join(f"{other}({_SECTION})" for other in others)))
    return "\n".join(lines) + "\n"


def _record(parameter: Any, context: Any) -> tuple[bool, tuple[str, str]] | None:
    """Whether it is an option; how it is written, and what it does. None: it is not shown."""
    record = parameter.get_help_record(context)
    if record is None:
        return None
    # That of an argument ends in the type in Python.
    written = re.sub(r" <\w+>$", "", record[0])
    return parameter.param_type_name == "option", (written, record[1] or "")


def _tagged(heading: str, entries: list[tuple[str, str]]) -> list[str]:
    if not entries:
        return []
    lines = [f".SH {heading}"]
    for tag, text in entries:
        lines += [".TP", f".B {_text(tag)}", _text(text)]
    return lines


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]


def _summary(sentence: str) -> str:
    """As whatis(1) lists it."""
    return sentence.rstrip(".")


def _text(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    # A line that begins so is a request.
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
