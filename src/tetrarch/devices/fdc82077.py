"""The 82077AA floppy disk controller in its PC/AT mode (Intel 82077AA data sheet, 1994), with up to
two drives.

A command is done when its last byte is written: the interrupt comes at once, and what is between,
which moves the bytes, is a DMA transfer on channel 2. Without DMA no data moves: no system of a PC
asks for that.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from tetrarch.devices._access import read_bytes, write_bytes
from tetrarch.devices._adapter import Adapter
from tetrarch.devices._state import DeviceState, flag, memory, queue, register

if TYPE_CHECKING:
    from tetrarch.devices.dma8237 import Dma8237

__all__ = [
    "DIR_PORT",
    "DMA_CHANNEL",
    "FORMATS",
    "GSI",
    "PORTS",
    "PORT_BASE",
    "Fdc82077",
    "Fdc82077Core",
    "Fdc82077State",
    "FloppyDrive",
    "FloppyFormat",
    "FloppyImage",
]

#: From the digital output register on; the port between the FIFO and DIR is IDE's.
PORT_BASE: Final = 0x3F2
PORTS: Final = 4
DIR_PORT: Final = 0x3F7
GSI: Final = 6
DMA_CHANNEL: Final = 2

SECTOR: Final = 512
#: Of drives that the chip can have: it tells of as many after a reset.
SENSE_MAX: Final = 4

# Offsets from PORT_BASE.
DOR: Final = 0
TDR: Final = 1
MSR: Final = 2  # read; written it is DSR
FIFO: Final = 3
DIR: Final = DIR_PORT - PORT_BASE  # read; written it is CCR

DOR_DRIVE: Final = 0x03
DOR_RUNS: Final = 0x04
DOR_DMA: Final = 0x08
DOR_MOTOR: Final = 0x10
DSR_RESET: Final = 0x80
MSR_READY: Final = 0x80
MSR_TO_HOST: Final = 0x40
MSR_BUSY: Final = 0x10
DIR_CHANGED: Final = 0x80

ST0_ABNORMAL: Final = 0x40
ST0_INVALID: Final = 0x80
ST0_POLLED: Final = 0xC0
ST0_SEEK_END: Final = 0x20
ST0_EQUIPMENT: Final = 0x10
ST0_HEAD: Final = 0x04
ST1_END_OF_TRACK: Final = 0x80
ST1_DATA_ERROR: Final = 0x20
ST1_OVERRUN: Final = 0x10
ST1_NO_DATA: Final = 0x04
ST1_NOT_WRITABLE: Final = 0x02
ST1_NO_MARK: Final = 0x01
ST2_CONTROL_MARK: Final = 0x40
ST2_DATA_ERROR: Final = 0x20
ST2_WRONG_TRACK: Final = 0x10
ST2_BAD_TRACK: Final = 0x02
ST3_PROTECTED: Final = 0x40
ST3_READY: Final = 0x20
ST3_TRACK_0: Final = 0x10
ST3_TWO_SIDES: Final = 0x08

MULTI_TRACK: Final = 0x80
MFM: Final = 0x40
#: CONFIGURE, first byte: commands seek by themselves.
IMPLIED_SEEK: Final = 0x40
VERSION: Final = 0x90

READ_TRACK: Final = 0x02
SPECIFY: Final = 0x03
SENSE_DRIVE: Final = 0x04
WRITE: Final = 0x05
READ: Final = 0x06
RECALIBRATE: Final = 0x07
SENSE_INTERRUPT: Final = 0x08
WRITE_DELETED: Final = 0x09
READ_ID: Final = 0x0A
READ_DELETED: Final = 0x0C
FORMAT: Final = 0x0D
DUMP_REGISTERS: Final = 0x0E
SEEK: Final = 0x0F
GET_VERSION: Final = 0x10
PERPENDICULAR: Final = 0x12
CONFIGURE: Final = 0x13
LOCK: Final = 0x14
VERIFY: Final = 0x16

#: Data sheet, table 5-1: bits of a command's first byte that are the caller's, and all its bytes.
COMMANDS: Final[Mapping[int, tuple[int, int]]] = {
    READ_TRACK: (0x60, 9),
    SPECIFY: (0, 3),
    SENSE_DRIVE: (0, 2),
    WRITE: (0xC0, 9),
    READ: (0xE0, 9),
    RECALIBRATE: (0, 2),
    SENSE_INTERRUPT: (0, 1),
    WRITE_DELETED: (0xC0, 9),
    READ_ID: (0x40, 2),
    READ_DELETED: (0xE0, 9),
    FORMAT: (0x40, 6),
    DUMP_REGISTERS: (0, 1),
    SEEK: (0xC0, 3),
    GET_VERSION: (0, 1),
    PERPENDICULAR: (0, 2),
    CONFIGURE: (0, 4),
    LOCK: (0x80, 1),
    VERIFY: (0xE0, 9),
}
#: SEEK with the first: by so many tracks; with the second, too: inwards.
RELATIVE: Final = 0x80
INWARDS: Final = 0x40

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FloppyFormat:
    """Two sides of sectors of 512 bytes each."""

    tracks: int
    sectors: int
    """Of a track."""
    rate: int
    """As CCR and DSR have it: 0 is 500, 1 is 300, 2 is 250 kbit/s, 3 is 1 Mbit/s."""
    drive: int
    """The drive for it, as the CMOS memory has it."""

    @property
    def size(self) -> int:
        return self.tracks * 2 * self.sectors * SECTOR


#: By the size of an image, in bytes.
FORMATS: Final[Mapping[int, FloppyFormat]] = {
    each.size: each
    for each in (
        FloppyFormat(40, 9, 2, 1),
        FloppyFormat(80, 9, 2, 3),
        FloppyFormat(80, 15, 0, 2),
        FloppyFormat(80, 18, 0, 4),
        FloppyFormat(80, 36, 3, 5),
    )
}


class FloppyImage(Protocol):
    """The disk's bytes. Both raise OSError where the host fails."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes) -> None: ...


