"""VMware's backdoor, and the messages over it, as a program of the guest meets them."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.platforms.caller import (
    CLOSE,
    DO_RECEIVE,
    HIGH_BANDWIDTH,
    MESSAGE,
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
)

from tetrarch._native import GuestFault
from tetrarch.aio.tools import AsyncTools
from tetrarch.errors import StateError
from tetrarch.platforms.vmware import GuestInfo, ToolsError, Vmware
from tetrarch.platforms.vmware.backdoor import MAGIC, NO_COMMAND, PORT
from tetrarch.platforms.vmware.guestinfo import MAX_BYTES

LIMIT_S = 30
GETGUIOPTIONS = 13
SYNC_OFF, CATCH_UP = b"Set_Option synctime 0", b"Time_Synchronize 0"
SYNC_AT_ONCE = b"Set_Option time.synchronize.tools.enable 1"


@pytest.fixture
def vmware() -> Vmware:
    return Vmware()


@pytest.fixture
def program(vmware: Vmware) -> Program:
    return Program(vmware)


def test_facts_of_the_machine(vmware: Vmware, program: Program) -> None:
    version = program.call(10)
    assert (version["rax"], version["rbx"]) == (6, MAGIC)
    assert program.call(1)["rax"] == 5000  # MHz
    hz = program.call(45)
    assert (hz["rbx"] << 32 | hz["rax"], hz["rcx"]) == (5_000_000_123, 1_000_000_000)
    assert program.call(20)["rax"] == 4096  # MiB
    assert program.call(68)["rax"] >> 3 & 1  # x2APIC without remapping
    uuid = program.call(19)
    words = [uuid[name].to_bytes(4, "little") for name in ("rax", "rbx", "rcx", "rdx")]
    assert UUID(bytes=b"".join(words)) == vmware.identity.uuid == vmware.identity.system().uuid


def test_time_is_the_hosts(program: Program) -> None:
    before = time.time()
    full = program.call(46)
    after = time.time()
    assert full["rax"] == MAGIC
    assert before - 1e-6 <= (full["rsi"] << 32 | full["rdx"]) + full["rbx"] / 1e6 <= after
    short = program.call(23)
    assert before - 1 <= short["rax"] <= time.time()


@pytest.mark.parametrize("command", [0, 2, 91, 99, 101, 0xFFFF])
def test_unknown_command_leaves_all_but_eax(program: Program, command: int) -> None:
    done = program.call(command, rbx=0x1234, rsi=5, rdi=6)
    assert done["rax"] == NO_COMMAND
    assert [done[name] for name in ("rbx", "rcx", "rdx", "rsi", "rdi")] == [
        *(0x1234, command, PORT, 5, 6),
    ]


def test_without_the_magic_number_nobody_is_there(program: Program) -> None:
    assert program.call(10, rax=7)["rax"] == NO_COMMAND
    assert program.call(10, Access(2))["rax"] == 0xFFFF
    assert program.call(10, Access(1))["rax"] == 0xFF
    # What is written is lost, and strings have a port of their own.
    assert program.call(10, Access(input_=False))["rbx"] == 0
    assert program.call(10, Access(string=True))["rbx"] == 0


def test_variables_are_shared(vmware: Vmware, program: Program) -> None:
    channel = Channel(program, RPCI)
    assert channel.ask(b"info-get guestinfo.x") == b"0 No value found"
    vmware.guestinfo["x"] = "from the host, ü"
    assert channel.ask(b"info-get guestinfo.x\0") == "1 from the host, ü".encode()
    assert channel.ask(b"info-set guestinfo.y  two  words ") == b"1 "
    assert dict(vmware.guestinfo) == {"x": "from the host, ü", "y": " two  words "}
    # An empty value is none; bytes that are no UTF-8 come back as they were.
    assert channel.ask(b"info-set guestinfo.x ") == b"1 "
    assert channel.ask(b"info-set guestinfo.z \xff\xfe") == b"1 "
    assert channel.ask(b"info-get guestinfo.z") == b"1 \xff\xfe"
    assert list(vmware.guestinfo) == ["y", "z"]


def test_guest_library_hears_of_its_session(vmware: Vmware, program: Program) -> None:
    channel = Channel(program, RPCI)
    vmware.balloon.connect(64 << 20, lambda actual: None)
    vmware.balloon.target = 24 << 20
    answer = channel.ask(b"guestlib.info.get 3")
    assert answer is not None
    version, session, length = struct.unpack_from("<IQI", answer, 2)
    data = answer[18:]
    assert (version, session, len(data)) == (3, vmware.guestlib.session, length)
    assert session not in (0, Vmware().guestlib.session)
    (count,) = struct.unpack_from(">I", data)
    known, at = {}, 4
    for number in range(1, count + 1):
        # guestlibV3.x: text and most numbers have a word here, the others two.
        form = ">IIQ" if number in (4, 17, 19, 20) else ">III"
        kind, valid, value = struct.unpack_from(form, data, at)
        assert kind == number
        at += struct.calcsize(form)
        if valid:
            known[number] = value
    assert at == len(data)
    assert known[17] < 60_000  # ms since it began
    assert known | {17: 0} == {12: 0, 17: 0, 20: 40}
    for other in (b"guestlib.info.get 2", b"guestlib.info.get 4", b"guestlib.info.get"):
        assert channel.ask(other) == b"0 3"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"", b"0 Unknown command"),
        (b"no-such-thing now", b"0 Unknown command"),
        (b"info-set memory 1", b"0 Permission denied"),
        (b"info-get memory", b"0 No value found"),
        (b"info-set guestinfo. x", b"0 "),
        (b"info-set guestinfo.a\x01b x", b"0 "),
        (b"vmx.capability.of-tomorrow x", b"1 "),
        (b"tools.capability.of-tomorrow 1", b"1 "),
    ],
)
def test_requests_that_are_answered_in_a_word(
    program: Program, request_: bytes, answer: bytes
) -> None:
    said = Channel(program, RPCI).ask(request_)
    assert said is not None
    assert said.startswith(answer)


def test_variables_do_not_fill_the_host(vmware: Vmware, program: Program) -> None:
    channel = Channel(program, RPCI)
    text = b"v" * 60_000
    answers = [channel.ask(b"info-set guestinfo.v%d " % n + text) for n in range(20)]
    assert answers.count(b"1 ") == MAX_BYTES // 60_003
    assert answers[-1] == b"0 more than 1024 KiB of variables"
    with pytest.raises(ValueError, match="more than 1024 KiB"):
        vmware.guestinfo["more"] = "v" * MAX_BYTES
    # One that is replaced makes room first.
    assert channel.ask(b"info-set guestinfo.v0 " + text) == b"1 "


def test_channels_are_for_those_who_opened_them(program: Program) -> None:
    channel, other = Channel(program, RPCI), Channel(program, RPCI)
    assert channel.cookies != other.cookies
    assert channel.status(SEND_SIZE, 4, rsi=channel.cookies[0] ^ 1) == 0
    assert channel.status(SEND_SIZE, 4, number=other.number) == 0
    assert channel.status(SEND_SIZE, 4, number=7) == 0
    assert channel.status(SEND_SIZE, 4) & SUCCESS
    # A guest that asks for no cookies has none.
    plain = program.call(MESSAGE, rcx=OPEN << 16, rbx=RPCI)
    assert (plain["rcx"] >> 16, plain["rsi"], plain["rdi"]) == (SUCCESS, 0, 0)


@pytest.mark.parametrize("call", [False, True], ids=["port", "hypercall"])
def test_strings_go_at_once(vmware: Vmware, program: Program, call: bool) -> None:
    channel, memory, at = Channel(program, RPCI), program.memory, 0x10_0FF0
    text = b"info-set guestinfo.x " + bytes(range(1, 256)) * 40
    for index, byte in enumerate(text):
        memory.bytes[memory.place(at + index)] = byte
    assert channel.status(SEND_SIZE, len(text)) == SUCCESS | HIGH_BANDWIDTH
    # In two strings, as it may.
    for start, end in ((0, 5000), (5000, len(text))):
        done = channel.string(True, at + start, end - start, call=call)
        assert (done["rbx"] >> 16, done["rcx"], done["rsi"]) == (SUCCESS, 0, at + end)
        assert done["rax"] == MAGIC
    assert channel.receive() == b"1 "
    channel.send(b"info-get guestinfo.x")
    announced = channel.use(RECEIVE_SIZE)
    assert announced["rcx"] >> 16 == SUCCESS | DO_RECEIVE | HIGH_BANDWIDTH
    length, memory.bytes = announced["rbx"], {}
    done = channel.string(False, at, length, call=call)
    assert (done["rbx"] >> 16, done["rcx"], done["rdi"]) == (SUCCESS, 0, at + length)
    got = bytes(memory.bytes[memory.place(at + index)] for index in range(length))
    assert got == b"1 " + text.removeprefix(b"info-set guestinfo.x ")
    assert len(memory.bytes) == length
    assert channel.status(RECEIVED, SUCCESS) == SUCCESS


def test_strings_of_others_and_to_nowhere_move_nothing(program: Program) -> None:
    channel, other, memory = Channel(program, RPCI), Channel(program, RPCI), program.memory
    at, end = memory.MAPPED.start, memory.MAPPED.stop
    channel.send(b"info-get guestinfo.x")
    channel.use(RECEIVE_SIZE)
    for wrong in (
        {"rsi": channel.cookies[0] ^ 1},
        {"rdx": other.number << 16},
        {"rdx": 7 << 16},
        {"rcx": 17},
        {"rcx": 0xFFFF_FFFF},
    ):
        done = channel.string(False, at, 16, **wrong)
        assert done["rbx"] >> 16 == 0
    with pytest.raises(GuestFault):
        channel.string(False, end - 4, 16)
    assert memory.bytes == {}
    assert channel.status(SEND_SIZE, 16) & SUCCESS
    with pytest.raises(GuestFault):
        channel.string(True, end - 4, 16)
    assert channel.string(True, at, 17)["rbx"] >> 16 == 0
    # Nothing was lost, and another command is none.
    assert channel.string(True, at, 16)["rbx"] >> 16 == SUCCESS
    assert channel.string(True, at, 16, rbx=1)["rbx"] == 1
    assert channel.string(True, at, 16, rax=7)["rcx"] == 16
    assert channel.string(True, at, 16, rax=7, call=True)["rax"] == NO_COMMAND
    assert channel.string(True, at, 16, rbx=1, call=True)["rax"] == NO_COMMAND


def test_strings_are_not_offered_where_there_are_none(vmware: Vmware) -> None:
    program = Program(vmware)
    vmware.channels.high_bandwidth = False
    channel = Channel(program, RPCI)
    assert channel.status(SEND_SIZE, 16) == SUCCESS
    assert channel.string(True, program.memory.MAPPED.start, 16)["rbx"] >> 16 == 0


def test_steps_out_of_order_are_refused(program: Program) -> None:
    channel = Channel(program, RPCI)
    assert channel.status(SEND, 1) == 0
    assert channel.status(RECEIVE) == 0
    assert channel.status(RECEIVED, SUCCESS) == 0
    assert channel.status(99) == 0
    assert channel.status(SEND_SIZE, (64 << 10) + 1) == 0
    channel.send(b"info-get guestinfo.x")
    assert channel.status(RECEIVED, SUCCESS) == 0
    assert channel.use(RECEIVE_SIZE)["rbx"] == len(b"0 No value found")
    assert channel.status(RECEIVED, SUCCESS) == 0
    # It can be fetched again from the start.
    assert channel.receive() == b"0 No value found"
    assert channel.receive() is None
    assert channel.status(CLOSE) == SUCCESS
    assert channel.status(SEND_SIZE, 4) == 0
    assert not Channel(program, 0x12345678).opened


def test_channels_are_few_and_one_that_is_left_is_taken(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = [Channel(program, RPCI) for _ in range(8)]
    assert all(channel.opened for channel in channels)
    assert not Channel(program, RPCI).opened
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    channels[0].send(b"log x")
    assert Channel(program, RPCI).opened
    assert channels[1].status(SEND_SIZE, 4) == 0
    assert channels[0].receive() == b"1 "


class Daemon:
    """As open-vm-tools' service: it comes, answers, and comes again."""

    def __init__(self, program: Program, answers: dict[bytes, bytes]) -> None:
        self.channel = Channel(program, TCLO)
        self.answers = {b"reset": b"OK ATR toolbox"} | answers
        self.asked: list[bytes] = []
        self.channel.send(b"")

    def come(self) -> None:
        while (request := self.channel.receive()) is not None:
            self.asked.append(request)
            self.channel.send(self.answers.get(request, b"OK "))


