"""Tap devices and bridges of the host (Linux, Documentation/networking/tuntap.rst).

A device that is there is used as it is; one that is not is made, and goes with the card.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from tetrarch.errors import HostError

__all__ = ["Tap"]

_DEVICE: Final = "/dev/net/tun"

# linux/if_tun.h
_TUNSETIFF: Final = 0x4004_54CA
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_TYPE_TAP: Final = 2

_IFREQ: Final = struct.Struct("16sH22x")


class Tap:
    """The queues of a tap device, as ``descriptors``, until ``close``."""

    def __init__(self, name: str, queues: int, bridge: str | None) -> None:
        """Raises HostError where the host does not give it."""
        self._name = name
        self._made = False
        self._bridged = False
        self.descriptors: list[int] = []
        with _netlink() as links:
            port = None if bridge is None else _bridge(links, bridge)
            several = _several(links, name, queues)
            self._made = several is None
            try:
                self._open(queues, queues > 1 if several is None else several)
                self._set_up(links, port)
            except BaseException:
                self._close_queues()
                raise

    def _open(self, queues: int, several: bool) -> None:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if several else 0)
        request = _IFREQ.pack(self._name.encode(), flags)
        for _ in range(queues):
            try:
                descriptor = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise HostError(
                    f"cannot open {_DEVICE}: {error.strerror}",
                    mend="load it (modprobe tun), or ask for the right to use it",
                ) from error
            self.descriptors.append(descriptor)
            try:
                fcntl.ioctl(descriptor, _TUNSETIFF, request)
            except OSError as error:
                raise self._refused(error) from error

    def _refused(self, error: OSError) -> HostError:
        user = f"ip tuntap add {self._name} mode tap user $USER"
        if error.errno == errno.EPERM:
            what = "make" if self._made else "use"
            return HostError(
                f"no right to {what} the tap device {self._name}: it takes CAP_NET_ADMIN",
                mend=f"let root run: {user}; or use a user network",
            )
        if error.errno == errno.EBUSY:
            return HostError(
                f"another program has the tap device {self._name}", mend="name another"
            )
        return HostError(
            f"the tap device {self._name} cannot be had: {error.strerror}",
            mend=f"make it anew: {user}",
        )

    def _set_up(self, links: IPRoute, bridge: int | None) -> None:
        link = _find(links, self._name)
        if link is None:
            raise HostError(f"the tap device {self._name} has gone", mend="make it anew")
        changes: dict[str, Any] = {}
        if bridge is not None and link.get_attr("IFLA_MASTER") != bridge:
            changes["master"] = bridge
        if link["state"] != "up":
            changes["state"] = "up"
        if not changes:
            return
        try:
            links.link("set", index=link["index"], **changes)
        except NetlinkError as error:
            what = "put into its bridge" if "master" in changes else "switched on"
            raise HostError(
                f"the tap device {self._name} cannot be {what}: {os.strerror(error.code)}",
                mend=f"let root do it: ip link set {self._name} up, and master BRIDGE",
            ) from error
        self._bridged = "master" in changes

    def close(self) -> None:
        """Leaves the host as it was."""
        self._close_queues()
        if self._bridged and not self._made:
            with _netlink() as links:
                link = _find(links, self._name)
                if link is not None:
                    links.link("set", index=link["index"], master=0)

    def _close_queues(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


@contextmanager
def _netlink() -> Iterator[IPRoute]:
    try:
        with IPRoute() as links:
            yield links
    except NetlinkError as error:
        raise HostError(
            f"the host's network cannot be asked: {os.strerror(error.code)}",
            mend="look into the host's kernel log",
        ) from error


def _find(links: IPRoute, name: str) -> Any:
    """The network device of a name; None where there is none."""
    found = links.link_lookup(ifname=name)
    return links.get_links(found[0])[0] if found else None


def _kind(link: Any) -> str:
    info = link.get_attr("IFLA_LINKINFO")
    return (info.get_attr("IFLA_INFO_KIND") if info else None) or "network device"


def _bridge(links: IPRoute, name: str) -> int:
    link = _find(links, name)
    if link is None:
        raise HostError(
            f"there is no bridge {name}", mend=f"make it: ip link add {name} type bridge"
        )
    if _kind(link) != "bridge":
        raise HostError(f"{name} is no bridge but a {_kind(link)}", mend="name a bridge")
    index: int = link["index"]
    return index


def _several(links: IPRoute, name: str, queues: int) -> bool | None:
    """Whether the device was made for several queues; None where there is none."""
    link = _find(links, name)
    if link is None:
        return None
    info = link.get_attr("IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    if _kind(link) != "tun" or data is None:
        raise HostError(f"{name} is no tap device but a {_kind(link)}", mend="name another")
    if data.get_attr("IFLA_TUN_TYPE") != _TYPE_TAP:
        raise HostError(f"{name} is no tap device but a tun device", mend="name another")
    several = bool(data.get_attr("IFLA_TUN_MULTI_QUEUE"))
    if queues > 1 and not several:
        raise HostError(
            f"the tap device {name} has one queue, not {queues}",
            mend=f"make it anew: ip tuntap add {name} mode tap multi_queue",
        )
    return several
