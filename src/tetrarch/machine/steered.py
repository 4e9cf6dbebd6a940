"""What brings a machine to rest, wherever it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from tetrarch.machine.lifecycle import Phase

__all__ = ["PauseMethods"]


class PauseMethods(ABC):
    @property
    @abstractmethod
    def phase(self) -> Phase:
        """Where it is in its life: made, running, paused, ended."""

    @abstractmethod
    def pause(self) -> None:
        """Brings it to rest between two instructions, until resume()."""

    @abstractmethod
    def resume(self) -> None:
        """Lets it run on."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses the machine for as long as a ``with`` statement lasts."""
        self.pause()
        try:
            yield
        finally:
            if self.phase is Phase.PAUSED:  # it may have been ended
                self.resume()