def test_tools_are_asked_and_answer(vmware: Vmware, program: Program) -> None:
    assert not vmware.tools.status.running
    with pytest.raises(ToolsError, match=r"not there; install and start open-vm-tools"):
        vmware.tools.halt()
    daemon = Daemon(program, {b"OS_Reboot": b"ERROR not now"})
    daemon.come()
    assert daemon.asked[0] == b"reset"
    assert {b"Capabilities_Register", b"OS_PowerOn"} <= set(daemon.asked)
    heard = Channel(program, RPCI)
    assert heard.ask(b"tools.set.versiontype 12352 4\0") == b"1 "
    assert heard.ask(b"tools.capability.statechange ") == b"1 "
    assert heard.ask(b"SetGuestInfo  1 web\0") == b"1 "
    status = vmware.tools.status
    assert status.running
    assert status.heartbeat_s is not None
    assert status.heartbeat_s < LIMIT_S
    assert (status.version, status.facts) == ("12352", {"hostname": "web"})
    assert "statechange" in status.capabilities

    def ask(call: Any) -> list[object]:
        outcome: list[object] = []

        def run() -> None:
            try:
                outcome.append(call(LIMIT_S))
            except ToolsError as error:
                outcome.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            daemon.come()
            thread.join(0.01)
        return outcome

    assert ask(vmware.tools.halt) == [None]
    assert daemon.asked[-1] == b"OS_Halt"
    assert ask(vmware.tools.reboot) == [
        "the guest's tools refuse 'OS_Reboot': not now; see the log of open-vm-tools in the guest"
    ]
    with pytest.raises(ToolsError, match=r"did not answer 'OS_Halt' in 0\.01 s"):
        vmware.tools.halt(0.01)
    daemon.channel.status(CLOSE)
    assert not vmware.tools.status.running


