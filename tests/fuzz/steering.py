"""Fuzz targets of what steers a machine that runs: QMP's clients, and gdb.

``qmp`` makes commands of the control socket, with arguments of the kinds that they have and of any
other, between them bytes that are none. ``gdb`` makes packets that are right but for some words.
``vnc`` is a viewer whose messages are of the protocol but for some bytes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from tests.fuzz.devices import kernel
from tests.fuzz.input import Input

from tetrarch import Machine
from tetrarch._native import EngineError
from tetrarch.control.commands import COMMANDS
from tetrarch.control.session import Session as QmpSession
from tetrarch.display import Display
from tetrarch.display.frame import Cursor, Frame
from tetrarch.errors import MachineStateError
from tetrarch.gdb.packets import PACKET_MAX, PacketReader, escape, frame
from tetrarch.gdb.registers import REGISTERS
from tetrarch.gdb.session import Session as GdbSession
from tetrarch.machine.debugger import Debugger
from tetrarch.vnc.hands import Hands, ViewerHands
from tetrarch.vnc.messages import FORMAT_BYTES, NotRfb
from tetrarch.vnc.session import Gone
from tetrarch.vnc.session import Session as VncSession

NEGOTIATION = b'{"execute":"qmp_capabilities"}'
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 1 << 31, 1 << 63, 1 << 64, 10**40, 1.5, 1e308),
    *("", "0", "x", "\0", "\udcff", "\x1b[2J", "a" * 300, "on", "raw", "file", "disk0", "vcpu0"),
    *([], {}, [[]], {"x": {}}, {"driver": "file", "filename": "f"}, {"type": "inet"}),
]
#: What would end the machine, or wait for it.
LEFT_OUT = {"quit", "system_powerdown", "device-sync-config", "inject-nmi"}

#: sti; hlt; jmp: it waits for what nobody sends, where hlt alone would be its end.
IDLE = b"\xfb\xf4\xeb\xfd"


class Life:
    """A machine for all inputs, until one ends it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._machine = self._start()
        atexit.register(self.close)

    def _start(self) -> Machine:
        machine = Machine(
            kernel=kernel(IDLE),
            memory="16M",
            engine="bt",
            console="none",
            input=("keyboard", "tablet", "ps2-keyboard", "ps2-mouse"),
        )
        machine.start()
        return machine

    def get(self) -> Machine:
        if not self._machine.running:
            self._machine.kill()
            self._machine = self._start()
        return self._machine

    def folder(self) -> contextlib.AbstractContextManager[None]:
        """Whatever files are asked for lie there."""
        return contextlib.chdir(self._folder.name)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._machine.kill()
        self._folder.cleanup()


@functools.cache
def life() -> Life:
    return Life()


def value(source: Input, depth: int = 0) -> Any:
    match source.number(1) % 8:
        case 0 | 1 | 2:
            return VALUES[source.number(1) % len(VALUES)]
        case 3:
            return source.number(9) - (1 << 60)
        case 4:
            # No path leads out of the folder.
            return source.text().replace("/", "_")
        case 5 if depth < 3:
            return [value(source, depth + 1) for _ in range(source.number(1) % 3)]
        case 6 if depth < 3:
            return {source.text(): value(source, depth + 1) for _ in range(source.number(1) % 3)}
        case _:
            return source.number(1)


def requests(source: Input) -> Iterator[bytes]:
    names = sorted(COMMANDS.keys() - LEFT_OUT)
    while source.left:
        choice = source.number(1)
        if choice < 16:
            yield source.bytes(source.number(1) % 32).replace(b"/", b"_")
            continue
        name = names[source.number(1) % len(names)]
        fields = COMMANDS[name].arguments.model_fields
        arguments = {
            field.alias or key: value(source)
            for key, field in fields.items()
            if field.is_required() or source.number(1) & 1
        }
        if choice < 32:
            arguments[source.text()] = value(source)
        request: dict[str, Any] = {"execute": name}
        if arguments or choice & 1:
            request["arguments"] = arguments
        if choice & 2:
            request["id"] = value(source)
        text = json.dumps(request).encode()
        if choice < 48:
            at = source.number(1) % len(text)
            text = text[:at] + source.bytes(2) + text[at + source.number(1) % 4 :]
        yield text.replace(b"/", b"_") + (b"\n" if choice & 4 else b"")


def qmp(data: bytes) -> None:
    """Every answer is one of the protocol, and none says that we failed."""
    source, vm = Input(data), life().get()
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    with ours, theirs, life().folder():
        session = QmpSession(theirs, lambda: vm)
        sent = (b"" if source.number(1) % 16 == 0 else NEGOTIATION) + b"".join(requests(source))
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        session.run()
        with ours.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                assert isinstance(message, dict), line
                assert {"QMP", "return", "error", "event"} & message.keys(), line
                failed = message.get("error", {}).get("desc", "")
                assert " failed: " not in failed, (sent, failed)
    with contextlib.suppress(MachineStateError):
        while True:  # until it runs
            vm.resume()


HEADS = (
    *(b"? g G p P= m M X Z0 Z1 Z2 Z3 Z4 Z5 z0 z1 z2 z3 z4 c C s S Hg Hc H T D vCont;".split()),
    *(b"vCont;s: vCont;c: vKill; vMustReplyEmpty qSupported: qC qAttached q Q v".split()),
    *(b"qfThreadInfo qThreadExtraInfo, qXfer:features:read:target.xml: qRcmd,".split()),
    *(b"qqemu.sstep Qqemu.sstep= Qqemu.PhyMemMode: QStartNoAckMode ! A b R x k vCont?".split()),
)
NUMBERS = (0, 1, 2, 4, 8, 0x10_0000, 0x10_0040, 0xFF_FFF8, (1 << 64) - 1, 1 << 64)


