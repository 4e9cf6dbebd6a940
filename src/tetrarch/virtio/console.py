"""Console device (virtio 1.2, 5.3): terminals and named pipes of the guest.

The bytes are Rust's (``crates/virtio/src/console.rs``). One terminal alone is a device without
control queues, whose size is in the configuration; more than that, or a port with a name, is
offered MULTIPORT.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import VirtioConsole
from tetrarch.errors import ConfigError, StateError

if TYPE_CHECKING:
    from tetrarch._native import VirtioPortState, Vm

__all__ = ["ConsoleKind", "ConsolePort"]

# Feature bits (5.3.3).
SIZE: Final = 1 << 0
MULTIPORT: Final = 1 << 1
EMERG_WRITE: Final = 1 << 2

#: Descriptors of a queue; Linux fills those for input with a page each.
_QUEUE_SIZE: Final = 64
#: struct virtio_console_config (5.3.4): columns, rows, ports at most, emergency write.
_CONFIG: Final = struct.Struct("<HHII")
_EMERGENCY: Final = 8
#: What a saved state may hold of input that the guest has not taken.
_INPUT_BYTES_MAX: Final = 1 << 20


class ConsolePort:
    """One port, as the line to its back end uses it: see ``SerialPort``."""

    def __init__(self, kind: ConsoleKind, index: int) -> None:
        self._kind = kind
        self._path = kind.data_path
        self._index = index

    def receive(self, data: bytes) -> None:
        self._path.receive(self._index, data)

    @property
    def queued(self) -> int:
        return self._path.queued(self._index)

    def wait_output(self) -> bytes:
        return self._path.wait_output(self._index)

    def flush_output(self, timeout: float) -> bool:
        return self._path.flush_output(self._index, timeout)

    def end_output(self) -> None:
        self._path.end_output(self._index)

    def resize(self, rows: int, columns: int) -> None:
        """The terminal behind it has another size; zeroes where there is none."""
        self._kind.resize(self._index, rows, columns)


class ConsoleKind:
    device_id: Final = 3
    name: Final = "console"

    def __init__(self, vm: Vm, ports: Sequence[str]) -> None:
        """``ports`` has their names; one without is a terminal."""
        if len(ports) > VirtioConsole.MAX_PORTS:
            raise ConfigError(
                f"a virtio console of {len(ports)} ports",
                mend=f"give {VirtioConsole.MAX_PORTS} or less",
            )
        multiport = len(ports) > 1 or bool(ports[0])
        self.features = SIZE | EMERG_WRITE | (MULTIPORT if multiport else 0)
        self.data_path = VirtioConsole(vm, self.name, ports, multiport)
        self.queue_sizes: Sequence[int] = (_QUEUE_SIZE,) * self.data_path.queue_count
        self.ports = [ConsolePort(self, index) for index in range(len(ports))]
        self._size = (0, 0)

    @property
    def config(self) -> bytes:
        rows, columns = self._size
        return _CONFIG.pack(columns, rows, len(self.ports), 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """A character of a driver that has no queues yet, or none any more."""
        if offset == _EMERGENCY:
            self.data_path.emergency(data[0])

    def resize(self, port: int, rows: int, columns: int) -> None:
        rows, columns = (max(0, min(size, 0xFFFF)) for size in (rows, columns))
        if port == 0:
            self._size = rows, columns
            self.data_path.config_changed()
        self.data_path.resize(port, columns, rows)

    def negotiated(self, features: int) -> None:
        pass

    def save(self) -> dict[str, Any]:
        states = self.data_path.states()
        return {"ports": [{**state, "input": state["input"].hex()} for state in states]}

    def load(self, state: dict[str, Any]) -> None:
        ports = state.get("ports")
        if not isinstance(ports, list) or len(ports) != len(self.ports):
            raise StateError(
                "the saved console has other ports than this one",
                mend="make the machine as it was when it was saved",
            )
        self.data_path.set_states([_port_state(port) for port in ports])


def _port_state(saved: object) -> VirtioPortState:
    try:
        if not isinstance(saved, dict):
            raise TypeError
        return {
            "input": bytes.fromhex(saved["input"])[:_INPUT_BYTES_MAX],
            "sent": int(saved["sent"]) & 0xFFFF_FFFF,
            "known": bool(saved["known"]),
            "open": bool(saved["open"]),
            "due": int(saved["due"]) & 0xFF,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(
            "a saved port of the console is none", mend="save it again: it is damaged"
        ) from error
