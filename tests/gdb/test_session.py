"""What gdb's packets do to a machine: threads at a stand-in, and any packets at a guest."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gdb.conftest import Make
from tests.gdb.debuggee import gdb_script

from tetrarch import Machine
from tetrarch.gdb.packets import escape, frame
from tetrarch.gdb.registers import REGISTERS
from tetrarch.gdb.session import Session
from tetrarch.machine.debugger import Debugger
from tetrarch.testing import ScriptedVm
from tetrarch.testing.scripted import ScriptedVcpu


class RecordingVcpu(ScriptedVcpu):
    """How it was last let run: "runs", "steps" or "stays"."""

    def __init__(self, vm: ScriptedVm) -> None:
        super().__init__(vm)
        self._steps = False
        self.how = ""

    def set_debug(
        self,
        *,
        step: bool = False,
        block_interrupts: bool = True,
        software: bool = False,
        hardware: Sequence[tuple[str, int, int]] | None = None,
    ) -> None:
        self._steps = step

    def set_frozen(self, frozen: bool) -> None:
        self.how = "stays" if frozen else "steps" if self._steps else "runs"


class StoppingVm(ScriptedVm):
    """Its vCPUs stop as the test says."""

    def __init__(self) -> None:
        super().__init__(lambda vm: vm.wait_for_stop())
        self.stops: list[tuple[int, str, int]] = []

    def take_debug_stops(self) -> list[tuple[int, str, int]]:
        stops, self.stops = self.stops, []
        return stops


@contextmanager
def three_threads() -> Iterator[tuple[StoppingVm, list[RecordingVcpu], Debugger, Session]]:
    vm = StoppingVm()
    vcpus = [RecordingVcpu(vm) for _ in range(3)]
    debugger = Debugger(vm, vcpus)
    debugger.stop()
    try:
        yield vm, vcpus, debugger, Session(debugger, lambda line, vcpu: f"{line} of {vcpu}")
    finally:
        debugger.close()


@pytest.mark.parametrize(
    ("packet", "how"),
    [
        (b"c", "runs runs runs"),
        (b"s", "steps runs runs"),
        (b"vCont;c", "runs runs runs"),
        (b"vCont;s:2", "stays steps stays"),
        (b"vCont;s:2;c", "runs steps runs"),
        (b"vCont;c:3;s:1", "steps stays runs"),
        (b"vCont;C05:1;S05:2", "runs steps stays"),
        (b"vCont;s:2;c:2;c", "runs steps runs"),
    ],
)
def test_threads_run_as_they_are_told(packet: bytes, how: str) -> None:
    with three_threads() as (_, vcpus, debugger, session):
        assert session.answer(packet) is None
        assert " ".join(vcpu.how for vcpu in vcpus) == how
        assert not debugger.stopped


@pytest.mark.parametrize(
    "packet", [b"vCont;c:9", b"vCont;x", b"vCont;", b"vCont;r1,2:1", b"T9", b"Hgx", b"H", b"P"]
)
def test_bad_requests_are_refused(packet: bytes) -> None:
    with three_threads() as (_, _, debugger, session):
        assert session.answer(packet) == b"E16"
        assert debugger.stopped


def test_threads_are_the_vcpus() -> None:
    with three_threads() as (_, _, _, session):
        assert session.answer(b"qfThreadInfo") == b"m01,02,03"
        assert session.answer(b"qsThreadInfo") == b"l"
        assert session.answer(b"Hg2") == b"OK"
        assert session.answer(b"qC") == b"QC02"
        assert session.answer(b"T3") == b"OK"
        assert session.answer(b"qThreadExtraInfo,3") == b"vCPU 2".hex().encode()
        assert session.answer(b"qRcmd," + b"hello".hex().encode()) == b"hello of 1".hex().encode()


def test_of_vcpus_that_stop_at_once_each_is_told() -> None:
    with three_threads() as (vm, _, debugger, session):
        session.answer(b"qSupported:swbreak+;hwbreak+")
        for packet in (b"Z0,1000,1", b"Z2,2000,4", b"Z1,3000,1"):
            assert session.answer(packet) == b"OK"
        assert session.answer(b"c") is None
        vm.stops = [(1, "software", 0x1000), (2, "hardware", 1), (0, "hardware", 2)]
        debugger.stop()
        assert session.stopped() == b"T05thread:02;swbreak:;"
        assert session.answer(b"?") == b"T05thread:02;swbreak:;"
        # The watchpoint was passed and is not met again; the breakpoint will be.
        assert session.answer(b"c") == b"T05thread:03;watch:2000;"
        assert debugger.stopped
        assert session.answer(b"c") is None


def test_planted_breakpoints_are_not_seen_and_can_be_written_over() -> None:
    with three_threads() as (vm, _, _, session):
        vm.write_memory(0x1000, b"\x55\x48\x89\xe5")
        assert session.answer(b"Z0,1001,1") == b"OK"
        assert vm.read_memory(0x1000, 4) == b"\x55\xcc\x89\xe5"
        assert session.answer(b"m1000,4") == b"554889e5"
        assert session.answer(b"M1000,2:9091") == b"OK"
        assert vm.read_memory(0x1000, 4) == b"\x90\xcc\x89\xe5"
        assert session.answer(b"z0,1001,1") == b"OK"
        assert vm.read_memory(0x1000, 4) == b"\x90\x91\x89\xe5"


def test_physical_memory_is_chosen_as_in_qemu() -> None:
    with three_threads() as (_, _, _, session):
        assert session.answer(b"qqemu.PhyMemMode") == b"0"
        assert session.answer(b"Qqemu.PhyMemMode:1") == b"OK"
        assert session.answer(b"qqemu.PhyMemMode") == b"1"


NUMBERS = st.one_of(
    st.integers(0, 1 << 65), st.sampled_from([0, 1, 4, 8, 0x10_0000, 0x10_0040, (1 << 64) - 1])
).map(lambda number: b"%x" % number)
WORDS = st.one_of(NUMBERS, st.binary(max_size=6).map(escape), st.sampled_from([b"-1", b"p1.1"]))
HEADS = st.sampled_from(
    [
        *(b"? g G p P= m M X Z0 Z1 Z2 Z3 Z4 Z5 z0 z1 z2 c C s S Hg Hc H T D vCont;".split()),
        *(b"vCont;s: vCont;c: vKill; vMustReplyEmpty qSupported: qC qAttached q Q v".split()),
        *(b"qfThreadInfo qThreadExtraInfo, qXfer:features:read:target.xml: qRcmd,".split()),
        *(b"qqemu.sstep Qqemu.sstep= Qqemu.PhyMemMode: QStartNoAckMode ! A b R x".split()),
    ]
)
PACKETS = st.one_of(
    st.builds(
        lambda head, words, separator: head + separator.join(words),
        HEADS,
        st.lists(WORDS, max_size=4),
        st.sampled_from([b",", b":", b";", b"="]),
    ),
    st.binary(max_size=40),
)


@pytest.fixture(scope="module")
def machine(kernel: Path) -> Iterator[Machine]:
    with Machine(kernel=kernel, memory="16M", engine="bt", console="none") as machine:
        machine.start()
        yield machine


@given(st.lists(PACKETS, max_size=30))
def test_no_packet_brings_the_session_down(machine: Machine, packets: list[bytes]) -> None:
    debugger = Debugger(machine.engine_vm, [machine.engine_vm.vcpu(0)])
    debugger.stop()
    try:
        session = Session(debugger, lambda line, vcpu: line)
        for packet in packets:
            answer = session.answer(packet)
            assert (answer is None) == (not debugger.stopped), packet
            if answer is None:
                debugger.stop()
                session.interrupted()
        # All registers are still told, whatever became of the guest.
        told = session.answer(b"g")
        assert told is not None
        assert len(told) == 2 * sum(register.size for register in REGISTERS)
    finally:
        debugger.detach()
        debugger.close()


def test_noise_on_the_socket_harms_nobody(debuggee: Make, kernel: Path) -> None:
    machine = debuggee()
    machine.start()
    server = machine.serve_gdb()
    host, port = server.address.split(":")
    noise = random.Random(8)
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=30) as client:
            for _ in range(10):
                client.sendall(frame(noise.randbytes(noise.randrange(40))))
                client.sendall(noise.randbytes(noise.randrange(200)))
    said = gdb_script("break work\ncontinue\nkill", server.address, kernel)
    assert "Breakpoint 1, work" in said, said
