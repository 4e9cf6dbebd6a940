"""Guests that use VMware's interface in any way.

``backdoor`` calls by every door: commands with any registers, messages of every length by low and
high bandwidth, in order and out of it, requests of the tools, the balloon and the pointer.
``svga`` drives the SVGA II by its registers and its queue of commands, while somebody watches.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

from tests.devices import svga_driver
from tests.fuzz.input import Input
from tests.platforms.caller import (
    CLOSE,
    OPEN,
    RECEIVE,
    RECEIVE_SIZE,
    RECEIVED,
    RPCI,
    SEND,
    SEND_SIZE,
    SUCCESS,
    TCLO,
    Access,
    Channel,
    Program,
    Registers,
    StandIn,
)

from tetrarch._native import GuestFault
from tetrarch.devices.svga2 import FIFO_BYTES, VRAM_BYTES
from tetrarch.devices.svga2.registers import HEIGHT_MAX, SCRATCH, WIDTH_MAX
from tetrarch.display import Display
from tetrarch.display.frame import POINT_BYTES, Frame
from tetrarch.platforms import GuestCall, RegisterPortAccess
from tetrarch.platforms.vmware import ToolsError, Vmware
from tetrarch.platforms.vmware import balloon as balloons
from tetrarch.platforms.vmware.backdoor import HIGH_BANDWIDTH_PORT, MAGIC, PORT
from tetrarch.platforms.vmware.guestinfo import MAX_BYTES
from tetrarch.platforms.vmware.messages import MAX_CHANNELS, MAX_MESSAGE

DOORS = (PORT, HIGH_BANDWIDTH_PORT, balloons.BALLOON_PORT)
REQUESTS = (
    *("info-get guestinfo.", "info-set guestinfo.", "log ", "SetGuestInfo  ", "reset", "OK ", ""),
    *("tools.set.version ", "tools.set.versiontype ", "tools.capability.statechange ", "ERROR "),
    *("tools.capability.", "vmx.capability.", "ATR toolbox", "OK ATR toolbox", "info-get ", "."),
    *("vmx.set_option synctime 0 1", "vmx.set_option "),
)
#: Of the pointer, the balloon and messages among them.
VALUES = (
    *(0, 1, 2, 4, 5, 0xFF, 512, 0x1000, 0x10_0000, 0x17_FFFF, MAX_MESSAGE, MAX_MESSAGE + 1),
    *(MAGIC, balloons.MAGIC, RPCI, TCLO, RPCI | 1 << 31, TCLO | 1 << 31, 0xFFFF_FFFF, 1 << 31),
    *(0x4541_4552, 0x0000_00F5, 0x4C45_5252, 0x5342_4152, (1 << 64) - 1, 1 << 63, 3 << 18),
)


class _Memory(StandIn):
    """Of which linear addresses have places far apart; the balloon's are all there."""

    def discard_memory(self, address: int, length: int) -> int:
        assert any(base <= address <= base + size - length for base, size in self.ram)
        return length


class _Guest:
    """Calls by each door, with the registers that it says."""

    def __init__(self) -> None:
        self.vmware = Vmware()
        self.vmware.balloon.connect(4 << 30, lambda actual: None, lambda doorbell: None)
        self.vmware.mouse.connect(lambda: None)
        self.program = Program(self.vmware)
        self.program.memory = self.memory = _Memory()
        self.channels: list[Channel] = []

    def call(self, door: int, access: Access | None, registers: Registers) -> None:
        registers.vm = self.memory
        with contextlib.suppress(GuestFault):
            if access is None:
                hypercalls = self.program.platform.hypercalls
                assert hypercalls is not None
                answer = hypercalls.handler(cast(GuestCall, registers))
            else:
                port: Any = self.program.platform.ports
                answer = port[door].handler(
                    cast(GuestCall, registers), cast(RegisterPortAccess, access)
                )
                # None: as a port that nobody has.
                assert answer is None or access.string or answer < 1 << 8 * access.size
            assert answer is None or answer >= 0


def _number(source: Input) -> int:
    choice = source.number(1)
    if choice < 0xC0:
        return VALUES[choice % len(VALUES)]
    return source.number(8 if choice & 1 else 2)


def backdoor(data: bytes) -> None:
    """No call gets out of its bounds, and a good program is served at the end."""
    source, guest = Input(data), _Guest()
    vmware = guest.vmware
    while source.left:
        match source.number(1) % 8:
            case 0 | 1:
                _any_call(source, guest)
            case 2:
                protocol = (RPCI, TCLO)[source.number(1) & 1]
                channel = Channel(guest.program, protocol)
                if channel.opened:
                    guest.channels.append(channel)
            case 3:
                _kernel_call(source, guest)
            case 7:
                _host(source, vmware)
            case _ if guest.channels:
                channel = guest.channels[source.number(1) % len(guest.channels)]
                _message(source, guest, channel)
        said = vmware.tools.status
        assert len(vmware.channels._channels) <= MAX_CHANNELS
        assert sum(len(text) for pair in vmware.guestinfo.items() for text in pair) <= MAX_BYTES
        assert all(
            len(text) <= 4096 for part in (said.facts, said.capabilities) for text in part.values()
        )
        assert 0 <= vmware.balloon.actual <= 4 << 30
        assert all(len(link.requests) <= 64 for link in vmware.tools.tclo._links.values())
    vmware.channels.reset()
    vmware.guestinfo.clear()
    vmware.guestinfo["role"] = "good"
    channel = Channel(guest.program, RPCI)
    assert channel.ask(b"info-get guestinfo.role") == b"1 good"
    tools = Channel(guest.program, TCLO)
    assert tools.receive() == b"reset"


