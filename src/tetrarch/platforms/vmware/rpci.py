"""RPCI: requests of the guest's programs, a line of text each, and their answers: "1 " and a
result, or "0 " and why not (open-vm-tools, lib/rpcOut/rpcout.c)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

__all__ = ["RPCI", "RpcRefused", "Rpci"]

#: The protocol's number, "RPCI".
RPCI: Final = 0x4943_5052

UNKNOWN: Final = "Unknown command"


class RpcRefused(Exception):
    """What the guest is told instead of a result."""


class Rpci:
    """Calls the handler of a request's first word with the rest of it.

    Text that is no UTF-8 comes through as it is, by surrogates (PEP 383).
    """

    def __init__(self, requests: Mapping[str, Callable[[str], str]]) -> None:
        self._requests = requests
        self._answers: dict[int, bytes] = {}

    def opened(self, channel: int) -> None:
        self._answers.pop(channel, None)

    def closed(self, channel: int) -> None:
        self._answers.pop(channel, None)

    def message(self, channel: int, text: bytes) -> None:
        # A C program counts the zero behind its words.
        line = text.rstrip(b"\0").decode(errors="surrogateescape")
        word, _, rest = line.partition(" ")
        try:
            if (handler := self._handler(word)) is None:
                raise RpcRefused(UNKNOWN)
            answer = f"1 {handler(rest)}"
        except RpcRefused as refusal:
            answer = f"0 {refusal}"
        self._answers[channel] = answer.encode(errors="surrogateescape")

    def waiting(self, channel: int) -> bytes | None:
        return self._answers.get(channel)

    def fetched(self, channel: int) -> None:
        self._answers.pop(channel, None)

    def _handler(self, word: str) -> Callable[[str], str] | None:
        """That of the whole word, or of ``family.*`` where its last part alone differs."""
        family = f"{word.rpartition('.')[0]}.*"
        return self._requests.get(word) or self._requests.get(family)