def test_guest_has_its_tools_keep_the_time(vmware: Vmware, program: Program) -> None:
    daemon = Daemon(program, {})
    daemon.come()
    # As it starts, or goes on in a restored machine: once, and never back.
    order = [daemon.asked.index(text) for text in (SYNC_OFF, SYNC_AT_ONCE, CATCH_UP)]
    assert order == sorted(order)
    guest = Channel(program, RPCI)
    assert program.call(GETGUIOPTIONS)["rax"] == 0
    assert guest.ask(b"vmx.set_option synctime 0 1\0") == b"1 "
    daemon.come()
    assert daemon.asked[-1] == b"Set_Option synctime 1"
    assert program.call(GETGUIOPTIONS)["rax"] == 0x400
    assert vmware.tools.status.keeps_time
    for wrong in (b"synctime 0 2", b"copypaste 0 1", b"synctime", b""):
        assert guest.ask(b"vmx.set_option " + wrong) == b"0 Unknown option"
    # The next time that they come they hear of it, also in another process.
    other = Vmware()
    other.tools.load(vmware.tools.save())
    other.tools.reset()
    daemon = Daemon(Program(other), {})
    daemon.come()
    assert b"Set_Option synctime 1" in daemon.asked
    assert guest.ask(b"vmx.set_option synctime 1 0") == b"1 "
    assert program.call(GETGUIOPTIONS)["rax"] == 0
    with pytest.raises(StateError):
        other.tools.load({**vmware.tools.save(), "keeps_time": 1})


