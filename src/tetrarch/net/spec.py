"""A network card as it is written down: ``user[,forward=[HOST:]PORT:GUEST]…``, ``tap=NAME``…"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from tetrarch._words import options, shown, split
from tetrarch.errors import ValueProblem
from tetrarch.net.flow import FlowFilter
from tetrarch.net.mac import format_mac, parse_mac

__all__ = ["NET_DRIVERS", "Forward", "NetModel", "NetSpec", "each_its_own"]

NetKindName = Literal["user", "tap", "socket", "vhost-user"]
NetModel = Literal["virtio", "vmxnet3", "e1000"]

#: The cards that a guest can find, and QEMU's names of those devices.
NET_DRIVERS: Mapping[NetModel, str] = {
    "virtio": "virtio-net-pci",
    "vmxnet3": "vmxnet3",
    "e1000": "e1000",
}

#: What the data path has at most (crates/virtio/src/net.rs).
QUEUES_MAX = 16
# Linux' IFNAMSIZ, with the zero at the end. A % would be a pattern for the kernel.
_INTERFACE = re.compile(r"[^\s/:%\0]{1,15}")
_FORWARD = re.compile(r"(?:(\[[^\]]*\]|[^:]*):)?([0-9]{1,5}):([0-9]{1,5})")
# As many digits as what was read needs to be written again.
_TIME = re.compile(r"([0-9]{1,8}(?:\.[0-9]{1,18})?)(us|ms|s)")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,18})?)%")
_RATE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)([KMG]?)(?:bit)?", re.IGNORECASE)
_EXPONENTS = {"us": -6, "ms": -3, "s": 0}
_BITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_DELAY_MAX_S = 60.0
#: All addresses of the host.
_ANY = {"0.0.0.0", "::"}


class Forward(NamedTuple):
    """A TCP port of the host that is one of the guest."""

    host: str
    port: int
    guest: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}:{self.guest}"


@dataclass(frozen=True)
class NetSpec:
    """One network card of a machine, and what is behind it."""

    kind: NetKindName
    target: str = ""
    """The tap device's name, or a socket's path."""
    forward: tuple[Forward, ...] = ()
    bridge: str | None = None
    queues: int = 1
    """Pairs of queues."""
    model: NetModel = "virtio"
    """What the guest finds."""
    mac: bytes | None = None
    """None: by the machine's name."""
    mtu: int | None = None
    """What the driver is told to take."""
    pcap: Path | None = None
    """Where frames are written to."""
    delay: float = 0.0
    """Seconds, each way."""
    loss: float = 0.0
    """Of how many is lost each way: 0 to 1."""
    rate: int | None = None
    """Bits a second, each way."""
    filter: FlowFilter | None = field(default=None, compare=False)
    """Says which flows may pass; from Python alone."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(NetKindName):
            raise ValueProblem(f"{self.kind!r} is no network", mend=_KINDS)
        if self.kind != "user" and self.forward:
            raise ValueProblem(f"a {self.kind} has no forward=", mend="give it to user")
        if self.kind != "tap" and (self.bridge is not None or self.queues != 1):
            raise ValueProblem(
                f"{self.kind} has neither bridge= nor queues=", mend="give them to tap=NAME"
            )
        if self.model not in NET_DRIVERS:
            raise ValueProblem(f"{self.model!r} is no card", mend=_MODELS)
        if self.model != "virtio" and self.mtu is not None:
            raise ValueProblem(
                f"a {self.model} card tells its guest no MTU", mend="set mtu there, or take virtio"
            )
        if self.model == "e1000" and self.queues > 1:
            raise ValueProblem(
                f"an e1000 card has one queue, not {self.queues}", mend="leave out queues="
            )
        if self.kind == "vhost-user":
            self._only_the_card()
        self._each_port_once()
        if self.queues > 1 and (self.delay or self.loss or self.rate or self.filter):
            raise ValueProblem(
                f"{self.queues} queues cannot be slowed down or filtered as one",
                mend="give the card one",
            )

    def _each_port_once(self) -> None:
        for number, one in enumerate(self.forward):
            for other in self.forward[:number]:
                all_of_them = _ANY.intersection((one.host, other.host))
                if one.port == other.port and (one.host == other.host or all_of_them):
                    raise ValueProblem(
                        f"port {one.port} is forwarded twice", mend="forward another, or to one"
                    )

    def _only_the_card(self) -> None:
        """Frames do not pass here."""
        if self.model != "virtio":
            raise ValueProblem("a card by vhost-user is virtio's", mend="leave out model=")
        if self.pcap or self.delay or self.loss or self.rate or self.filter:
            raise ValueProblem(
                "a card by vhost-user has neither pcap=, delay=, loss=, rate= nor a filter",
                mend="give it mac= and mtu= alone",
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueProblem. A comma in a path is written twice."""
        first, *words = split(text)
        kind, equals, target = first.partition("=")
        if kind not in _TARGETS or "\0" in text or (kind == "user" and equals):
            raise ValueProblem(f"{text!r} is no network", mend=_KINDS)
        if wanted := _TARGETS[kind]:
            if not target:
                raise ValueProblem(f"{kind} names nothing", mend=f"write {kind}={wanted}")
            if kind == "tap":
                _interface("tap", target)
        values: dict[str, Any] = {"kind": kind, "target": target}
        forward = list[Forward]()
        for name, value in options(words, _OPTIONS, "a network", many=["forward"]):
            read = _OPTIONS[name](name, value)
            if name == "forward":
                forward.append(read)
            else:
                values[name] = read
        return cls(**values, forward=tuple(forward))

    def relative_to(self, directory: Path) -> Self:
        """With paths as they are written in a file of that directory."""
        a_path = self.kind in ("socket", "vhost-user")
        target = str(directory / self.target) if a_path else self.target
        pcap = None if self.pcap is None else directory / self.pcap
        return replace(self, target=target, pcap=pcap)

    def __str__(self) -> str:
        words = [f"{self.kind}={self.target}" if self.target else str(self.kind)]
        words += [f"forward={forward}" for forward in self.forward]
        for one in fields(self)[3:]:
            value = getattr(self, one.name)
            if value != one.default and one.name != "filter":
                words.append(f"{one.name}={_WRITTEN.get(one.name, str)(value)}")
        return ",".join(word.replace(",", ",,") for word in words)


