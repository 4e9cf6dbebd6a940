"""Commands and files in a guest, by its agent: what every machine has that reaches one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tetrarch.agent.capture import Completed, run_captured
from tetrarch.agent.client import AgentStream

__all__ = ["AGENT_S", "AgentMethods"]

#: Until a guest that has just been started runs commands.
AGENT_S: Final = 60.0


class AgentMethods(ABC):
    """``timeout`` of each is for how long the guest may still be booting. Raises AgentError where
    no agent answers."""

    @abstractmethod
    def agent(self, timeout: float = AGENT_S) -> AgentStream:
        """A connection with the guest's agent, for one command."""

    def exec(
        self, arguments: Sequence[str], data: bytes = b"", *, timeout: float = AGENT_S
    ) -> Completed:
        """Runs a command in the guest, with ``data`` as its input. ``timeout`` is for how long the
        guest may still be booting.

        Raises AgentError where none does.
        """
        if isinstance(arguments, (str, bytes)):  # a sequence of its letters
            raise TypeError(f"exec() takes the words of a command: [{arguments!r}]")
        with self.agent(timeout) as stream:
            return run_captured(stream, arguments, data)

    def copy_in(
        self, source: str | os.PathLike[str], target: str, *, timeout: float = AGENT_S
    ) -> None:
        """Copies a file or directory into the guest: into ``target`` where that is a directory,
        else as it."""
        from tetrarch.agent.copy import copy_in

        copy_in(lambda: self.agent(timeout), Path(source), target)

    def copy_out(
        self, source: str, target: str | os.PathLike[str], *, timeout: float = AGENT_S
    ) -> list[str]:
        """Copies a file or directory out of the guest. Gives links that were left out, as they
        lead out of it."""
        from tetrarch.agent.copy import copy_out

        return copy_out(lambda: self.agent(timeout), source, Path(target))
