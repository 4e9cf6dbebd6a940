"""Ethernet addresses of network cards (IEEE 802, 8.2)."""

from __future__ import annotations

import hashlib
import re
import secrets

from tetrarch.errors import ValueProblem

__all__ = ["format_mac", "parse_mac", "random_mac", "stable_mac"]

_MAC = re.compile(r"([0-9a-fA-F]{2})" + r"[:-]([0-9a-fA-F]{2})" * 5)


def parse_mac(text: str | None) -> bytes:
    match = _MAC.fullmatch(text) if text else None
    if match is None:
        shown = "nothing" if text is None else repr(text)
        raise ValueProblem(f"mac is {shown}", mend="write it as 52:54:00:12:34:56")
    mac = bytes.fromhex("".join(match.groups()))
    if mac[0] & 1 or not any(mac):
        raise ValueProblem(
            f"{text} is no address of one card", mend="let its first byte be even, as in 52:54:..."
        )
    return mac


def format_mac(mac: bytes) -> str:
    return mac.hex(":")


def stable_mac(name: str, index: int) -> bytes:
    """The same for the same machine and card: local, of one card."""
    return _local(hashlib.sha256(f"{name}/{index}".encode()).digest())


def random_mac() -> bytes:
    return _local(secrets.token_bytes(6))


def _local(noise: bytes) -> bytes:
    return b"\x02" + noise[1:6]
