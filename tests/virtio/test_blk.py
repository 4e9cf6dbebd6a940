"""The block device, by a driver that knows no more than the specification (5.2)."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.virtio.driver import Driver, Mmio, wait_until

from tetrarch import block
from tetrarch._native import Disk, Vm
from tetrarch.errors import ImageError, StateError
from tetrarch.virtio.blk import (
    BLK_SIZE,
    DISCARD,
    FLUSH,
    MQ,
    RO,
    SEG_MAX,
    TOPOLOGY,
    WRITE_ZEROES,
    BlkKind,
)
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.registers import DRIVER_OK, NEEDS_RESET

MIB = 1 << 20
SIZE = 8 * MIB

# Where the driver has its buffers.
HEADER, STATUS, DATA = 0x20_0000, 0x20_1000, 0x21_0000

IN, OUT, FLUSH_IT, GET_ID, DISCARD_IT, ZERO_IT = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2


class Wire:
    gsi = 20

    def __init__(self) -> None:
        self.level = False

    def set(self, level: bool) -> None:
        self.level = level

    def pulse(self) -> None:
        pass


class BlkDriver(Driver):
    """Requests to a disk, one at a time."""

    def __init__(self, disk: Disk, queues: int = 1) -> None:
        vm = Vm("bt", 8 * MIB)
        self.kind = BlkKind(vm, disk, "disk0", queues)
        self.wire = Wire()
        self.mmio = VirtioMmio(self.kind, self.wire)
        super().__init__(vm, Mmio(self.mmio))

    def request(
        self,
        kind: int,
        sector: int = 0,
        out: bytes = b"",
        into: int = 0,
        *,
        queue: int = 0,
        pieces: int = 1,
    ) -> tuple[int, int]:
        """Status, and how much was written; the answer is at DATA."""
        self.vm.write_memory(HEADER, struct.pack("<IIQ", kind, 0, sector))
        self.vm.write_memory(STATUS, b"\xff")
        self.vm.write_memory(DATA, out or b"\xee" * into)
        length = (len(out) or into) // pieces
        data = [(DATA + length * i, length, bool(into)) for i in range(pieces if length else 0)]
        written = self.ask(queue, [(HEADER, 16, False), *data, (STATUS, 1, True)])
        return self.vm.read_memory(STATUS, 1)[0], written

    def read(self, sector: int, length: int) -> bytes:
        assert self.request(IN, sector, into=length) == (OK, length + 1)
        return self.vm.read_memory(DATA, length)


@pytest.fixture(params=["disk.img", "disk.qcow2"])
def image(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / str(request.param)
    block.create(path, SIZE)
    return path


@pytest.fixture
def driver(image: Path) -> Iterator[BlkDriver]:
    driver = BlkDriver(block.open_disk(block.DiskSpec(image)))
    driver.start(1, FLUSH | DISCARD | WRITE_ZEROES)
    yield driver
    driver.kind.close()


def test_configuration_describes_the_disk(image: Path) -> None:
    driver = BlkDriver(block.open_disk(block.DiskSpec(image)), queues=3)
    offered = driver.device.features()
    wanted = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | MQ | DISCARD | WRITE_ZEROES
    assert offered & wanted == wanted
    assert not offered & RO
    config = [driver.device.config(offset, size) for offset, size in ((0, 4), (12, 4), (20, 4))]
    assert config == [SIZE // 512, 254, 512]
    assert driver.device.config(24, 1) == 3  # blocks of 4 KiB behind those of 512 bytes
    assert driver.device.config(34, 2) == 3
    assert [driver.device.config(offset, 4) for offset in (36, 40, 48, 52)] == [1 << 22, 32] * 2
    assert driver.device.config(56, 1) == 1
    assert driver.device.size(2) == 256


def test_data_is_written_and_read_in_any_pieces(driver: BlkDriver) -> None:
    data = os.urandom(8192)
    assert driver.request(OUT, 7, data, pieces=16) == (OK, 1)
    assert driver.request(FLUSH_IT) == (OK, 1)
    assert driver.read(7, 8192) == data
    assert driver.read(6, 512) == bytes(512)
    assert driver.read(SIZE // 512 - 1, 512) == bytes(512)


def test_queues_are_served_alike(image: Path) -> None:
    driver = BlkDriver(block.open_disk(block.DiskSpec(image)), queues=4)
    driver.start(4, FLUSH | MQ)
    for queue in range(4):
        assert driver.request(OUT, queue, bytes([queue + 1]) * 512, queue=queue) == (OK, 1)
    assert driver.read(0, 2048) == b"".join(bytes([queue + 1]) * 512 for queue in range(4))


def test_serial_number_is_given(driver: BlkDriver) -> None:
    assert driver.request(GET_ID, into=20) == (OK, 21)
    assert driver.vm.read_memory(DATA, 20) == b"disk0".ljust(20, b"\0")


def test_discarded_and_zeroed_sectors_read_as_zeroes(driver: BlkDriver) -> None:
    driver.request(OUT, 0, b"\1" * 262144)
    two = struct.pack("<QIIQII", 8, 8, 0, 32, 16, 0)
    assert driver.request(ZERO_IT, out=two) == (OK, 1)
    assert driver.request(ZERO_IT, out=struct.pack("<QII", 128, 128, 1)) == (OK, 1)
    kept = driver.read(0, 262144)
    zeroed = {*range(8, 16), *range(32, 48), *range(128, 256)}
    for sector in range(512):
        expected = b"\0" if sector in zeroed else b"\1"
        assert kept[sector * 512 : sector * 512 + 512] == expected * 512, sector
    assert driver.request(DISCARD_IT, out=struct.pack("<QII", 256, 256, 0)) == (OK, 1)


@pytest.mark.parametrize(
    ("kind", "sector", "out", "into", "status"),
    [
        (IN, SIZE // 512, b"", 512, IOERR),
        (IN, SIZE // 512 - 1, b"", 1024, IOERR),
        (IN, (1 << 64) - 1, b"", 512, IOERR),
        (IN, 1 << 55, b"", 512, IOERR),
        (IN, 0, b"", 100, IOERR),
        (IN, 0, b"", 0, IOERR),
        (OUT, SIZE // 512, bytes(512), 0, IOERR),
        (OUT, 0, bytes(511), 0, IOERR),
        (DISCARD_IT, 0, struct.pack("<QII", 0, 8, 1), 0, UNSUPP),
        (DISCARD_IT, 0, struct.pack("<QII", SIZE // 512, 8, 0), 0, IOERR),
        (DISCARD_IT, 0, struct.pack("<QII", 0, (1 << 22) + 1, 0), 0, IOERR),
        (DISCARD_IT, 0, struct.pack("<QII", (1 << 64) - 1, 8, 0), 0, IOERR),
        (DISCARD_IT, 0, struct.pack("<QII", 0, 8, 0) * 33, 0, IOERR),
        (DISCARD_IT, 0, bytes(15), 0, IOERR),
        (ZERO_IT, 0, struct.pack("<QII", 0, 8, 2), 0, UNSUPP),
        (2, 0, b"", 0, UNSUPP),
        (0xFFFF_FFFF, 0, b"", 512, UNSUPP),
    ],
)
def test_what_cannot_be_is_an_error_of_the_request_alone(
    driver: BlkDriver, kind: int, sector: int, out: bytes, into: int, status: int
) -> None:
    driver.request(OUT, 0, b"\1" * 512)
    assert driver.request(kind, sector, out, into)[0] == status
    assert not driver.device.status() & NEEDS_RESET
    assert driver.read(0, 512) == b"\1" * 512


def test_chains_without_header_or_status_do_no_harm(driver: BlkDriver) -> None:
    driver.vm.write_memory(HEADER, struct.pack("<IIQ", OUT, 0, 0))
    driver.vm.write_memory(STATUS, b"\xff")
    assert driver.ask(0, [(HEADER, 16, False), (DATA, 512, False)]) == 0
    assert driver.ask(0, [(HEADER, 15, False), (STATUS, 1, True)]) == 1
    assert driver.vm.read_memory(STATUS, 1)[0] == IOERR
    assert driver.ask(0, [(STATUS, 1, True)]) == 1
    assert driver.read(0, 512) == bytes(512)


def test_readonly_disk_says_so_and_keeps_its_data(image: Path) -> None:
    before = image.read_bytes()
    driver = BlkDriver(block.open_disk(block.DiskSpec(image, readonly=True)))
    assert driver.device.features() & (RO | DISCARD | WRITE_ZEROES) == RO
    driver.start(1, RO | FLUSH)
    zeroes = struct.pack("<QII", 0, 8, 0)
    assert driver.request(OUT, 0, b"\1" * 512)[0] == IOERR
    assert driver.request(ZERO_IT, out=zeroes)[0] == IOERR
    assert driver.request(FLUSH_IT)[0] == OK
    assert driver.read(0, 512) == bytes(512)
    assert image.read_bytes() == before


def test_resized_disk_interrupts_with_its_new_size(driver: BlkDriver, image: Path) -> None:
    generation = driver.mmio.read(0xFC, 4)
    driver.kind.resize(2 * SIZE)
    wait_until(lambda: driver.wire.level, "an interrupt")
    assert driver.mmio.read(0x60, 4) & 2
    assert driver.device.config(0, 4) == 2 * SIZE // 512
    assert driver.mmio.read(0xFC, 4) != generation
    assert driver.request(OUT, 2 * SIZE // 512 - 1, b"\1" * 512)[0] == OK
    assert block.info(image)["size"] == 2 * SIZE


def test_driver_that_does_not_flush_finds_its_writes_durable(tmp_path: Path) -> None:
    """Seen in the file of a qcow2 image, whose metadata are written by a flush alone."""
    path = tmp_path / "disk.qcow2"
    block.create(path, SIZE)
    for features, durable in ((0, True), (FLUSH, False)):
        driver = BlkDriver(block.open_disk(block.DiskSpec(path)))
        driver.start(1, features)
        sector = 1024 if features else 2048
        assert driver.request(OUT, sector, b"\5" * 512)[0] == OK
        copy = tmp_path / "copy.qcow2"
        copy.write_bytes(path.read_bytes())
        block.convert(copy, tmp_path / "copy.img")
        with (tmp_path / "copy.img").open("rb") as disk:
            disk.seek(sector * 512)
            assert (disk.read(512) == b"\5" * 512) == durable
        for made in (copy, tmp_path / "copy.img"):
            made.unlink()
        driver.kind.close()


def test_reset_ends_what_is_in_flight(driver: BlkDriver) -> None:
    driver.vm.write_memory(HEADER, struct.pack("<IIQ", IN, 0, 0))
    for round_ in range(20):
        for index in range(16):
            at = DATA + 0x4000 * index
            driver.offer(0, [(HEADER, 16, False), (at, 0x4000, True), (STATUS, 1, True)])
        driver.device.set_status(0)
        # Nothing is written into this memory any more.
        mark = bytes([round_ + 1]) * (16 * 0x4000)
        driver.vm.write_memory(DATA, mark)
        driver.start(1, FLUSH)
        assert driver.vm.read_memory(DATA, len(mark)) == mark
    assert driver.read(0, 512) == bytes(512)


def test_disk_is_let_go_of_at_the_end(driver: BlkDriver, image: Path) -> None:
    with pytest.raises(ImageError, match="the image is in use"):
        block.open_disk(block.DiskSpec(image))
    driver.read(0, 512)
    driver.kind.close()
    block.open_disk(block.DiskSpec(image))
    # A guest cannot start it again; nothing comes of what it asks.
    driver.device.set_status(0)
    driver.start(1)
    assert driver.device.status() & DRIVER_OK
    assert driver.device.status() & NEEDS_RESET


# A host whose disk is full: a small file system in a mount namespace of its own.
FULL = """
import sys
from pathlib import Path
from tests.virtio.test_blk import BlkDriver, FLUSH, OUT, fill_the_host
from tetrarch import block
fill_the_host(Path(sys.argv[1]), sys.argv[2])
"""


def fill_the_host(folder: Path, werror: str) -> None:
    """Runs where ``folder`` has room for 1 MiB."""
    image = folder / "disk.img"
    block.create(image, SIZE)
    stops: list[tuple[str, Callable[[], bool]]] = []
    spec = block.DiskSpec.parse(f"{image},werror={werror}")
    driver = BlkDriver(block.open_disk(spec, lambda *stop: stops.append(stop)))
    driver.start(1, FLUSH)
    wrote = 0
    while wrote < SIZE and werror == "report":
        status, _ = driver.request(OUT, wrote // 512, b"\1" * 65536)
        if status == IOERR:
            break
        wrote += 65536
    if werror == "report":
        assert 0 < wrote < SIZE, wrote
        assert driver.read(0, 65536) == b"\1" * 65536
        # Room again, and it goes on.
        assert driver.request(ZERO_IT, out=struct.pack("<QII", 0, 128, 1))[0] == OK
        assert driver.request(OUT, 0, b"\2" * 4096)[0] == OK
    else:
        blocker = folder / "blocker"
        with blocker.open("wb") as file:
            room = os.statvfs(folder)
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize)
        driver.vm.write_memory(HEADER, struct.pack("<IIQ", OUT, 0, 0))
        driver.vm.write_memory(DATA, b"\3" * 4096)
        driver.offer(0, [(HEADER, 16, False), (DATA, 4096, False), (STATUS, 1, True)])
        wait_until(lambda: stops, "the machine is told to stop")
        ((cause, waits),) = stops
        assert cause == "the host's file system is full"
        assert waits()
        assert driver.used_index(0) == 0
        assert driver.kind.data_path.stopped == 1
        with pytest.raises(StateError, match="writes wait for room on the host"):
            driver.kind.save()
        blocker.unlink()
        driver.kind.retry()
        assert not waits()
        driver.wait(0)
        assert driver.vm.read_memory(STATUS, 1)[0] == OK
        assert driver.read(0, 4096) == b"\3" * 4096
        assert driver.kind.save() == {}
    print("good")


@pytest.mark.parametrize("werror", ["report", "stop"])
def test_full_host_is_an_io_error_or_stops_the_machine(tmp_path: Path, werror: str) -> None:
    command = 'mount -t tmpfs -o size=1M tmpfs "$1" && exec "$0" -c "$3" "$1" "$2"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this host gives no user namespaces, which a small file system needs")
    done = subprocess.run(
        [*unshare, "sh", "-c", command, sys.executable, tmp_path, werror, FULL],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


def test_limits_slow_the_driver_down(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    block.create(path, SIZE)
    driver = BlkDriver(block.open_disk(block.DiskSpec(path, iops=50)))
    driver.start(1, FLUSH)
    start = time.monotonic()
    for sector in range(25):
        driver.read(sector, 512)
    # A burst of 5 goes at once; slower a busy host may be.
    assert time.monotonic() - start > 0.35
