"""What happens, one after the other, for a thread or a coroutine that waits for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Generic, Self, TypeVar

from tetrarch._patience import patience

__all__ = ["EventStream"]

#: Of events that nobody takes; a guest can bring them about without end.
_KEPT_MAX = 1024

_E = TypeVar("_E")


class EventStream(Generic[_E]):
    """Gives each event to one who asks: ``for event in stream``, ``async for event in stream``.

    Events that come while nobody asks are kept, the last 1024 of them. It ends when its source has.
    """

    def __init__(self, names: Collection[str]) -> None:
        """``names``: of the events that are wanted; empty, all are."""
        self._names = frozenset(names)
        # Guards all below it.
        self._changed = threading.Condition()
        self._events: deque[_E] = deque(maxlen=_KEPT_MAX)
        self._ended = False
        self._waiters: list[Callable[[], object]] = []

    def put(self, name: str, event: _E) -> None:
        """From any thread."""
        if not self._names or name in self._names:
            with self._changed:
                self._events.append(event)
                self._tell()

    def end(self) -> None:
        """There are no more."""
        with self._changed:
            self._ended = True
            self._tell()

    def next(self, timeout: float | None = None) -> _E | None:
        """The next one, and None when there are no more. Raises TimeoutError after ``timeout``
        seconds without one."""
        with self._changed:
            ready = self._changed.wait_for(self._ready, patience(timeout))
            if not ready:
                raise TimeoutError(f"no event within {timeout:g} s")
            return self._events.popleft() if self._events else None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _E:
        event = self.next()
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _E:
        import asyncio  # a coroutine has it; a machine that has none need not load it

        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._waiters.append(tell)
        try:
            while True:
                with self._changed:
                    if self._events:
                        return self._events.popleft()
                    if self._ended:
                        raise StopAsyncIteration
                    changed.clear()
                await changed.wait()
        finally:
            with self._changed:
                self._waiters.remove(tell)

    def _ready(self) -> bool:
        return bool(self._events) or self._ended

    def _tell(self) -> None:
        self._changed.notify_all()
        for tell in self._waiters:
            tell()
