"""Registers and memory of a machine of another process, by QMP.

Memory comes and goes in a file of ours that the machine is lent: it is no text, and a confined
machine opens none.
"""

from __future__ import annotations

import base64
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tetrarch._native import EngineError, GuestMemoryError
from tetrarch.control.client import Client, ControlError

__all__ = ["RemoteVcpu", "RemoteVm"]

Connect = Callable[[], Client]


class RemoteVm:
    """What ``PhysicalMemory`` and ``LinearMemory`` ask of an engine."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    @property
    def ram(self) -> list[tuple[int, int]]:
        with self._connect() as client:
            return [(one["base"], one["size"]) for one in client.execute("x-ram")]

    def read_memory(self, address: int, length: int) -> bytes:
        if not length:
            return b""
        with self._lent(b"") as (client, name, file):
            arguments = {"val": address, "size": length, "filename": name}
            _memory(client, "pmemsave", arguments)
            with mmap.mmap(file, length, prot=mmap.PROT_READ) as data:
                return data[:]

    def write_memory(self, address: int, data: bytes) -> None:
        with self._lent(data) as (client, name, _):
            _memory(client, "x-memory-write", {"val": address, "filename": name})

    @contextmanager
    def _lent(self, data: bytes) -> Iterator[tuple[Client, str, int]]:
        """A client, and a file that the machine has under a name."""
        descriptor = os.memfd_create("tetrarch-memory", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "w+b") as file, self._connect() as client:
            file.write(data)
            file.flush()
            added = client.execute("add-fd", {}, descriptors=[descriptor])
            yield client, f"/dev/fdset/{added['fdset-id']}", descriptor


class RemoteVcpu:
    """What ``VcpuView`` asks of a vCPU."""

    def __init__(self, connect: Connect, index: int) -> None:
        self._connect = connect
        self._index = index

    def regs(self) -> dict[str, int]:
        return dict(self._ask("x-registers"))

    def set_regs(self, values: dict[str, int]) -> None:
        self._ask("x-registers", set=values)

    def xsave(self) -> bytes:
        return base64.b64decode(self._ask("x-xsave"))

    def set_xsave(self, image: bytes) -> None:
        self._ask("x-xsave", set=base64.b64encode(image).decode())

    def msr(self, index: int) -> int | None:
        value: int | None = self._ask("x-msr", index=index)["value"]
        return value

    def set_msr(self, index: int, value: int) -> bool:
        try:
            self._ask("x-msr", index=index, set=value)
        except EngineError:
            return False
        return True

    def translate(self, linear: int) -> int | None:
        physical: int | None = self._ask("x-translate", address=linear)["physical"]
        return physical

    def dump(self) -> str:
        with self._connect() as client:
            arguments = {"command-line": "info registers", "cpu-index": self._index}
            return str(client.execute("human-monitor-command", arguments))

    def _ask(self, command: str, **arguments: Any) -> Any:
        with self._connect() as client:
            try:
                return client.execute(command, {"cpu-index": self._index, **arguments})
            except ControlError as error:
                raise EngineError(str(error)) from None


def _memory(client: Client, command: str, arguments: dict[str, Any]) -> None:
    try:
        client.execute(command, arguments)
    except ControlError as error:
        raise GuestMemoryError(str(error)) from None
