"""Breakpoints, and a machine at rest, in coroutines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal, Protocol, TypeVar

from tetrarch.aio.bridge import Twin, awaited, on_thread, same
from tetrarch.machine.breakpoints import Breakpoint, Hit
from tetrarch.machine.debugger import Place
from tetrarch.machine.lifecycle import Phase

__all__ = ["AsyncBreakpoint", "AsyncReplay", "DebugTwin"]

_R = TypeVar("_R")


def _of_point(get: Callable[[Breakpoint], _R]) -> same[Breakpoint, _R]:
    return same(get)


class AsyncBreakpoint(Twin[Breakpoint]):
    """As ``Breakpoint``."""

    wait = awaited(Breakpoint.wait)
    remove = awaited(Breakpoint.remove)
    kind = _of_point(lambda point: point.kind)
    address = _of_point(lambda point: point.address)
    length = _of_point(lambda point: point.length)
    hits = _of_point(lambda point: point.hits)

    async def __aenter__(self) -> AsyncBreakpoint:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.remove()


class _Travelled(Protocol):
    @property
    def count(self) -> int: ...
    def goto(self, count: int) -> Place: ...


class AsyncReplay(Twin[_Travelled]):
    """As ``ReplayView``."""

    async def count(self) -> int:
        return await on_thread(lambda: self.sync.count)

    async def goto(self, count: int) -> Place:
        return await on_thread(self.sync.goto, count)


class _Debugged(Protocol):
    """A machine, wherever it runs."""

    @property
    def phase(self) -> Phase: ...
    @property
    def replay(self) -> _Travelled: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def breakpoint(
        self,
        address: int,
        listener: Callable[[Hit], object] | None = None,
        *,
        hardware: bool = False,
        vcpu: int = 0,
    ) -> Breakpoint: ...
    def watchpoint(
        self,
        address: int,
        length: int,
        listener: Callable[[Hit], object] | None = None,
        *,
        access: Literal["write", "access"] = "write",
    ) -> Breakpoint: ...


_D_co = TypeVar("_D_co", bound=_Debugged, covariant=True)


class DebugTwin(Twin[_D_co]):
    @property
    def replay(self) -> AsyncReplay:
        """As ``Machine.replay``."""
        return AsyncReplay(self.sync.replay)

    async def breakpoint(
        self,
        address: int,
        listener: Callable[[Hit], object] | None = None,
        *,
        hardware: bool = False,
        vcpu: int = 0,
    ) -> AsyncBreakpoint:
        """As ``Machine.breakpoint``: a listener is called on a thread of its own."""
        set_it = self.sync.breakpoint
        return AsyncBreakpoint(
            await on_thread(set_it, address, listener, hardware=hardware, vcpu=vcpu)
        )

    async def watchpoint(
        self,
        address: int,
        length: int,
        listener: Callable[[Hit], object] | None = None,
        *,
        access: Literal["write", "access"] = "write",
    ) -> AsyncBreakpoint:
        """As ``Machine.watchpoint``."""
        return AsyncBreakpoint(
            await on_thread(self.sync.watchpoint, address, length, listener, access=access)
        )

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Pauses the machine for as long as an ``async with`` statement lasts."""
        await on_thread(self.sync.pause)
        try:
            yield
        finally:
            if self.sync.phase is Phase.PAUSED:  # it may have been stopped
                await on_thread(self.sync.resume)
