"""How a class gets a twin whose methods are awaited: a line for each, which says how it is called.

    class AsyncDoor(Twin[Door]):
        open = awaited(Door.open)  # on a thread of its own: it waits
        width = same(lambda door: door.width)  # it does not

A call has a thread of its own, and not one of asyncio's pool: machines that wait do not fill that,
and the loop's end does not wait for them. A call that is cancelled goes on; its result is dropped.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial, update_wrapper
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

__all__ = ["Twin", "awaited", "on_thread", "same"]

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)
_R = TypeVar("_R")
_P = ParamSpec("_P")


async def on_thread(function: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Calls something that waits; the loop runs on meanwhile."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_R] = loop.create_future()
    call = partial(contextvars.copy_context().run, partial(function, *args, **kwargs))

    def settle(result: Callable[[], None]) -> None:
        def unless_cancelled() -> None:
            if not done.done():
                result()

        with suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(unless_cancelled)

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            settle(partial(done.set_exception, error))
        else:
            settle(partial(done.set_result, result))

    name = getattr(function, "__name__", "call")
    threading.Thread(target=run, name=f"await-{name}", daemon=True).start()
    return await done


class Twin(Generic[_T_co]):
    """Stands for ``sync`` in coroutines."""

    def __init__(self, sync: _T_co) -> None:
        self.sync = sync
        """What it stands for."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.sync!r}>"


class awaited(Generic[_T, _P, _R]):  # noqa: N801 - reads as a function
    """A method that waits, as one to be awaited."""

    def __init__(self, method: Callable[Concatenate[_T, _P], _R]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, twin: None, owner: type) -> Self: ...
    @overload
    def __get__(self, twin: Twin[_T], owner: type) -> Callable[_P, Coroutine[Any, Any, _R]]: ...

    def __get__(
        self, twin: Twin[_T] | None, owner: type
    ) -> Self | Callable[_P, Coroutine[Any, Any, _R]]:
        if twin is None:
            return self
        method, sync = self._method, twin.sync

        async def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return await on_thread(method, sync, *args, **kwargs)

        return update_wrapper(call, method)


class same(Generic[_T, _R]):  # noqa: N801 - reads as a function
    """What does not wait: the thing itself."""

    def __init__(self, get: Callable[[_T], _R]) -> None:
        self._get = get

    @overload
    def __get__(self, twin: None, owner: type) -> Self: ...
    @overload
    def __get__(self, twin: Twin[_T], owner: type) -> _R: ...

    def __get__(self, twin: Twin[_T] | None, owner: type) -> Self | _R:
        return self if twin is None else self._get(twin.sync)
