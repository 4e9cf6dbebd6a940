"""A configuration as the TOML file that gives it again, with a remark on each value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tomlkit
from pydantic import BaseModel

from tetrarch.console.spec import ConsoleSpec, PortSpec
from tetrarch.errors import ConfigError
from tetrarch.machine.config import option_names, size_text
from tetrarch.machine.config_file import RUN_TABLE
from tetrarch.machine.cpus import CpusSpec

__all__ = ["Line", "lines_for", "toml_text"]

_UNWRITABLE = re.compile("[\ud800-\udfff]")


class Line(NamedTuple):
    """One option as it is written down."""

    name: str
    value: Any
    """As TOML has it; None is an option without a value, which TOML cannot say."""
    remark: str = ""


def lines_for(options: BaseModel, remarks: dict[str, str]) -> Iterator[Line]:
    """All options of a model. Raises ConfigError for one that only Python can give."""
    model = type(options)
    for (name, field), shown in zip(model.model_fields.items(), option_names(model), strict=True):
        value = _written(shown, getattr(options, name))
        # No text by default: some options cannot be written empty.
        value = None if value == "" == field.default else value
        yield Line(shown, value, remarks.get(shown, "default"))


def toml_text(machine: Iterable[Line], run: Iterable[Line], heading: str) -> str:
    """The file. Raises ConfigError where TOML has no way to write something."""
    document = tomlkit.document()
    document.add(tomlkit.comment(heading))
    document.add(tomlkit.nl())
    _add(document, machine)
    table = tomlkit.table()
    _add(table, run)
    if table:
        document.add(tomlkit.nl())
        document.add(RUN_TABLE, table)
    return tomlkit.dumps(document)


def _add(place: tomlkit.TOMLDocument | tomlkit.items.Table, lines: Iterable[Line]) -> None:
    for name, value, remark in lines:
        if value is None:
            place.add(tomlkit.comment(f"{name}: none ({remark})" if remark else f"{name}: none"))
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and _UNWRITABLE.search(one):
                raise ConfigError(
                    f"{name}: {one!r} is no text, so that no TOML file can have it",
                    mend="rename it",
                )
        item = tomlkit.item(value)
        if isinstance(item, tomlkit.items.Array):
            item.multiline(len(value) > 1)
        if remark:
            item.comment(remark)
        place.add(name, item)


def _written(name: str, value: object) -> Any:
    match value:
        case None | bool() | float() | str():
            return value
        case int():
            return size_text(value) if name == "memory" else value
        case Path():
            return str(value)
        case tuple():
            return [_written(name, one) for one in value]
        case CpusSpec() if str(value) == str(value.count):
            return value.count
        case PortSpec(console=console) if not isinstance(console, ConsoleSpec):
            raise ConfigError(f"{name}: {console!r} is from Python alone", mend="give it there")
    return str(value)
