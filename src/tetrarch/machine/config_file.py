"""A machine's options in a TOML file.

    kernel = "vmlinuz"          # options as MachineConfig names them
    memory = "1G"

    [run]                       # what only the command ``tetrarch run`` takes
    timeout = 60

Paths in it are relative to the file. Disks, networks and the like can be tables too
(config_tables.py). What is wrong is said with the file and the line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tetrarch._files import read_text
from tetrarch.boot.initrd import initrd_relative_to
from tetrarch.errors import ConfigError, ValueProblem
from tetrarch.machine.config import MachineConfig, make_config, several
from tetrarch.machine.config_lines import Place, lines_of
from tetrarch.machine.config_tables import TABLES, as_text

__all__ = ["RUN_TABLE", "ConfigFile", "load_config", "relative_to"]

RUN_TABLE = "run"
_TOML_PLACE = re.compile(r"(.*) \(at line (\d+), column \d+\)", re.DOTALL)


def load_config(path: str | Path) -> MachineConfig:
    """The machine that a file describes. Raises ConfigError."""
    return ConfigFile.read(Path(path)).config


@dataclass(frozen=True)
class ConfigFile:
    """What a file says."""

    path: Path
    config: MachineConfig
    run: dict[str, Any]
    """The table for ``tetrarch run``, not checked yet."""
    lines: dict[Place, int]

    @classmethod
    def read(cls, path: Path, of_run: Collection[str] = ()) -> Self:
        """``of_run`` are the options of the table for ``tetrarch run``. Raises ConfigError."""
        text = read_text(path, "TOML file")
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # no TOML, or absurdly nested
            raise _no_toml(path, error) from error
        run = values.pop(RUN_TABLE, {})
        file = cls(path, MachineConfig(), run, lines_of(text))
        if not isinstance(run, dict):
            raise ConfigError(
                f"{file.spelled(RUN_TABLE)}it is no table", mend=f"write [{RUN_TABLE}]"
            )
        for name in values:
            if name in of_run:
                cause = "this is an option of the command"
                raise ConfigError(f"{file.spelled(name)}{cause}", mend=f"write it in [{RUN_TABLE}]")
        for name in run:
            # What stands behind the table's head is the table's, wherever it was meant to be.
            if name in MachineConfig.model_fields:
                cause = "this is an option of the machine"
                mend = f"write it above [{RUN_TABLE}]"
                raise ConfigError(f"{file.spelled_run(name)}{cause}", mend=mend)
        config = make_config(file._texts(values), file.spelled)
        return cls(path, relative_to(config, path.parent), run, file.lines)

    def place(self, *names: str | int) -> str:
        """File and line of what stands there; of what is around it, where that has none."""
        for end in range(len(names), 0, -1):
            # A table of several is none without its number.
            for place in (names[:end], (*names[:end], 0)):
                if place in self.lines:
                    return f"{self.path}:{self.lines[place]}"
        return str(self.path)

    def spelled(self, name: str, item: int | None = None) -> str:
        """How an error about an option of the machine begins."""
        if not name:
            return f"{self.path}: "
        return f"{self.place(name, *(() if item is None else (item,)))}: {name}: "

    def spelled_run(self, name: str, item: int | None = None) -> str:
        """How one about an option of the command begins."""
        return f"{self.place(RUN_TABLE, name)}: {RUN_TABLE}.{name}: "

    def _texts(self, values: dict[str, Any]) -> dict[str, Any]:
        """With tables as the texts that they stand for."""
        texts = dict(values)
        for name in TABLES.keys() & values.keys():
            made = list(several(values[name]))
            for item, one in enumerate(made):
                if isinstance(one, dict):
                    try:
                        made[item] = as_text(name, one)
                    except ValueProblem as problem:
                        spelled = self.spelled(name, item)
                        raise ConfigError(f"{spelled}{problem.cause}", mend=problem.mend) from None
            texts[name] = made
        return texts


def _no_toml(path: Path, error: Exception) -> ConfigError:
    if match := _TOML_PLACE.fullmatch(str(error)):
        return ConfigError(f"{path}:{match[2]}: this is no TOML: {match[1]}", mend="correct it")
    return ConfigError(f"{path} is no TOML file: {error}", mend="correct it")


def relative_to(config: MachineConfig, directory: Path) -> MachineConfig:
    """With paths as they are written in a file of that directory."""
    changes: dict[str, Any] = {}
    for name in config.model_fields_set:
        value = getattr(config, name)
        if name == "initrd" and value is not None:
            changes[name] = initrd_relative_to(value, directory)
        elif isinstance(value, Path):
            changes[name] = directory / value
        elif hasattr(value, "relative_to"):
            changes[name] = value.relative_to(directory)
        elif isinstance(value, tuple):
            changes[name] = tuple(
                one.relative_to(directory) if hasattr(one, "relative_to") else one for one in value
            )
    return config.model_copy(update=changes)