def each_its_own(cards: Sequence[NetSpec]) -> None:
    """Raises ValueProblem where two cards of a machine have the same address or tap device."""
    macs = [card.mac for card in cards if card.mac is not None]
    taps = [card.target for card in cards if card.kind == "tap"]
    for mac in macs:
        if macs.count(mac) > 1:
            raise ValueProblem(
                f"two cards have mac={format_mac(mac)}", mend="give one of them another"
            )
    for tap in taps:
        if taps.count(tap) > 1:
            raise ValueProblem(f"two cards are at tap={tap}", mend="give each its own")


_MODELS = "give {}, {} or {}".format(*NET_DRIVERS)
_KINDS = "there are none, user, tap=NAME, socket=PATH and vhost-user=PATH"
_TARGETS = {"user": "", "tap": "NAME", "socket": "PATH", "vhost-user": "PATH"}


def _interface(name: str, value: str | None) -> str:
    if not value or not _INTERFACE.fullmatch(value) or value in (".", ".."):
        raise ValueProblem(
            f"{name} is {shown(value)}, which names no network device",
            mend="give up to 15 characters, none of them a space, '/', ':' or '%'",
        )
    return value


def _model(name: str, value: str | None) -> str:
    if value is None or value not in NET_DRIVERS:
        raise ValueProblem(f"{name} is {shown(value)}", mend=_MODELS)
    return value


def _forward(name: str, value: str | None) -> Forward:
    match = _FORWARD.fullmatch(value or "")
    port, guest = (int(match[2]), int(match[3])) if match else (0, 0)
    if match is None or not 0 < port < 1 << 16 or not 0 < guest < 1 << 16:
        raise ValueProblem(f"{name} is {shown(value)}", mend="write [HOST:]PORT:GUEST, as 2222:22")
    host = match[1].strip("[]") if match[1] else "127.0.0.1"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueProblem(
            f"{name}: {host!r} is no IP address", mend="give one of the host's, or 0.0.0.0 for all"
        ) from None
    return Forward(host, port, guest)


def _number(least: int, most: int) -> Callable[[str, str | None], int]:
    def read(name: str, value: str | None) -> int:
        if not value or not re.fullmatch("[0-9]{1,9}", value) or not least <= int(value) <= most:
            raise ValueProblem(f"{name} is {shown(value)}", mend=f"give {least} to {most}")
        return int(value)

    return read


def _delay(name: str, value: str | None) -> float:
    match = _TIME.fullmatch(value or "")
    seconds = float(Decimal(match[1]).scaleb(_EXPONENTS[match[2]])) if match else -1
    if not 0 <= seconds <= _DELAY_MAX_S:
        raise ValueProblem(f"{name} is {shown(value)}", mend="write 20ms, 500us or 1s, up to 60s")
    return seconds


def _loss(name: str, value: str | None) -> float:
    match = _PERCENT.fullmatch(value or "")
    percent = Decimal(match[1]) if match else 101
    if percent > 100:
        raise ValueProblem(f"{name} is {shown(value)}", mend="write 1% or 0.1%, up to 100%")
    return float(Decimal(percent).scaleb(-2))


def _rate(name: str, value: str | None) -> int:
    match = _RATE.fullmatch(value or "")
    rate = int(Decimal(match[1]) * _BITS[match[2].upper()]) if match else 0
    if rate <= 0:
        raise ValueProblem(f"{name} is {shown(value)}", mend="write bits a second: 10M, 64K")
    return rate


def _pcap(name: str, value: str | None) -> Path:
    if not value:
        raise ValueProblem(f"{name} is {shown(value)}", mend="name a file")
    return Path(value)


_OPTIONS: dict[str, Callable[[str, str | None], Any]] = {
    "forward": _forward,
    "bridge": _interface,
    "queues": _number(1, QUEUES_MAX),
    "model": _model,
    "mac": lambda _, value: parse_mac(value),
    # What IPv4 asks of a network at least (RFC 791), and virtio's field holds.
    "mtu": _number(68, 65535),
    "pcap": _pcap,
    "delay": _delay,
    "loss": _loss,
    "rate": _rate,
}


def _scaled(value: float, exponent: int) -> str:
    """All digits of a value times a power of ten, none of them an exponent's."""
    text = f"{Decimal(repr(value)).scaleb(exponent):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


_WRITTEN: dict[str, Callable[[Any], str]] = {
    "mac": format_mac,
    "delay": lambda seconds: f"{_scaled(seconds, 6)}us",
    "loss": lambda part: f"{_scaled(part, 2)}%",
}
