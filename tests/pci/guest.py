"""A guest that makes the accesses it is told to: a test is its driver."""

from __future__ import annotations

import contextlib
import queue
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tetrarch import Machine
from tetrarch.machine.config import EngineName
from tetrarch.testing import pvh_kernel

ORDERS: Final = 0x510
MAILBOX: Final = 0x20_0000
NOTHING: Final = 0xFF
PATIENCE_S: Final = 30.0

# What an order does: the place in the table behind the code.
WRITE: Final = {1: 0, 2: 1, 4: 2, 8: 3}
READ: Final = {1: 4, 2: 5, 4: 6, 8: 7}
OUT: Final = {1: 8, 2: 9, 4: 10}
IN: Final = {1: 11, 2: 12, 4: 13}

CODE: Final = bytes.fromhex(
    "be00002000"  #                mov esi, MAILBOX: address, then value or result
    # next:
    "ba10050000 ed 89c1"  #        mov edx, ORDERS ; in eax, dx ; mov ecx, eax
    "83f90d 77f3"  #               cmp ecx, 13 ; ja next
    "8b16 8b4604"  #               mov edx, [esi] ; mov eax, [esi+4]
    "bf7c001000 ff248f"  #         mov edi, table ; jmp [edi+4*ecx]
    "8802 eb50"  #                 mov [edx], al ; jmp done
    "668902 eb4b"  #               mov [edx], ax
    "8902 eb47"  #                 mov [edx], eax
    "0f6f4604 0f7f02 eb3e"  #      movq mm0, [esi+4] ; movq [edx], mm0
    "8a02 884604 eb37"  #          mov al, [edx] ; mov [esi+4], al
    "668b02 66894604 eb2e"  #      mov ax, [edx] ; mov [esi+4], ax
    "8b02 894604 eb27"  #          mov eax, [edx] ; mov [esi+4], eax
    "0f6f02 0f7f4604 eb1e"  #      movq mm0, [edx] ; movq [esi+4], mm0
    "ee eb1b 66ef eb17 ef eb14"  # out dx, al ; out dx, ax ; out dx, eax
    "ec 884604 eb0e"  #            in al, dx ; mov [esi+4], al
    "66ed 66894604 eb06"  #        in ax, dx ; mov [esi+4], ax
    "ed 894604 eb00"  #            in eax, dx ; mov [esi+4], eax
    # done:
    "ba10050000 ef eb8a"  #        mov edx, ORDERS ; out dx, eax ; jmp next
    "90"  #                        table:
    "1f00100023001000280010002c001000350010003c00100045001000"
    "4c00100055001000580010005c0010005f001000650010006d001000"
)


class _Orders:
    """The port where the guest asks what to do, and says that it is done."""

    def __init__(self) -> None:
        self.next: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.asked = threading.Event()

    def read(self, offset: int, size: int) -> int:
        self.asked.set()
        try:
            return self.next.get(timeout=0.01)
        except queue.Empty:
            return NOTHING  # between two instructions now and then, so that it can be held

    def write(self, offset: int, size: int, value: int) -> None:
        self.done.put(None)

    def save(self) -> dict[str, int]:
        return {}

    def load(self, state: dict[str, int]) -> None:
        pass


class Guest:
    """A machine with such a guest, which runs as long as a ``with`` statement lasts."""

    def __init__(self, engine: EngineName, saved: Path | None = None, rng: bool = False) -> None:
        self._orders = _Orders()
        # A reset loads it again.
        self._kernel = tempfile.NamedTemporaryFile()  # noqa: SIM115 (closed with the machine)
        self._kernel.write(pvh_kernel(CODE))
        self._kernel.flush()
        if saved is None:
            kernel = self._kernel.name
            self.machine = Machine(
                engine=engine,
                kernel=kernel,
                memory="16M",
                rng=rng,
                balloon=False,
                on_reset="restart",
            )
        else:
            self.machine = Machine.restore(saved, engine=engine)
        self.machine.attach_ports(ORDERS, 4, self._orders, name="orders")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.machine.__exit__(kind, error, traceback)
        self._kernel.close()

    def order(self, what: int, address: int, value: int = 0) -> bytes:
        """The eight bytes that are in the guest's mailbox afterwards."""
        entry = address.to_bytes(4, "little") + value.to_bytes(8, "little")
        self.machine.write_memory(MAILBOX, entry)
        self._orders.next.put(what)
        self._orders.done.get(timeout=PATIENCE_S)
        return self.machine.read_memory(MAILBOX + 4, 8)

    def reset(self) -> None:
        """By port 0xCF9; returns when the guest asks for orders again."""
        self.machine.write_memory(MAILBOX, (0xCF9).to_bytes(4, "little") + bytes([6] + 7 * [0]))
        self._orders.next.put(OUT[1])
        before = self.machine.resets
        while self.machine.resets == before:
            self._orders.asked.clear()
            assert self._orders.asked.wait(PATIENCE_S)
        self._orders.asked.clear()
        assert self._orders.asked.wait(PATIENCE_S)
        # The old guest may have said that it is done.
        with contextlib.suppress(queue.Empty):
            self._orders.done.get_nowait()

    def read(self, address: int, size: int = 4) -> int:
        return int.from_bytes(self.order(READ[size], address)[:size], "little")

    def write(self, address: int, value: int, size: int = 4) -> None:
        self.order(WRITE[size], address, value)

    def port_in(self, port: int, size: int = 4) -> int:
        return int.from_bytes(self.order(IN[size], port)[:size], "little")

    def port_out(self, port: int, value: int, size: int = 4) -> None:
        self.order(OUT[size], port, value)