def _any_call(source: Input, guest: _Guest) -> None:
    choice, door = source.number(1), DOORS[source.number(1) % 3]
    registers = Registers(3 if choice & 1 else 0)
    for name in ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp"):
        registers[name] = _number(source)
    magic = balloons.MAGIC if door == balloons.BALLOON_PORT else MAGIC
    registers["rax"] = magic if choice & 6 else _number(source)
    if choice & 8:
        # Of a command that there is, most of the time.
        registers["rcx"] = _number(source) << 16 & 0xFFFF_FFFF | source.number(1) % 128
    access = Access((1, 2, 4)[choice >> 4 & 1] if choice & 0x40 else 4)
    access.port, access.input, access.string = door, bool(choice & 0x20), bool(choice & 0x80)
    if door == HIGH_BANDWIDTH_PORT and choice & 0x10:
        access.size, access.string = 1, True
        registers["rbx"] &= ~0xFFFF
    guest.call(door, None if source.number(1) % 4 == 0 else access, registers)


def _kernel_call(source: Input, guest: _Guest) -> None:
    """Of the balloon's driver, with a list of pages, or of the pointer's."""
    choice = source.number(1)
    registers = Registers(0, rax=MAGIC)
    if choice & 1:
        registers["rcx"] = (39, 40, 41, 86)[choice >> 1 & 3]
        registers["rbx"] = _number(source) if choice & 8 else source.number(1) % 6
        return guest.call(PORT, Access(), registers)
    listed, count = source.number(1), source.number(1) % 32
    for at in range(8 * count):
        guest.memory.bytes[listed * 4096 + at] = source.number(1)
    if choice & 2:  # pages that there are
        for at in range(count):
            for byte in range(4, 8):
                guest.memory.bytes[listed * 4096 + 8 * at + byte] = 0
    registers["rax"], registers["rcx"] = balloons.MAGIC, choice >> 2 & 15
    registers["rbx"], registers["rsi"] = listed, count if choice & 64 else _number(source)
    return guest.call(balloons.BALLOON_PORT, Access(), registers)


def _text(source: Input) -> bytes:
    choice = source.number(1)
    text = REQUESTS[choice % len(REQUESTS)].encode() + source.text().encode(
        errors="surrogateescape"
    )
    if choice >= 0xF0:
        text += b"x" * source.number(2)
    return text[:MAX_MESSAGE]