@dataclass(frozen=True)
class FloppyDrive:
    """A drive with a disk in it."""

    image: FloppyImage
    format: FloppyFormat
    readonly: bool = False


@dataclass
class Fdc82077State(DeviceState):
    kind = "fdc82077"

    dor: int = register(0, 0xFF)
    tdr: int = register(0, 0x03)
    rate: int = register(2, 0x03)
    """As CCR and DSR set it."""
    command: deque[int] = queue(9)
    """Its bytes so far."""
    result: deque[int] = queue(10)
    """What is left of its answer."""
    sense: deque[int] = queue(SENSE_MAX, 0xFFFF)
    """For SENSE INTERRUPT: each ST0, and the track above it."""
    irq: bool = flag()
    tracks: bytearray = memory(4)
    """Where the heads are."""
    changed: int = register(0x03, 0x03)
    """Drives whose disk is another since their heads last moved."""
    specified: bytearray = memory(2)
    """The bytes of SPECIFY."""
    last_sector: int = register(0, 0xFF)
    configured: bytearray = memory(2)
    """The second and the third byte of CONFIGURE."""
    perpendicular: int = register(0, 0xFF)
    locked: bool = flag()


@dataclass
class _Place:
    """Which sector a command is at, by its own words."""

    track: int
    head: int
    sector: int


