"""TCLO: requests of the host to the guest's tools, which come and ask for them (open-vm-tools,
lib/rpcIn/rpcin.c). The answer is "OK " and a result, or "ERROR " and why not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Final

from tetrarch.errors import TetrarchError

__all__ = ["TCLO", "Tclo", "ToolsError"]

#: The protocol's number, "TCLO".
TCLO: Final = 0x4F4C_4354

#: What a channel is asked first; the answer is "ATR" and the program's name.
RESET: Final = b"reset"
#: The service of the system, of the programs that have a channel.
TOOLBOX: Final = "toolbox"
#: A program that has not come for so long is not there.
_GONE_S: Final = 30.0
#: Requests that wait for a program: some are made because the guest asks for it.
_WAITING_MAX: Final = 64


class ToolsError(TetrarchError):
    """The guest's tools do not answer, or refuse."""


@dataclass
class _Request:
    text: bytes
    done: Event = field(default_factory=Event)
    answer: str | None = None


@dataclass
class _Link:
    """A program that came."""

    requests: deque[_Request]
    name: str = ""
    asked: _Request | None = None
    """Fetched, and not answered yet."""
    seen: float = field(default_factory=time.monotonic)


class Tclo:
    """``came`` is told of the toolbox, on a vCPU's thread."""

    def __init__(self, came: Callable[[], None]) -> None:
        self._came = came
        self._links: dict[int, _Link] = {}
        self._lock = Lock()

    @property
    def last_seen(self) -> float | None:
        """Seconds since the toolbox came last; None: it is not there."""
        with self._lock:
            link = self._toolbox()
            return None if link is None else time.monotonic() - link.seen

    def ask(self, text: str, timeout: float) -> str:
        """Raises ToolsError where the tools are not there, do not answer or refuse."""
        request = self.post(text)
        if not request.done.wait(timeout):
            raise ToolsError(
                f"the guest's tools did not answer {text!r} in {timeout:g} s",
                mend="look into the guest: its tools may hang",
            )
        answer = request.answer
        if answer is None:
            raise ToolsError("the guest's tools ended before they answered", mend="try again")
        if not answer.startswith("OK"):
            raise ToolsError(
                f"the guest's tools refuse {text!r}: {answer.removeprefix('ERROR ')}",
                mend="see the log of open-vm-tools in the guest",
            )
        return answer.removeprefix("OK").removeprefix(" ")

    def post(self, text: str) -> _Request:
        """As ``ask``, without waiting."""
        with self._lock:
            link = self._toolbox()
            if link is None:
                raise ToolsError(
                    "the guest's tools are not there",
                    mend="install and start open-vm-tools in the guest",
                )
            if len(link.requests) >= _WAITING_MAX:
                raise ToolsError(
                    "the guest's tools do not take what they are asked",
                    mend="look into the guest: its tools may hang",
                )
            request = _Request(text.encode(errors="surrogateescape"))
            link.requests.append(request)
            return request

    def opened(self, channel: int) -> None:
        with self._lock:
            self._links[channel] = _Link(deque([_Request(RESET)]))

    def closed(self, channel: int) -> None:
        with self._lock:
            link = self._links.pop(channel, None)
        if link is not None:
            for request in filter(None, [link.asked, *link.requests]):
                request.done.set()

    def message(self, channel: int, text: bytes) -> None:
        """The answer to what was fetched last; nothing is expected of the first message."""
        came = False
        with self._lock:
            link = self._links[channel]
            link.seen = time.monotonic()
            request, link.asked = link.asked, None
            if request is None:
                return
            answer = text.rstrip(b"\0").decode(errors="surrogateescape")
            if request.text == RESET:
                link.name = answer.rpartition("ATR ")[2][:64]
                came = link.name == TOOLBOX
            request.answer = answer
        request.done.set()
        if came:
            self._came()

    def waiting(self, channel: int) -> bytes | None:
        with self._lock:
            link = self._links[channel]
            link.seen = time.monotonic()
            return link.requests[0].text if link.requests and link.asked is None else None

    def fetched(self, channel: int) -> None:
        with self._lock:
            link = self._links[channel]
            if link.requests and link.asked is None:
                link.asked = link.requests.popleft()

    def _toolbox(self) -> _Link | None:
        for link in self._links.values():
            if link.name == TOOLBOX and time.monotonic() - link.seen < _GONE_S:
                return link
        return None
