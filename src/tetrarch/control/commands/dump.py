"""Guest memory in a file (QEMU, qapi/dump.json)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Literal

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError
from tetrarch.errors import TetrarchError

__all__ = [
    "dump_guest_memory",
    "query_dump",
    "query_dump_guest_memory_capability",
]


@command("dump-guest-memory")
def dump_guest_memory(
    monitor: Monitor,
    protocol: str,
    paging: bool = False,
    detach: bool = False,
    begin: int | None = None,
    length: int | None = None,
    format: Literal["elf"] = "elf",  # noqa: A002
) -> None:
    """An ELF core file, at ``file:PATH`` or in the descriptor ``fd:NAME``; the machine is held
    until it is written."""
    if (begin is None) != (length is None):
        name = "begin" if begin is None else "length"
        raise QmpError(f"Parameter '{name}' is missing")
    if begin is not None and length is not None and (begin < 0 or length <= 0):
        raise QmpError("Parameter 'length' expects an address and a number of bytes")
    machine = monitor.machine
    with ExitStack() as stack:
        target = stack.enter_context(monitor.descriptors.target(protocol))
        write = machine.dumps.begin(target, machine.paused, begin, length, paging)
        rest = stack.pop_all()

    def finish() -> None:
        with rest:
            write()

    if not detach:
        finish()
        return
    # Not a daemon: a process that ends waits until its half of a file is gone.
    thread = threading.Thread(target=_in_background, args=(finish,), name="dump")
    try:
        thread.start()
    except RuntimeError:  # the host gives no thread, and the machine is held
        finish()


def _in_background(write: Callable[[], None]) -> None:
    # Who wants to know has DUMP_COMPLETED and query-dump.
    with suppress(TetrarchError, OSError):
        write()


@command("query-dump")
def query_dump(monitor: Monitor) -> dict[str, str | int]:
    return monitor.machine.dumps.progress()


@command("query-dump-guest-memory-capability")
def query_dump_guest_memory_capability(monitor: Monitor) -> dict[str, list[str]]:
    return {"formats": ["elf"]}
