"""Messages over the backdoor: channels between programs in the guest and services of the host
(open-vm-tools, lib/include/guest_msg_def.h and lib/message/message.c).

The guest opens a channel to a protocol, sends a message and fetches one, each in pieces of four
bytes, or whole by high bandwidth. A service is told of each whole message, and says what there is
to fetch.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Final, Protocol

from tetrarch.devices._state import State
from tetrarch.platforms.vmware.backdoor import MAGIC, low
from tetrarch.platforms.vmware.strings import fetch, store

if TYPE_CHECKING:
    from tetrarch._native import GuestCall

__all__ = ["MESSAGE", "STRING_MESSAGE", "Channels", "Service"]

#: The backdoor's command, and that of high bandwidth.
MESSAGE: Final = 30
STRING_MESSAGE: Final = 0

OPEN: Final = 0
SEND_SIZE: Final = 1
SEND_PAYLOAD: Final = 2
RECEIVE_SIZE: Final = 3
RECEIVE_PAYLOAD: Final = 4
RECEIVE_STATUS: Final = 5
CLOSE: Final = 6

SUCCESS: Final = 0x0001
DO_RECEIVE: Final = 0x0002
#: High bandwidth can be used for what follows.
HIGH_BANDWIDTH: Final = 0x0080

_COOKIE: Final = 0x8000_0000
MAX_CHANNELS: Final = 8
MAX_MESSAGE: Final = 64 << 10
#: A program that ended without closing its channel keeps it no longer than that.
_IDLE_S: Final = 30.0


class Service(Protocol):
    """The host's end of a protocol."""

    def opened(self, channel: int) -> None: ...
    def closed(self, channel: int) -> None: ...
    def message(self, channel: int, text: bytes) -> None: ...
    def waiting(self, channel: int) -> bytes | None:
        """What the guest can fetch; the same until it has done so."""

    def fetched(self, channel: int) -> None: ...


@dataclass
class _Channel:
    protocol: int
    cookies: tuple[int, int]
    """Who knows them may use it; (0, 0) is a guest that asked for none."""
    size: int | None = None
    """Of the message that the guest sends."""
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: bytes | None = None
    """What the guest fetches."""
    fetched: int = 0
    used: float = field(default_factory=time.monotonic)


