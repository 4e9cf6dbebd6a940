"""A console in coroutines."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from tetrarch._patience import patience
from tetrarch.aio.bridge import Twin, same
from tetrarch.console import MemoryConsole

__all__ = ["AsyncConsole"]


_R = TypeVar("_R")


def _same(get: Callable[[MemoryConsole], _R]) -> same[MemoryConsole, _R]:
    return same(get)


class AsyncConsole(Twin[MemoryConsole]):
    """As ``MemoryConsole``; ``expect`` is awaited."""

    send = _same(lambda console: console.send)
    read = _same(lambda console: console.read)
    resize = _same(lambda console: console.resize)
    text = _same(lambda console: console.text)
    closed = _same(lambda console: console.closed)

    async def expect(self, pattern: str | re.Pattern[str], timeout: float = 60.0) -> str:
        """As ``MemoryConsole.expect``. Cancelled, it has taken nothing."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(changed.set)

        with self.sync.watched(tell):
            try:
                async with asyncio.timeout(patience(timeout)) as limit:
                    while (found := self.sync.find(pattern)) is None:
                        await changed.wait()
                        changed.clear()
                    return found
            except TimeoutError:
                if not limit.expired():
                    raise  # the machine has ended
                raise self.sync.missing(pattern, f"{timeout:g} s passed") from None
