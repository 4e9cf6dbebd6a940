"""Where the guest's serial line ends: a terminal, a pipe, a file, a socket, a program."""

from tetrarch.console.backend import ConsoleBackend, ConsoleError, NullConsole
from tetrarch.console.memory import ExpectTimeout, MemoryConsole

__all__ = ["ConsoleBackend", "ConsoleError", "ExpectTimeout", "MemoryConsole", "NullConsole"]
