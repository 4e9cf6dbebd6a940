"""Guests that do anything with VMCI and the connections over it, and then a good driver."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from pathlib import Path

from tests.fuzz.input import Input
from tests.platforms.vmci import (
    ATTACH,
    CONTROL,
    HOST,
    IN_LOW,
    NEGOTIATE2,
    OFFER,
    OUT_LOW,
    PAGE,
    RAM,
    REQUEST2,
    RESET,
    Driver,
)

from tetrarch.pci.function import BUS_MASTER, COMMAND

PORT = 80
#: Pages that the guest may name: some of its memory, and what is none.
PAGES = [0, 1, 2, 3, 4, RAM // PAGE - 1, RAM // PAGE, 1 << 40, (1 << 52) - 1, (1 << 64) - 1] * 2


class Host:
    """Its programs: one that listens, and those that call."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "vsock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{self.path}_{PORT}")
        self.listener.listen(8)
        self.listener.setblocking(False)
        self.streams: list[socket.socket] = []

    def act(self, source: Input) -> None:
        with contextlib.suppress(BlockingIOError):
            self.streams.append(self.listener.accept()[0])
        match source.number(1) & 3:
            case 0 if len(self.streams) < 8:
                stream = socket.socket(socket.AF_UNIX)
                self.streams.append(stream)
                with contextlib.suppress(BlockingIOError):
                    stream.setblocking(False)
                    stream.connect(str(self.path))
                    stream.sendall(b"CONNECT %d\n" % (source.number(1) & 3))
            case 1 if self.streams:
                self.streams.pop(source.number(1) % len(self.streams)).close()
            case 2 if self.streams:
                stream = self.streams[source.number(1) % len(self.streams)]
                stream.setblocking(False)
                with contextlib.suppress(OSError):
                    stream.send(bytes(source.number(2)))
            case 3 if self.streams:
                stream = self.streams[source.number(1) % len(self.streams)]
                stream.setblocking(False)
                with contextlib.suppress(OSError):
                    stream.recv(source.number(2) + 1)

    def close(self) -> None:
        for one in (self.listener, *self.streams):
            one.close()


def vmci(data: bytes) -> None:
    source = Input(data)
    folder = Path(tempfile.mkdtemp(prefix="vmci-"))
    host = Host(folder)
    transfers = bool(source.number(1) & 1)
    driver = Driver(sockets=host.path, transfers=transfers, wide=bool(source.number(1) & 1))
    try:
        driver.start()
        while source.left:
            _step(source, driver, host)
        # A good driver has connections again.
        driver.device.load(driver.device.save())
        driver.device.function.write_config(COMMAND, 2, BUS_MASTER)
        driver.transfers, driver._next_page = True, 0x200
        driver.write(CONTROL, RESET)
        driver.start()
        driver.packets.clear()
        driver.events.clear()
        with contextlib.suppress(BlockingIOError):
            while True:
                host.listener.accept()[0].close()
        stream = driver.connect(PORT, 77)
        host.listener.setblocking(True)
        host.listener.settimeout(30)
        client = host.listener.accept()[0]
        with client:
            client.settimeout(30)
            stream.write(b"good")
            assert client.recv(10) == b"good"
    finally:
        driver.device.close()
        host.close()
        shutil.rmtree(folder)


def _handle(source: Input) -> tuple[int, int]:
    kind = source.number(1)
    # One of the guest's few, the host's first ones, or any.
    if kind & 0x80:
        return source.number(4), source.number(4)
    return (HOST, 1024 + (kind & 7)) if kind & 0x40 else (3, kind & 7)


def _step(source: Input, driver: Driver, host: Host) -> None:
    choice = source.number(1)
    if choice & 15 < 8 and not driver.device.function.bus_master:
        driver.device.function.write_config(COMMAND, 2, BUS_MASTER)
    match choice & 15:
        case 0 | 1:
            offset, size = source.number(1) & 0x3F, (1, 2, 4, 8)[choice >> 4 & 3]
            if choice & 1:
                driver.ports.write(offset, size, source.number(size))
            else:
                assert 0 <= driver.ports.read(offset, size) < 1 << 8 * size
        case 2:
            context = (0, HOST, 3, 7)[choice >> 4 & 3]
            driver.send(source.number(1) % 16, source.bytes(choice >> 6 << 4), context)
        case 3 | 4:
            _tell(source, driver, choice >> 4)
        case 5 | 6:
            size, first = source.number(2) + 1, source.number(1)
            listed = [PAGES[(first + at) % 5 if first & 1 else first >> 4] for at in range(40)]
            need = 2 * (1 + (size + PAGE - 1) // PAGE)
            pages = listed[: need if choice & 16 else first % 40]
            driver.alloc(_handle(source), size, size, pages, flags=choice >> 5 & 1)
        case 7:
            driver.detach(_handle(source))
        case 8 | 9 | 10:
            # Headers and bytes of rings, and of transfers.
            at = source.number(1) % 5 * PAGE + (choice >> 4) * 4
            driver.vm.write_memory(at, source.bytes(4))
        case 11:
            register = IN_LOW if choice & 16 else OUT_LOW
            driver.write(register, RAM - source.number(1) if choice & 32 else source.number(2))
        case 12:
            driver.device.function.write_config(COMMAND, 2, BUS_MASTER * (choice >> 4 & 1))
        case 13 if choice & 0xC0 == 0:
            driver.device.load(driver.device.save())
        case 14 if choice & 0xC0 == 0:
            driver.write(CONTROL, RESET)
        case _:
            host.act(source)


def _tell(source: Input, driver: Driver, kind: int) -> None:
    """A packet, often one that begins a connection."""
    kind = {13: REQUEST2, 14: NEGOTIATE2, 15: OFFER}.get(kind, kind)
    ports = source.number(1)
    host, guest = (PORT, 1 << 30)[ports & 1] + (ports >> 1 & 3), ports >> 4 & 3
    if kind in (OFFER, ATTACH):
        context, resource = _handle(source)
        word = context | resource << 32
    else:
        word = source.number(3)
    driver.tell(kind, host, guest, word, 1)