def test_machine_that_was_paused_catches_up(vmware: Vmware, program: Program) -> None:
    vmware.tools.catch_up()  # nobody is there
    daemon = Daemon(program, {})
    daemon.come()
    vmware.tools.catch_up()
    daemon.come()
    assert daemon.asked[-1] == CATCH_UP


def test_requests_do_not_pile_up(vmware: Vmware, program: Program) -> None:
    daemon = Daemon(program, {})
    daemon.come()
    guest = Channel(program, RPCI)
    for number in range(200):
        assert guest.ask(b"vmx.set_option synctime 0 %d" % (number & 1)) == b"1 "
    with pytest.raises(ToolsError, match="do not take what they are asked"):
        vmware.tools.halt()
    before = len(daemon.asked)
    daemon.come()
    assert len(daemon.asked) - before == 64


def test_tools_that_stay_away_are_not_there(
    vmware: Vmware, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    Daemon(program, {}).come()
    assert vmware.tools.tclo.last_seen is not None
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not vmware.tools.status.running
    with pytest.raises(ToolsError, match="not there"):
        vmware.tools.synchronize_time()


def test_request_whose_tools_end_is_over(vmware: Vmware, program: Program) -> None:
    daemon = Daemon(program, {})
    daemon.come()
    request = vmware.tools.tclo.post("OS_Suspend")
    daemon.channel.status(CLOSE)
    assert request.done.is_set()
    assert request.answer is None


def test_log_of_the_guest_is_bounded(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    channel = Channel(program, RPCI)
    assert channel.ask(b"log one\x1b[31m\xff line " + b"x" * 2000) == b"1 "
    for n in range(200):
        channel.ask(b"log %d" % n)
    lines = [record.getMessage() for record in caplog.records if "guest:" in record.getMessage()]
    assert len(lines) == 100
    assert lines[0].startswith("guest: one?[31m? line x")
    assert len(lines[0]) < 600


def test_what_is_shared_is_saved_and_outlives_resets(vmware: Vmware, program: Program) -> None:
    vmware.guestinfo["x"] = "1"
    channel = Channel(program, RPCI)
    channel.ask(b"SetGuestInfo  1 web")
    platform = vmware.platform(hypercalls=False, any_privilege=False)
    saved = {name: device.save() for name, device in platform.devices.items()}
    other = Vmware()
    assert other.identity.uuid != vmware.identity.uuid
    copy = other.platform(hypercalls=False, any_privilege=False)
    for name, device in copy.devices.items():
        device.load(saved[name])
    assert other.identity.uuid == vmware.identity.uuid
    assert dict(other.guestinfo) == {"x": "1"}
    assert other.tools.status.facts == {"hostname": "web"}
    for device in platform.devices.values():
        device.reset()
    assert dict(vmware.guestinfo) == {"x": "1"}
    assert vmware.tools.status.facts == {}
    assert channel.status(SEND_SIZE, 4) == 0  # a guest that starts anew knows of no channel


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"version": 1, "values": {"a b": "x"}},
        {"version": 1, "values": {"a": 1}},
        {"version": 1, "values": {"a": "x" * (MAX_BYTES + 1)}},
        {"version": 2, "values": {}},
    ],
)
def test_damaged_state_of_variables_is_refused(state: dict[str, Any]) -> None:
    info = GuestInfo()
    info["kept"] = "x"
    with pytest.raises(StateError):
        info.load(state)
    assert dict(info) == {"kept": "x"}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 10, 19, 20, 23, MESSAGE, 45, 46, 55, 68, 91]) | st.integers(0, 120),
            st.integers(0, 8),
            st.sampled_from([RPCI | 1 << 31, TCLO, 0, 4, 64 << 10]) | st.integers(0, (1 << 64) - 1),
            st.integers(0, 9),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_any_calls_are_answered(calls: list[tuple[int, int, int, int, bool]]) -> None:
    vmware = Vmware()
    program = Program(vmware)
    cookies: dict[int, tuple[int, int]] = {}
    for command, kind, argument, number, knows in calls:
        rsi, rdi = cookies.get(number, (0, 0)) if knows else (argument & 0xFFFF, 1)
        rcx, rdx = kind << 16, number << 16 | PORT
        done = program.call(command, rbx=argument, rcx=rcx, rdx=rdx, rsi=rsi, rdi=rdi)
        assert done["rax"] < 1 << 32
        if command == MESSAGE and kind == OPEN and done["rcx"] >> 16 & SUCCESS:
            cookies[done["rdx"] >> 16] = (done["rsi"], done["rdi"])
    assert len(vmware.guestinfo) <= len(calls)


def test_tools_in_coroutines(vmware: Vmware, program: Program) -> None:
    daemon = Daemon(program, {b"Resolution_Set 800 600": b"ERROR no screen"})
    daemon.come()
    tools = AsyncTools(vmware.tools)

    async def ask() -> None:
        asked = asyncio.create_task(tools.set_resolution(800, 600, LIMIT_S))
        while not asked.done():
            daemon.come()
            await asyncio.sleep(0.01)
        with pytest.raises(ToolsError, match="refuse 'Resolution_Set 800 600': no screen"):
            await asked
        halted = asyncio.create_task(tools.halt(LIMIT_S))
        while not halted.done():
            daemon.come()
            await asyncio.sleep(0.01)
        await halted

    asyncio.run(ask())
    assert daemon.asked[-1] == b"OS_Halt"
    assert tools.status.running
