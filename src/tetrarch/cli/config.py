"""``tetrarch config``: the options that count, and where each came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tetrarch.machine.config_file import RUN_TABLE, relative_to
from tetrarch.machine.config_text import lines_for, toml_text

if TYPE_CHECKING:
    from tetrarch.cli.options import Effective

__all__ = ["show_config"]

_HEADING = "A machine for tetrarch run --config. Behind each value: where it came from."


def show_config(options: Effective) -> int:
    """Prints a file that gives them again."""
    prefix = f"{RUN_TABLE}."
    of_run = {
        name.removeprefix(prefix): origin
        for name, origin in options.origins.items()
        if name.startswith(prefix)
    }
    machine = lines_for(relative_to(options.config, Path.cwd()), options.origins)
    paths: dict[str, object] = {
        name: tuple(path.absolute() for path in getattr(options.command, name))
        for name in ("ssh_key", "allow")
    }
    if options.command.restore is not None:
        paths["restore"] = options.command.restore.absolute()
    command = options.command.model_copy(update=paths)
    print(toml_text(machine, lines_for(command, of_run), _HEADING), end="")
    return 0