class Channels:
    """Handles the command, from any vCPU."""

    def __init__(self, services: Mapping[int, Service]) -> None:
        """``services`` by the protocol's number."""
        self.high_bandwidth = True
        """Whether the guest is told that there is one."""
        self._services = services
        self._channels: dict[int, _Channel] = {}
        self._lock = Lock()

    def reset(self) -> None:
        with self._lock:
            for number in list(self._channels):
                self._drop(number)

    def save(self) -> State:
        """A channel does not go along: its program opens another where it is refused."""
        return {"device": "vmware-channels", "version": 1}

    def load(self, state: State) -> None:
        self.reset()

    def command(self, call: GuestCall) -> int:
        kind, number = low(call, "rcx") >> 16, low(call, "rdx") >> 16
        with self._lock:
            status = self._open(call) if kind == OPEN else self._use(call, kind, number)
        call["rcx"] = status << 16 | MESSAGE
        return MAGIC

    def string(self, call: GuestCall, out: bool) -> None:
        """The rest of a message at once, with cookies where the addresses leave room for them.

        A fault of the guest's ends it before anything has changed.
        """
        low_cookie, high_cookie = ("rdi", "rbp") if out else ("rbp", "rsi")
        cookies, length = (low(call, high_cookie), low(call, low_cookie)), low(call, "rcx")
        with self._lock:
            channel = self._channels.get(number := low(call, "rdx") >> 16)
            status = 0
            if self.high_bandwidth and channel is not None and channel.cookies in ((0, 0), cookies):
                channel.used = time.monotonic()
                take = self._take if out else self._give
                status = take(call, number, channel, length)
        call["rbx"] = status << 16 | STRING_MESSAGE

    def _take(self, call: GuestCall, number: int, channel: _Channel, length: int) -> int:
        if channel.size is None or length > channel.size - len(channel.incoming):
            return 0
        channel.incoming += fetch(call, call["rsi"], length)
        self._complete(number, channel, self._services[channel.protocol])
        _advance(call, "rsi", length)
        return SUCCESS

    def _give(self, call: GuestCall, number: int, channel: _Channel, length: int) -> int:
        if channel.outgoing is None or length > len(channel.outgoing) - channel.fetched:
            return 0
        store(call, call["rdi"], channel.outgoing[channel.fetched : channel.fetched + length])
        channel.fetched += length
        _advance(call, "rdi", length)
        return SUCCESS

    def _open(self, call: GuestCall) -> int:
        argument = low(call, "rbx")
        protocol = argument & ~_COOKIE
        if protocol not in self._services or (number := self._free()) is None:
            return 0
        cookies = (0, 0)
        if argument & _COOKIE:
            cookies = (secrets.randbits(32), secrets.randbits(32))
            call["rsi"], call["rdi"] = cookies
        self._channels[number] = _Channel(protocol, cookies)
        self._services[protocol].opened(number)
        call["rdx"] = number << 16 | low(call, "rdx") & 0xFFFF
        return SUCCESS

    def _free(self) -> int | None:
        """A number for a new channel: where all are taken, that which nobody has used for long."""
        for number in range(MAX_CHANNELS):
            if number not in self._channels:
                return number
        oldest = min(self._channels, key=lambda number: self._channels[number].used)
        if time.monotonic() - self._channels[oldest].used < _IDLE_S:
            return None
        self._drop(oldest)
        return oldest

    def _use(self, call: GuestCall, kind: int, number: int) -> int:
        channel = self._channels.get(number)
        if channel is None or channel.cookies not in (
            (0, 0),
            (low(call, "rsi"), low(call, "rdi")),
        ):
            return 0
        channel.used = time.monotonic()
        service, argument = self._services[channel.protocol], low(call, "rbx")
        if kind == SEND_SIZE:
            return self._send_size(number, channel, service, argument)
        if kind == SEND_PAYLOAD:
            return self._send_payload(number, channel, service, argument)
        if kind == RECEIVE_SIZE:
            return self._receive_size(call, number, channel, service)
        if kind == RECEIVE_PAYLOAD:
            return self._receive_payload(call, channel)
        if kind == RECEIVE_STATUS:
            return self._receive_status(number, channel, service, argument)
        if kind == CLOSE:
            self._drop(number)
            return SUCCESS
        return 0

    def _send_size(self, number: int, channel: _Channel, service: Service, size: int) -> int:
        if size > MAX_MESSAGE:
            return 0
        channel.size = size
        channel.incoming.clear()
        self._complete(number, channel, service)
        return SUCCESS | self._offered(size)

    def _offered(self, size: int) -> int:
        return HIGH_BANDWIDTH if self.high_bandwidth and size else 0

    def _send_payload(self, number: int, channel: _Channel, service: Service, piece: int) -> int:
        if channel.size is None:
            return 0
        channel.incoming += piece.to_bytes(4, "little")[: channel.size - len(channel.incoming)]
        self._complete(number, channel, service)
        return SUCCESS

    def _complete(self, number: int, channel: _Channel, service: Service) -> None:
        if channel.size == len(channel.incoming):
            channel.size = None
            channel.outgoing = None
            service.message(number, bytes(channel.incoming))
            channel.incoming.clear()

    def _receive_size(
        self, call: GuestCall, number: int, channel: _Channel, service: Service
    ) -> int:
        channel.outgoing, channel.fetched = service.waiting(number), 0
        if channel.outgoing is None:
            return SUCCESS
        call["rbx"] = len(channel.outgoing)
        call["rdx"] = SEND_SIZE << 16 | low(call, "rdx") & 0xFFFF
        return SUCCESS | DO_RECEIVE | self._offered(len(channel.outgoing))

    def _receive_payload(self, call: GuestCall, channel: _Channel) -> int:
        if channel.outgoing is None or channel.fetched >= len(channel.outgoing):
            return 0
        piece = channel.outgoing[channel.fetched : channel.fetched + 4]
        channel.fetched += len(piece)
        call["rbx"] = int.from_bytes(piece, "little")
        call["rdx"] = SEND_PAYLOAD << 16 | low(call, "rdx") & 0xFFFF
        return SUCCESS

    def _receive_status(self, number: int, channel: _Channel, service: Service, status: int) -> int:
        if channel.outgoing is None or channel.fetched < len(channel.outgoing):
            return 0
        channel.outgoing = None
        if status & SUCCESS:
            service.fetched(number)
        return SUCCESS

    def _drop(self, number: int) -> None:
        channel = self._channels.pop(number)
        self._services[channel.protocol].closed(number)


def _advance(call: GuestCall, register: str, length: int) -> None:
    """As REP does, at its end."""
    call[register] = call[register] + length & 0xFFFF_FFFF_FFFF_FFFF
    call["rcx"] = 0
