"""A machine's options in a TOML file.

    kernel = "vmlinuz"          # options as MachineConfig names them
    memory = "1G"

    [run]                       # what only the command ``tetrarch run`` takes
    timeout = 60

Paths in it are relative to the file.
"""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from tetrarch.console.spec import ConsoleSpec
from tetrarch.errors import ConfigError
from tetrarch.machine.config import MachineConfig, make_config

__all__ = ["RUN_TABLE", "load_config", "read_options"]

RUN_TABLE = "run"


def load_config(path: str | Path) -> MachineConfig:
    """The machine that a file describes. Raises ConfigError."""
    options, _ = read_options(Path(path))
    return options


def read_options(path: Path) -> tuple[MachineConfig, dict[str, Any]]:
    """The machine, and the table for ``tetrarch run``, not checked yet."""
    try:
        values = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", mend="name a readable file") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, or no TOML, or absurdly nested
        raise ConfigError(f"{path} is no TOML file: {error}", mend="correct it") from error
    run = values.pop(RUN_TABLE, {})
    if not isinstance(run, dict):
        raise ConfigError(f"{path}: {RUN_TABLE} is no table", mend=f"write [{RUN_TABLE}]")
    try:
        config = make_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.cause}", mend=error.mend) from None
    return _relative(config, path.parent), run


def _relative(config: MachineConfig, directory: Path) -> MachineConfig:
    changes: dict[str, Any] = {}
    for name in config.model_fields_set:
        match getattr(config, name):
            case Path() as file:
                changes[name] = directory / file
            case ConsoleSpec(path=Path() as file) as spec:
                changes[name] = replace(spec, path=directory / file)
            case tuple() as several if name != "input":  # which names no files
                changes[name] = tuple(one.relative_to(directory) for one in several)
    return config.model_copy(update=changes)