def word(source: Input) -> bytes:
    match source.number(1) % 6:
        case 0 | 1:
            return b"%x" % NUMBERS[source.number(1) % len(NUMBERS)]
        case 2:
            return b"%x" % source.number(8)
        case 3:
            return source.bytes(source.number(1) % 64).hex().encode()
        case 4:
            return escape(source.bytes(source.number(1) % 16))
        case _:
            return (b"-1", b"p1.1", b"all", b"", b"target.xml")[source.number(1) % 5]


def packets(source: Input) -> Iterator[bytes]:
    while source.left:
        choice = source.number(1)
        if choice < 8:
            yield source.bytes(source.number(1) % 32)
            continue
        separators = [b",:;="[one : one + 1] for one in source.bytes(3)] or [b","]
        packet = HEADS[choice % len(HEADS)]
        for count in range(source.number(1) % 4):
            packet += word(source) + (separators[count % len(separators)] or b",")
        yield packet.rstrip(b",:;=") if source.number(1) & 1 else packet


def gdb(data: bytes) -> None:
    """Every packet has an answer, and what is asked of all registers is told, whatever became of
    the guest."""
    source, vm = Input(data), life().get()
    debugger = Debugger(vm.engine_vm, [vm.engine_vm.vcpu(0)])
    debugger.stop()
    reader = PacketReader()
    try:
        session = GdbSession(debugger, lambda line, vcpu: line)
        for packet in packets(source):
            wire = frame(packet)
            at = source.number(1) % len(wire)
            for part in (wire[:at], wire[at:]):
                for item in reader.feed(part):
                    if not isinstance(item, bytes):
                        continue
                    answer = session.answer(item)
                    assert (answer is None) == (not debugger.stopped), item
                    assert answer is None or len(answer) <= PACKET_MAX, item
                    if answer is None:
                        debugger.stop()
                        session.stopped() or session.interrupted()
        told = session.answer(b"g")
        assert told is not None
        assert len(told) == 2 * sum(register.size for register in REGISTERS)
    finally:
        with contextlib.suppress(EngineError):
            debugger.detach()
        debugger.close()


class _Shown:
    """A screen of changing size, and a pointer of any."""

    def __init__(self, source: Input) -> None:
        self._source = source

    def still(self) -> Frame | None:
        width, height = 1 + self._source.number(1), 1 + self._source.number(1) % 100
        some = self._source.bytes(4 * (self._source.number(1) % 40)) or bytes(4)
        length = 4 * width * height
        return Frame(width, height, (some * (length // len(some) + 1))[:length])

    def look(self) -> tuple[Frame, None] | None:
        frame = self.still() if self._source.number(1) & 3 else None
        return None if frame is None else (frame, None)

    def cursor(self) -> Cursor | None:
        if self._source.number(1) & 1:
            return None
        width, height, x, y = (self._source.number(1) % 20 for _ in range(4))
        points = self._source.bytes(4 * width * height).ljust(4 * width * height, b"\xff")
        return Cursor(width, height, min(x, width), min(y, height), points)


def viewer_messages(source: Input) -> Iterator[bytes]:
    while source.left:
        numbers = [source.number(2) for _ in range(4)]
        match source.number(1) % 8:
            case 0:
                yield source.bytes(source.number(1) % 16)
            case 1:
                changed = bytearray(b"\0\0\0\0" + FORMAT_BYTES)
                changed[4 + source.number(1) % 16] = source.number(1)
                yield bytes(changed)
            case 2:
                wanted = (16, 6, 0, -223, -239, -258, -308)
                chosen = [one for one in wanted if source.number(1) & 1]
                yield struct.pack(f">BxH{len(chosen)}i", 2, len(chosen), *chosen)
            case 3 | 4:
                yield struct.pack(">BB4H", 3, source.number(1) & 1, *numbers)
            case 5:
                yield struct.pack(">BB2xI", 4, source.number(1), source.number(4))
            case 6:
                yield struct.pack(">BBHH", 5, source.number(1), *numbers[:2])
            case _:
                yield struct.pack(">BBHII", 255, 0, numbers[0] & 1, 0, source.number(1))


def vnc(data: bytes) -> None:
    """A viewer is served, or hung up on; nobody waits for it then, and none of its keys stays."""
    source, vm = Input(data), life().get()
    ours, theirs = socket.socketpair()
    hands = Hands(vm.inputs, patience=0.0)
    begin = (b"RFB 003.008\n\1\1", b"RFB 003.003\n\1", b"RFB 003.007\n\1\1")[source.number(1) % 3]
    if source.number(1) % 8 == 0:
        begin = source.bytes(14)
    sent = begin + b"".join(viewer_messages(source))
    session = VncSession(
        theirs, "fuzzed", Display([_Shown(Input(data))]).watch(), ViewerHands(hands)
    )

    def take() -> None:
        with contextlib.suppress(OSError):
            while ours.recv(1 << 16):
                pass

    taker = threading.Thread(target=take)
    taker.start()
    with ours, theirs:
        with contextlib.suppress(OSError):
            ours.sendall(sent)
            ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(Gone, NotRfb, OSError):
            session.let_in(None)
            session.run()
        session.end()
        taker.join()
    assert not hands._down
