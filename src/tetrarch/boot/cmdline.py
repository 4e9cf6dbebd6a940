"""The kernel command line: checked, and written to its place."""

from typing import Final

from tetrarch.boot.layout import CMDLINE_BASE, CMDLINE_SPACE, GuestMemory
from tetrarch.errors import BootError

__all__ = [
    "DEFAULT_APPEND",
    "LINUX_LIMIT",
    "TERMINAL",
    "cmdline_bytes",
    "with_terminal",
    "write_cmdline",
]

#: Where the user gives none.
DEFAULT_APPEND: Final = "console=ttyS0 quiet"

#: The word in whose place the guest is told how large its console's terminal is, for
#: images/guest/profile and its like. Linux leaves words with a dot in them alone.
TERMINAL: Final = "tetrarch.tty"

#: Linux on x86 keeps 2048 bytes with the final zero (COMMAND_LINE_SIZE) and cuts the rest off.
LINUX_LIMIT: Final = 2047


def cmdline_bytes(cmdline: str, limit: int) -> bytes:
    """With its final zero, which ``limit`` does not count. Raises BootError."""
    data = cmdline.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise BootError("the kernel command line holds a zero byte", mend="remove it")
    limit = min(limit, CMDLINE_SPACE - 1)
    if len(data) > limit:
        raise BootError(
            f"the kernel command line is {len(data)} bytes long, this kernel takes {limit}",
            mend="shorten --append",
        )
    return data + b"\0"


def write_cmdline(vm: GuestMemory, cmdline: str, limit: int) -> int:
    """Writes it with its final zero; the address. ``limit`` does not count the zero."""
    vm.write_memory(CMDLINE_BASE, cmdline_bytes(cmdline, limit))
    return CMDLINE_BASE


def with_terminal(append: str, terminal: str) -> str:
    """With the size of a terminal (or "none", or "" where that is not known) at the word for it."""
    if TERMINAL not in append.split(" "):
        return append
    told = f"{TERMINAL}={terminal}" if terminal else ""
    words = (told if word == TERMINAL else word for word in append.split(" "))
    return " ".join(filter(None, words))