def _message(source: Input, guest: _Guest, channel: Channel) -> None:
    """A step of the protocol, or more of them in order."""
    place = 0x10_0000 + source.number(2)
    match source.number(1) % 8:
        case 0:
            kinds = (OPEN, SEND_SIZE, SEND, RECEIVE_SIZE, RECEIVE, RECEIVED, CLOSE, 7)
            channel.status(kinds[source.number(1) % 8], _number(source) & 0xFFFF_FFFF)
        case 1 | 2:
            text = _text(source)
            told = len(text) if source.number(1) & 7 else _number(source) & 0xFFFF_FFFF
            if channel.status(SEND_SIZE, told) & SUCCESS:
                for at in range(0, min(len(text), 512), 4):
                    channel.status(SEND, int.from_bytes(text[at : at + 4], "little"))
        case 3 | 4:
            text = _text(source)
            for at in range(0, len(text), 4096):
                piece = text[at : at + 4096]
                with contextlib.suppress(GuestFault):
                    for index, byte in enumerate(piece):
                        guest.memory.bytes[guest.memory.place(place + at + index)] = byte
            channel.status(SEND_SIZE, len(text))
            _string(source, channel, True, place, len(text))
        case 5:
            done = channel.use(RECEIVE_SIZE)
            for _ in range(min(-(-(done["rbx"] & 0xFFFF) // 4), 64)):
                channel.status(RECEIVE, SUCCESS)
            channel.status(RECEIVED, source.number(1))
        case 6:
            done = channel.use(RECEIVE_SIZE)
            _string(source, channel, False, place, done["rbx"])
            channel.status(RECEIVED, SUCCESS)
        case _:
            _string(source, channel, bool(source.number(1) & 1), _number(source), source.number(3))


def _string(source: Input, channel: Channel, out: bool, linear: int, length: int) -> None:
    more = {"rbx": 0} if source.number(1) % 16 == 0 else {}
    with contextlib.suppress(GuestFault):
        channel.string(out, linear, length, call=bool(source.number(1) & 1), **more)


def _host(source: Input, vmware: Vmware) -> None:
    match source.number(1) % 8:
        case 0:
            with contextlib.suppress(ToolsError):
                vmware.tools.tclo.post(source.text())
        case 1:
            with contextlib.suppress(ValueError):
                vmware.guestinfo[source.text()] = source.text()
        case 2:
            x, y = (source.number(2) & 0x7FFF for _ in range(2))
            vmware.mouse.point(x, y, source.number(1), 1)
        case 3:
            vmware.balloon.target = source.number(2) << 16
        case 4:
            for device in vmware.platform(hypercalls=True, any_privilege=True).devices.values():
                state = device.save()
                device.load(state)
                assert device.save() == state
        case 5:
            for device in vmware.platform(hypercalls=True, any_privilege=True).devices.values():
                device.reset()
        case _:
            assert vmware.tools.status.heartbeat_s is None or vmware.tools.status.running


#: The queue's, of commands and of the BARs; others too.
WORDS = (
    *(0, 1, 2, 3, 16, 32, 64, 255, 256, 257, 1024, 4096, WIDTH_MAX, HEIGHT_MAX, FIFO_BYTES),
    *(FIFO_BYTES - 4, 1 << 31, 0xFFFF_FFFF, 0xFFFF_FFFC, VRAM_BYTES, 0x9000_0002),
)
COMMANDS = (1, 3, 19, 20, 21, 22, 25, 30, 33)


def _word(source: Input) -> int:
    choice = source.number(1)
    return WORDS[choice % len(WORDS)] if choice < 0xE0 else source.number(4)


def svga(data: bytes) -> None:
    """What is shown is as large as it says, and a good driver's picture is seen at the end."""
    source, driver = Input(data), svga_driver.Driver()
    display = Display([driver.device])
    watcher = display.watch()
    driver.start(*(1 + source.number(1) for _ in range(2)))
    # It may take a while.
    lives = 1
    while source.left:
        choice = source.number(1)
        match choice % 8:
            case 0 | 1:
                index = SCRATCH + choice if choice >= 0xF0 else source.number(1) % 50
                driver.write(index, _word(source))
                assert 0 <= driver.read(index) <= 0xFFFF_FFFF
            case 2 | 3:
                _command(source, driver)
            case 4:
                driver.set_words(source.number(1) % 10, _word(source))
            case 5:
                for _ in range(source.number(1) % 8):
                    driver.set_words(1024 + source.number(1), _word(source))
                driver.write(svga_driver.SYNC, 1)
            case 6:
                display._look()
                frame, cursor = watcher.look()
                assert len(frame.points) == POINT_BYTES * frame.width * frame.height
                parts = watcher.take(frame, frame.all)
                assert parts is not None
                assert all(part.within(frame.all) == part for part in parts)
                if cursor is not None:
                    assert len(cursor.points) == POINT_BYTES * cursor.width * cursor.height
                    assert 0 <= cursor.x <= cursor.width
                    assert 0 <= cursor.y <= cursor.height
            case _ if lives:
                lives -= 1
                _svga_life(source, driver)
    driver.device.reset()
    driver.place(svga_driver.VRAM, svga_driver.FIFO)
    driver.start(2, 1)
    driver.draw(0, 0, 0x11_2233, 0x44_5566)
    driver.send(svga_driver.UPDATE, 0, 0, 2, 1)
    frame = driver.device.still()
    assert isinstance(frame, Frame)
    assert frame.points == bytes.fromhex("33221100 66554400")
    driver.device.close()


def _command(source: Input, driver: svga_driver.Driver) -> None:
    """Of the right length, or not; where the queue has an end."""
    choice = source.number(1)
    number = COMMANDS[choice % len(COMMANDS)] if choice < 0xF0 else source.number(4)
    small = bool(choice & 0x40)
    words = [number, *(source.number(1) if small else _word(source) for _ in range(choice % 8))]
    words += [0] * (source.number(1) if choice & 0x20 else 0)
    at, least, most = (driver.word(place) for place in (2, 0, 1))
    if 16 <= least <= at < most <= FIFO_BYTES and at % 4 == 0 and at + 4 * len(words) < most:
        driver.set_words(at // 4, *words)
        driver.set_words(2, at + 4 * len(words))
    driver.write(svga_driver.SYNC, 1)


def _svga_life(source: Input, driver: svga_driver.Driver) -> None:
    match source.number(1) % 4:
        case 0:
            state = driver.device.save()
            driver.device.load(state)
            assert driver.device.save() == state
        case 1:
            driver.device.reset()
            driver.place(svga_driver.VRAM, svga_driver.FIFO)
            driver.start()
        case 2:
            driver.place(*(0xC000_0000 + (source.number(1) << 24) for _ in range(2)))
            driver.place(svga_driver.VRAM, svga_driver.FIFO)
        case _:
            driver.vm.hold()
            driver.device.look()
            driver.vm.resume()
