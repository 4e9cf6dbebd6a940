"""Devices whose queues another process serves, by a driver's mock and a back end's."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.conformance.conftest import require
from tests.conformance.guest import DATA as CODE_PAGE
from tests.conformance.guest import END, PORTS, Guest
from tests.virtio import back_end
from tests.virtio.back_end import BackEnd, Request, message
from tests.virtio.driver import Driver, Mmio, Pci, Transport, wait_until
from tests.virtio.test_served import Wire

from tetrarch import Machine
from tetrarch._native import Vm
from tetrarch.errors import HostError, StateError
from tetrarch.pci.function import BUS_MASTER, COMMAND
from tetrarch.testing import pvh_kernel
from tetrarch.virtio import blk, net
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.registers import NEEDS_RESET, VERSION_1
from tetrarch.virtio.vhost_user import VhostUserBlk, VhostUserNet

RAM: Final = 16 << 20
DATA: Final = 0x80_0000
SECTORS: Final = 2048

#: capacity, seg_max, blk_size, num_queues (virtio 1.2, 5.2.4).
CONFIG: Final = struct.pack("<QIIIIQBBH", SECTORS, 0, 2000, 0, 512, 0, 0, 0, 4).ljust(60, b"\0")


def disk(path: Path, offered: int = 0) -> BackEnd:
    """A back end whose disk has 7 in every byte."""

    def answer(request: Request) -> bytes | None:
        room = sum(length for _, length in request.writable)
        return b"\7" * (room - 1) + b"\0"

    offered |= back_end.VERSION_1 | back_end.PROTOCOL_FEATURES | blk.SEG_MAX | blk.BLK_SIZE
    return BackEnd(path, features=offered, config=CONFIG, answer=answer)


@dataclass
class Rig:
    """A disk between its driver and its back end."""

    vm: Vm
    end: BackEnd
    kind: VhostUserBlk
    driver: Driver
    wire: Wire

    def chain(self, at: int = DATA) -> list[tuple[int, int, bool]]:
        """A request to read a sector."""
        self.vm.write_memory(at, struct.pack("<IIQ", 0, 0, 0))
        return [(at, 16, False), (at + 512, 512, True), (at + 1024, 1, True)]

    def read(self) -> bytes:
        """A sector, and the status behind it."""
        self.vm.write_memory(DATA + 512, bytes(512) + b"\xff")
        self.driver.ask(0, self.chain())
        return self.vm.read_memory(DATA + 512, 513)

    def needs_reset(self) -> bool:
        return bool(self.driver.device.status() & NEEDS_RESET)


GOOD: Final = b"\7" * 512 + b"\0"
IOERR: Final = bytes(512) + b"\1"


@pytest.fixture(params=["bt", "kvm"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    require("translator" if name == "bt" else name)
    return name


@pytest.fixture(params=["pci", "mmio"])
def rig(request: pytest.FixtureRequest, engine: str, tmp_path: Path) -> Iterator[Rig]:
    vm, wire = Vm(engine, RAM), Wire()
    with disk(tmp_path / "blk") as end:
        kind = VhostUserBlk(vm, tmp_path / "blk", "disk0", 1)
        over: Transport
        if request.param == "mmio":
            over = Mmio(VirtioMmio(kind, wire))
        else:
            function = VirtioPci(vm, kind)
            function.function.plug(wire)
            over = Pci(function)
        yield Rig(vm, end, kind, Driver(vm, over), wire)
        kind.close()


def test_requests_are_served_by_another_process(rig: Rig) -> None:
    rig.driver.start(1)
    assert rig.read() == GOOD
    wait_until(lambda: rig.wire.level, "the driver is interrupted")
    # What is of rings and transports is between the driver and us.
    assert rig.end.agreed & ~back_end.PROTOCOL_FEATURES == VERSION_1
    for _ in range(300):
        rig.driver.offer(0, rig.chain())
        rig.driver.wait(0)
    assert not rig.needs_reset()


def test_what_the_disk_is_like_the_back_end_says(rig: Rig) -> None:
    assert rig.kind.features == blk.SEG_MAX | blk.BLK_SIZE
    assert rig.driver.device.config(0, 8) == SECTORS
    assert rig.driver.device.config(12, 4) == 254, "no more than a queue has room for"
    assert rig.driver.device.config(34, 2) == 1


def test_several_queues(tmp_path: Path) -> None:
    with disk(tmp_path / "blk", blk.MQ) as end:
        vm = Vm("bt", RAM)
        kind = VhostUserBlk(vm, tmp_path / "blk", "disk0", 3)
        driver = Driver(vm, Mmio(VirtioMmio(kind, Wire())))
        driver.start(3, blk.MQ)
        for queue in (2, 0, 1):
            assert driver.ask(queue, [(DATA, 16, False), (DATA + 64, 9, True)]) == 9
        assert end.agreed & blk.MQ
        kind.close()


def test_reset_waits_for_requests_and_the_driver_begins_anew(rig: Rig) -> None:
    rig.driver.start(1)
    answer, rig.end.answer = rig.end.answer, lambda request: None
    rig.driver.offer(0, rig.chain())
    wait_until(lambda: rig.end.kept, "the back end has the request")
    rig.end.answer = answer
    rig.end.finish(rig.end.kept.pop(), b"\5" * 513, quiet=True)
    rig.driver.device.set_status(0)
    assert back_end.GET_VRING_BASE in rig.end.messages
    assert rig.vm.read_memory(DATA + 512, 3) == b"\5\5\5"
    for _ in range(3):
        rig.driver.start(1)
        assert rig.read() == GOOD
        rig.driver.device.set_status(0)


def test_memory_that_comes_is_shared_too(rig: Rig) -> None:
    rig.driver.start(1)
    assert rig.read() == GOOD
    told = rig.end.messages.count(back_end.SET_MEM_TABLE)
    rig.vm.add_memory(1 << 30, 1 << 20)
    rig.driver.ask(0, [(DATA, 16, False), ((1 << 30) + 5, 512, True), (DATA + 1024, 1, True)])
    assert rig.vm.read_memory((1 << 30) + 5, 512) == GOOD[:-1]
    assert rig.end.messages.count(back_end.SET_MEM_TABLE) == told + 1
    rig.vm.remove_memory(1 << 30)
    assert rig.read() == GOOD
    assert not rig.needs_reset()


def test_too_many_regions_are_the_end_of_the_back_end_alone(rig: Rig) -> None:
    rig.driver.start(1)
    for index in range(8):
        rig.vm.add_memory((2 + index) << 30, 4096)
    assert rig.read() == IOERR
    # The answers go out first.
    wait_until(rig.needs_reset, "the device to ask for a reset")


def test_requests_in_flight_when_the_bus_is_taken_are_over(tmp_path: Path) -> None:
    vm = Vm("bt", RAM)
    with disk(tmp_path / "blk") as end:
        kind = VhostUserBlk(vm, tmp_path / "blk", "disk0", 1)
        function = VirtioPci(vm, kind)
        function.function.plug(Wire())
        rig = Rig(vm, end, kind, Driver(vm, Pci(function)), Wire())
        rig.driver.start(1)
        for _ in range(3):
            for _ in range(8):
                rig.driver.offer(0, rig.chain())
            function.function.write_config(COMMAND, 2, 0)
            vm.write_memory(DATA + 512, bytes(512))
            used = rig.driver.used_index(0)
            rig.driver.offer(0, rig.chain())
            vm.hold()
            vm.resume()
            assert rig.driver.used_index(0) == used
            assert vm.read_memory(DATA + 512, 512) == bytes(512)
            function.function.write_config(COMMAND, 2, BUS_MASTER)
            for _ in range(9):
                rig.driver.wait(0)
            assert vm.read_memory(DATA + 512, 513) == GOOD
        kind.close()


def test_code_that_a_back_end_writes_runs(engine: str, tmp_path: Path) -> None:
    """Where it was translated before, and without an interrupt in between."""
    # mov al, N ; ret
    codes = [b"\xb0" + bytes([number]) + b"\xc3" for number in (1, 2)]
    guest = Guest(engine)
    with disk(tmp_path / "blk") as end:
        kind = VhostUserBlk(guest.vm, tmp_path / "blk", "disk0", 1)
        driver = Driver(guest.vm, Mmio(VirtioMmio(kind, Wire())), memory=0x4_0000)
        end.answer = lambda request: codes[1]
        driver.start(1)
        seen: list[int] = []

        class Port:
            def read(self, offset: int, size: int) -> int:
                return 0

            def write(self, offset: int, size: int, value: int) -> None:
                seen.append(value)
                if len(seen) == 50:
                    # As a driver that polls: it sees the used ring and nothing else.
                    driver.ask(0, [(0x2_0000, 16, False), (CODE_PAGE, 3, True)])

        guest.vm.attach_ports(0x300, 1, Port())
        guest.vm.write_memory(CODE_PAGE, codes[0])
        # mov ecx, 100 ; mov edx, 0x300 ; 1: mov ebx, CODE_PAGE ; call rbx ; out dx, al
        # dec ecx ; jnz 1b ; mov edx, END ; out dx, al
        code = b"\xb9\x64\x00\x00\x00\xba\x00\x03\x00\x00"
        loop = b"\xbb" + CODE_PAGE.to_bytes(4, "little") + b"\xff\xd3\xee\xff\xc9"
        code += loop + b"\x75" + bytes([256 - len(loop) - 2])
        code += b"\xba" + END.to_bytes(4, "little") + b"\xee"
        guest.long_mode(code)
        guest.run()
        kind.close()
    assert PORTS > 0x300
    assert seen == [1] * 50 + [2] * 50


def wrong_chain(rig: Rig) -> None:
    rig.end.give_back(0, 4, 0)
    rig.end.call(0)


def twice(rig: Rig) -> None:
    head = rig.end.kept[0].head
    rig.end.give_back(0, head, 0)
    rig.end.give_back(0, head, 0)
    rig.end.call(0)


def far_ahead(rig: Rig) -> None:
    rig.end.write(rig.end.rings[0].used_at + 2, b"\xff\x7f")
    rig.end.call(0)


def unasked(rig: Rig) -> None:
    assert rig.end.stream is not None
    rig.end.stream.sendall(message(1, bytes(8)))


def descriptors(rig: Rig) -> None:
    assert rig.end.stream is not None
    socket.send_fds(rig.end.stream, [b"x"], [0, 1, 2])


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (BackEnd.hang_up, "hung up"),
        (wrong_chain, "chain 4, which it did not have"),
        (twice, "gave back"),
        (far_ahead, "gave back 32766 chains, of 4 that it had"),
        (unasked, "spoke without being asked"),
        (descriptors, "descriptors that nobody asked for"),
    ],
)
def test_back_end_that_fails_costs_its_device_and_not_the_machine(
    rig: Rig,
    harm: Callable[[Rig | BackEnd], None],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig.driver.start(1)
    assert rig.read() == GOOD
    rig.end.answer = lambda request: None
    for index in range(4):
        at = DATA + 0x1000 * index
        rig.vm.write_memory(at + 512, bytes(512) + b"\xff")
        rig.driver.offer(0, rig.chain(at))
    wait_until(lambda: len(rig.end.kept) == 4, "the back end has the requests")
    with caplog.at_level(logging.WARNING):
        harm(rig.end if harm is BackEnd.hang_up else rig)
        wait_until(rig.needs_reset, "the device says that it needs a reset")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, lines
    assert lines[0].startswith("disk0: the back end ")
    assert why in lines[0]
    assert "the guest gets errors" in lines[0]
    # What it had, and what comes now, ends in errors; only what it gave back itself may not.
    for _ in range(4):
        rig.driver.wait(0)
    ends = [rig.vm.read_memory(DATA + 0x1000 * index + 1024, 1) for index in range(4)]
    assert ends.count(b"\1") >= 3
    assert rig.read() == IOERR
    # So it is for a driver that begins anew.
    rig.driver.device.set_status(0)
    assert not rig.needs_reset()
    rig.driver.start(1)
    assert rig.read() == IOERR
    assert rig.needs_reset()
    rig.vm.hold()
    rig.vm.resume()


def test_lengths_that_a_back_end_invents_are_cut(rig: Rig) -> None:
    rig.driver.start(1)
    rig.end.answer = lambda request: None
    rig.driver.offer(0, rig.chain())
    wait_until(lambda: rig.end.kept, "the back end has the request")
    rig.end.give_back(0, rig.end.kept[0].head, 0xFFFF_FFFF)
    rig.end.call(0)
    assert rig.driver.wait(0)[1] == 513


@pytest.mark.parametrize(
    ("request_", "answer", "why"),
    [
        (back_end.SET_MEM_TABLE, message(back_end.SET_MEM_TABLE, b"\1" + bytes(7)), "refused"),
        (back_end.SET_VRING_ADDR, b"", "hung up"),
        (back_end.SET_VRING_NUM, message(1, bytes(8)), "answered SET_VRING_NUM with something"),
    ],
)
def test_back_end_that_refuses_to_start(
    rig: Rig, request_: int, answer: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig.end.say[request_] = answer
    rig.driver.start(1)
    assert rig.read() == IOERR
    wait_until(rig.needs_reset, "the device says that it needs a reset")
    assert why in caplog.text


def test_driver_that_breaks_the_rules_is_told_so_as_of_any_device(rig: Rig) -> None:
    rig.driver.start(1)
    rig.driver.offer(0, [(RAM, 16, False)])
    wait_until(rig.needs_reset, "the device says that it needs a reset")
    rig.driver.device.set_status(0)
    rig.driver.start(1)
    assert rig.read() == GOOD


def test_network_card(tmp_path: Path) -> None:
    features = back_end.VERSION_1 | back_end.PROTOCOL_FEATURES | net.CSUM | net.CTRL_VQ | net.MQ
    with BackEnd(tmp_path / "net", features=features, protocol=back_end.REPLY_ACK) as end:
        sent: list[bytes] = []

        def answer(request: Request) -> bytes | None:
            if request.ring == 0:
                return None
            sent.append(request.readable)
            return b""

        end.answer = answer
        vm = Vm("bt", RAM)
        kind = VhostUserNet(vm, tmp_path / "net", "net0", b"\x02\0\0\0\0\1", 1400)
        assert kind.features == net.CSUM | net.MAC | net.STATUS | net.MTU
        registers = Mmio(VirtioMmio(kind, Wire()))
        driver = Driver(vm, registers)
        driver.start(2, net.STATUS)
        for index in range(3):
            driver.offer(0, [(DATA + 0x1000 * index, 2048, True)])
        vm.write_memory(DATA + 0x8000, b"to the world")
        driver.ask(1, [(DATA + 0x8000, 12, False)])
        assert sent == [b"to the world"]
        # It may be held while the world is silent.
        wait_until(lambda: len(end.kept) == 3, "the back end has the buffers")
        vm.hold()
        vm.resume()
        end.finish(end.kept.pop(0), b"from the world")
        assert driver.wait(0)[1] == 14
        assert vm.read_memory(DATA, 14) == b"from the world"
        assert registers.config(6, 2) == 1
        # Reset and begun anew, buffers of before are the driver's.
        registers.set_status(0)
        driver.start(2, net.STATUS)
        driver.ask(1, [(DATA + 0x8000, 12, False)])
        # The link goes down with the back end, and what is sent is lost.
        end.hang_up()
        wait_until(lambda: registers.config(6, 2) == 0, "the link is down")
        driver.ask(1, [(DATA + 0x8000, 12, False)])
        assert registers.status() & NEEDS_RESET
        kind.close()


def test_nobody_at_the_socket_is_one_line(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xf4"))  # hlt
    with pytest.raises(HostError, match=r"cannot connect to the vhost-user back end at .*none"):
        Machine(engine="bt", kernel=kernel, disk="vhost-user=none")


@pytest.mark.parametrize(
    ("say", "why"),
    [
        ({back_end.GET_FEATURES: b""}, "hung up"),
        ({back_end.GET_FEATURES: message(9, bytes(8))}, "answered GET_FEATURES with something"),
        ({back_end.GET_CONFIG: message(24, bytes(12))}, "answered GET_CONFIG with something"),
        ({back_end.GET_FEATURES: message(1, bytes(8))}, "does not offer virtio 1"),
    ],
)
def test_back_end_that_cannot_be_used_is_one_line(
    tmp_path: Path, say: dict[int, bytes | None], why: str
) -> None:
    with disk(tmp_path / "blk") as end:
        end.say = say
        with pytest.raises(HostError, match=rf"{tmp_path}/blk: the back end.*{why}"):
            VhostUserBlk(Vm("bt", RAM), tmp_path / "blk", "disk0", 1)


def test_machine_with_a_back_end_is_not_saved(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xeb\xfe"))  # 1: jmp 1b
    with (
        disk(tmp_path / "blk"),
        Machine(engine="bt", kernel=kernel, disk=f"vhost-user={tmp_path}/blk") as machine,
    ):
        machine.start()
        with pytest.raises(StateError, match=r"disk0 cannot be saved.*another process"):
            machine.save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