class Fdc82077Core:
    """What the controller does."""

    def __init__(self, drives: Sequence[FloppyDrive | None], dma: Dma8237) -> None:
        self.state = Fdc82077State()
        self._drives = tuple(drives)
        self._dma = dma

    @property
    def irq(self) -> bool:
        gate = DOR_RUNS | DOR_DMA
        return self.state.irq and self.state.dor & gate == gate

    # Registers.

    def read(self, offset: int) -> int:
        state = self.state
        if offset == DOR:
            return state.dor
        if offset == TDR:
            return state.tdr
        if offset == MSR:
            if not state.dor & DOR_RUNS:
                return 0
            busy = MSR_BUSY if state.command or state.result else 0
            return MSR_READY | busy | (MSR_TO_HOST if state.result else 0)
        if offset == FIFO:
            # The first byte of a result answers its interrupt.
            state.irq = state.irq and not state.result
            return state.result.popleft() if state.result else 0xFF
        if offset == DIR:
            number = state.dor & DOR_DRIVE
            turns = state.dor & DOR_MOTOR << number
            return DIR_CHANGED if turns and state.changed >> number & 1 else 0
        return 0xFF

    def write(self, offset: int, value: int) -> None:
        state = self.state
        if offset == DOR:
            before, state.dor = state.dor, value
            if value & ~before & DOR_RUNS:
                self._ready_again()
        elif offset == TDR:
            state.tdr = value & 3
        elif offset == MSR:
            state.rate = value & 3
            if value & DSR_RESET and state.dor & DOR_RUNS:
                self._ready_again()
        elif offset == DIR:
            state.rate = value & 3
        elif offset == FIFO and state.dor & DOR_RUNS and not state.result:
            self._take(value)

    def _ready_again(self) -> None:
        """After a reset it has looked at four drives, and says so (data sheet, 6.2)."""
        state = self.state
        state.command.clear()
        state.result.clear()
        if not state.locked:
            state.configured[:] = bytes(2)
        state.perpendicular &= 0x3C
        state.sense = deque(
            ST0_POLLED | number | state.tracks[number] << 8 for number in range(SENSE_MAX)
        )
        state.irq = True

    # Commands.

    def _take(self, value: int) -> None:
        command = self.state.command
        command.append(value)
        known = COMMANDS.get(command[0] & 0x1F)
        if known is None or command[0] & ~0x1F & ~known[0]:
            self._answer(ST0_INVALID)
            return
        if len(command) < known[1]:
            return
        name, words = command[0] & 0x1F, bytes(command)
        if name in (READ, READ_DELETED, READ_TRACK, VERIFY, WRITE, WRITE_DELETED):
            self._transfer(name, words)
        elif name == FORMAT:
            self._format(words)
        elif name == READ_ID:
            self._read_id(words)
        elif name in (SEEK, RECALIBRATE):
            command.clear()
            self._seek(name, words)
        elif name == SENSE_INTERRUPT:
            self._sense_interrupt()
        elif name == SENSE_DRIVE:
            self._answer(self._st3(words[1]))
        else:
            self._set_up(name, words)

    def _answer(self, *values: int) -> None:
        self.state.command.clear()
        self.state.result.extend(values)

    def _set_up(self, name: int, words: bytes) -> None:
        state = self.state
        if name == SPECIFY:
            state.specified[:] = words[1:3]
        elif name == CONFIGURE:
            state.configured[:] = words[2:4]
        elif name == PERPENDICULAR:
            state.perpendicular = (
                words[1] & 0x3F if words[1] & 0x80 else words[1] & 3 | (state.perpendicular & 0x3C)
            )
        elif name == GET_VERSION:
            self._answer(VERSION)
        elif name == LOCK:
            state.locked = bool(words[0] & 0x80)
            self._answer(state.locked << 4)
        elif name == DUMP_REGISTERS:
            last = state.locked << 7 | state.perpendicular & 0x3F
            self._answer(
                *state.tracks, *state.specified, state.last_sector, last, *state.configured
            )
        state.command.clear()

    def _drive(self, number: int) -> FloppyDrive | None:
        return self._drives[number] if number < len(self._drives) else None

    def _st3(self, select: int) -> int:
        number = select & DOR_DRIVE
        drive = self._drive(number)
        st3 = ST3_READY | ST3_TWO_SIDES | select & (ST0_HEAD | DOR_DRIVE)
        if self.state.tracks[number] == 0 and drive is not None:
            st3 |= ST3_TRACK_0
        return st3 | ST3_PROTECTED if drive is not None and drive.readonly else st3

    def _seek(self, name: int, words: bytes) -> None:
        state, number = self.state, words[1] & DOR_DRIVE
        st0 = ST0_SEEK_END | number
        if name == RECALIBRATE:
            track = 0
        else:
            st0 |= words[1] & ST0_HEAD
            step = words[2] if words[0] & INWARDS else -words[2]
            track = state.tracks[number] + step if words[0] & RELATIVE else words[2]
        self._move(number, track)
        if name == RECALIBRATE and self._drive(number) is None:
            st0 |= ST0_ABNORMAL | ST0_EQUIPMENT
        if len(state.sense) == SENSE_MAX:
            state.sense.popleft()
        state.sense.append(st0 | state.tracks[number] << 8)
        state.irq = True

    def _move(self, number: int, track: int) -> None:
        self.state.tracks[number] = min(max(track, 0), 0xFF)
        if self._drive(number) is not None:
            self.state.changed &= ~(1 << number)

    def _sense_interrupt(self) -> None:
        state = self.state
        if not state.sense:
            self._answer(ST0_INVALID)
            return
        said = state.sense.popleft()
        # A reset is one interrupt, each seek has its own.
        state.irq = bool(state.sense) and state.sense[0] & ST0_POLLED != ST0_POLLED
        self._answer(said & 0xFF, said >> 8)

    # Commands with sectors.

    def _end(self, st0: int, st1: int, st2: int, place: _Place) -> None:
        self._answer(st0, st1, st2, place.track, place.head, place.sector, SECTOR // 256)
        self.state.irq = True

    def _missing(self, drive: FloppyDrive | None, words: bytes) -> bool:
        """Whether nothing on the disk can be told from noise."""
        number = words[1] & DOR_DRIVE
        if drive is None or not words[0] & MFM:
            return True
        return self.state.rate != drive.format.rate or (
            self.state.tracks[number] >= drive.format.tracks
        )

    def _read_id(self, words: bytes) -> None:
        number, head = words[1] & DOR_DRIVE, words[1] >> 2 & 1
        st0 = words[1] & (DOR_DRIVE | ST0_HEAD)
        place = _Place(self.state.tracks[number], head, 1)
        if self._missing(self._drive(number), words):
            self._end(st0 | ST0_ABNORMAL, ST1_NO_MARK, 0, place)
        else:
            self._end(st0, 0, 0, place)

    def _refused(self, name: int, words: bytes, place: _Place) -> tuple[int, int] | None:
        """ST1 and ST2 of a command that does not begin."""
        number = words[1] & DOR_DRIVE
        drive = self._drive(number)
        if drive is None or self._missing(drive, words):
            return ST1_NO_MARK, 0
        if name in (WRITE, WRITE_DELETED, FORMAT) and drive.readonly:
            return ST1_NOT_WRITABLE, 0
        if name != FORMAT:
            if place.track != self.state.tracks[number]:
                return ST1_NO_DATA, ST2_BAD_TRACK if place.track == 0xFF else ST2_WRONG_TRACK
            same_side = place.head == words[1] >> 2 & 1
            if words[5] != SECTOR // 256 or not same_side:
                return ST1_NO_DATA, 0
        return None

    def _transfer(self, name: int, words: bytes) -> None:
        number, st0 = words[1] & DOR_DRIVE, words[1] & (DOR_DRIVE | ST0_HEAD)
        place = _Place(words[2], words[3], 1 if name == READ_TRACK else words[4])
        self.state.last_sector = words[6]
        if self.state.configured[0] & IMPLIED_SEEK:
            self._move(number, place.track)
        refused = self._refused(name, words, place)
        drive = self._drive(number)
        if refused is not None or drive is None:
            self._end(st0 | ST0_ABNORMAL, *(refused or (ST1_NO_MARK, 0)), place)
            return
        st1, st2 = self._sectors(name, words, drive, place)
        head = ST0_HEAD if place.head else 0
        abnormal = ST0_ABNORMAL if st1 else 0
        self._end(st0 & ~ST0_HEAD | head | abnormal, st1, st2, place)

    def _sectors(
        self, name: int, words: bytes, drive: FloppyDrive, place: _Place
    ) -> tuple[int, int]:
        """Moves them, and ``place`` on; gives ST1 and ST2."""
        last, both = words[6], words[0] & MULTI_TRACK and name != READ_TRACK
        # VERIFY has no data; its end is that of the track.
        left = drive.format.size if name == VERIFY else self._dma.left(DMA_CHANNEL)
        st2 = ST2_CONTROL_MARK if name == READ_DELETED else 0
        if left == 0:
            return ST1_OVERRUN, 0
        while True:
            if not 1 <= place.sector <= drive.format.sectors:
                return ST1_NO_DATA, st2
            length = min(left, SECTOR)
            try:
                self._sector(name, drive, place, length)
            except OSError as error:
                log.warning("a floppy disk's sector is lost: %s", error)
                return ST1_DATA_ERROR, st2 | ST2_DATA_ERROR
            left -= length
            ends = place.sector == last
            place.sector += 1
            if ends:
                # Data sheet, table 5-6: where it ends is where a next command would go on.
                place.sector = 1
                if both:
                    place.head ^= 1
                if not (both and place.head):
                    place.track += 1
            if left == 0:
                return 0, st2
            if ends and not (both and place.head):
                return (0 if name == VERIFY else ST1_END_OF_TRACK), st2
            if name == READ_DELETED:
                return 0, st2

    def _sector(self, name: int, drive: FloppyDrive, place: _Place, length: int) -> None:
        track = place.track * 2 + (place.head & 1)
        offset = (track * drive.format.sectors + place.sector - 1) * SECTOR
        if name in (WRITE, WRITE_DELETED):
            data = self._dma.from_memory(DMA_CHANNEL, length)
            # What DMA ends in the middle of is filled with zeroes.
            drive.image.write(offset, data.ljust(SECTOR, b"\0"))
            return
        data = drive.image.read(offset, SECTOR)
        if name != VERIFY:
            self._dma.to_memory(DMA_CHANNEL, data[:length])

    def _format(self, words: bytes) -> None:
        number, head = words[1] & DOR_DRIVE, words[1] >> 2 & 1
        st0 = words[1] & (DOR_DRIVE | ST0_HEAD)
        place = _Place(self.state.tracks[number], head, 1)
        refused = self._refused(FORMAT, words, place)
        drive = self._drive(number)
        if refused is not None or drive is None:
            self._end(st0 | ST0_ABNORMAL, *(refused or (ST1_NO_MARK, 0)), place)
            return
        size = 4 * words[3]
        if self._dma.left(DMA_CHANNEL) < size:
            self._end(st0 | ST0_ABNORMAL, ST1_OVERRUN, 0, place)
            return
        marks = self._dma.from_memory(DMA_CHANNEL, size)
        for track, side, sector, code in zip(*(marks[at::4] for at in range(4)), strict=True):
            # Others would be sectors that the image has no place for.
            here = (track, side, code) == (place.track, head, SECTOR // 256)
            if not here or not 1 <= sector <= drive.format.sectors:
                continue
            at = ((track * 2 + head) * drive.format.sectors + sector - 1) * SECTOR
            try:
                drive.image.write(at, bytes([words[5]]) * SECTOR)
            except OSError as error:
                log.warning("a floppy disk's sector is not formatted: %s", error)
                self._end(st0 | ST0_ABNORMAL, ST1_DATA_ERROR, ST2_DATA_ERROR, place)
                return
        self._end(st0, 0, 0, place)


class Fdc82077(Adapter[Fdc82077Core]):
    """The controller on a machine: at PORT_BASE, and at DIR_PORT by ``dir``."""

    def __init__(
        self,
        irq: Callable[[bool], None],
        drives: Sequence[FloppyDrive | None],
        dma: Dma8237,
    ) -> None:
        super().__init__(Fdc82077Core(drives, dma), irq)
        self.dir = _DirPort(self)

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            value = read_bytes(self._core.read, offset, size)
        self._line.update()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            write_bytes(self._core.write, offset, size, value)
        self._line.update()


class _DirPort:
    def __init__(self, controller: Fdc82077) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        return self._controller.read(DIR, 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self._controller.write(DIR, 1, value)
