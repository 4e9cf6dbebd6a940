"""What makes shells complete commands, options and names: they ask the program itself."""

from __future__ import annotations

import os
from typing import Final

from tetrarch.errors import ConfigError

__all__ = ["answer_shells", "completion_script", "show_script"]

SHELLS: Final = ("bash", "zsh", "fish")
#: By which the shell's function asks; typer's parser looks for it.
VARIABLE: Final = "_TETRARCH_COMPLETE"


def completion_script(shell: str) -> str:
    if shell not in SHELLS:
        raise ConfigError(f"{shell!r} is no shell", mend=f"there are {', '.join(SHELLS)}")
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    script: str = get_completion_script(prog_name="tetrarch", complete_var=VARIABLE, shell=shell)
    return f"{script}\n"


def answer_shells() -> None:
    """Lets the parser answer where a shell calls the program to ask."""
    if VARIABLE in os.environ:
        # Else typer calls it for an option of its own.
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()


def show_script(shell: str) -> None:
    print(completion_script(shell), end="")
