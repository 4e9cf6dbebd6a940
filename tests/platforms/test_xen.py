"""Hypercalls of a PVH guest, each by a guest that executes it."""

from __future__ import annotations

import struct
import time

import pytest
from tests.conformance.guest import DATA, HANDLER
from tests.platforms.xen_guest import (
    EEXIST,
    EFAULT,
    EINVAL,
    ENOENT,
    ENOSYS,
    EPERM,
    ESRCH,
    EVENTS,
    HVM,
    INFO,
    MASK,
    MEMORY,
    NOWHERE,
    PENDING,
    SCHED,
    SELECTOR,
    SELF,
    SET_TIMER,
    SHARED,
    STOP,
    VCPU,
    VERSION,
    VM_ASSIST,
    VMCALL,
    VMMCALL,
    XenGuest,
)

from tetrarch import Machine
from tetrarch.errors import ConfigError, StateError

LIMIT_S = 30
LAPIC = 0xFEE0_0000
VECTOR = 0x31


@pytest.fixture(params=[True, False], ids=["translator", "interpreter"])
def guest(request: pytest.FixtureRequest) -> XenGuest:
    return XenGuest(translate=request.param)


def test_guest_finds_xen_by_its_leaves(guest: XenGuest) -> None:
    def cpuid(leaf: int) -> tuple[int, ...]:
        guest.long_mode(bytes.fromhex("0fa2") + STOP, rax=leaf)
        guest.run()
        # STOP has taken DX.
        return tuple(guest.register(name) & 0xFFFF_FFFF for name in ("rax", "rbx", "rcx"))

    top, *signature = cpuid(0x4000_0000)
    assert top == 0x4000_0004
    assert struct.pack("<2I", *signature) == b"XenVMMXe"
    assert cpuid(0x4000_0001)[0] == 4 << 16 | 17
    assert cpuid(0x4000_0002)[:2] == (1, 0x4000_0000)
    features, vcpu, domid = cpuid(0x4000_0004)
    assert (features & 0x40, vcpu, domid) == (0x40, 0, 1)


@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL], ids=["vmcall", "vmmcall"])
def test_version_is_told(guest: XenGuest, instruction: bytes) -> None:
    assert guest.call(VERSION, 0, instruction=instruction) == 4 << 16 | 17
    assert guest.call(VERSION, 1, bytes(16)) == 0
    assert guest.vm.read_memory(DATA, 4) == b".0\0\0"
    assert guest.call(VERSION, 6, struct.pack("<II", 0, 0)) == 0
    assert guest.answer("<I", 4) == (1 << 2 | 1 << 8 | 1 << 9,)
    assert guest.call(VERSION, 6, struct.pack("<II", 1, 0)) == EINVAL
    assert guest.call(VERSION, 8, bytes(16)) == 0
    assert any(guest.vm.read_memory(DATA, 16))
    assert guest.call(VERSION, 7) == 4096, "a page"
    assert guest.call(VERSION, 99) == ENOSYS
    assert guest.call(VERSION, 1, NOWHERE) == EFAULT
    assert guest.call(VERSION, 6, NOWHERE) == EFAULT


def test_hypercall_page_has_the_calls(guest: XenGuest) -> None:
    page = 0x4_0000
    # wrmsr ; mov eax, 0 ; mov rdi, 0 ; call page + 32 * VERSION
    code = bytes.fromhex("0f30 31ff") + b"\xb8" + struct.pack("<I", page + 32 * VERSION)
    guest.long_mode(code + bytes.fromhex("ffd0") + STOP, rcx=0x4000_0000, rax=page, rdx=0)
    assert guest.run() == "stopped"
    assert guest.register("rax") == 4 << 16 | 17
    assert guest.vm.read_memory(page + 32 * 23, 2) == b"\x0f\x0b", "what HVM guests do not call"


@pytest.mark.parametrize("value", [0x4_0001, 1 << 40, (1 << 64) - 4096])
def test_hypercall_page_is_in_ram(guest: XenGuest, value: int) -> None:
    guest.vector(13, HANDLER, width=64)
    guest.vm.write_memory(HANDLER, bytes.fromhex("bb0d000000") + STOP)  # mov ebx, 13
    low, high = value & 0xFFFF_FFFF, value >> 32
    guest.long_mode(bytes.fromhex("0f30") + STOP, rcx=0x4000_0000, rax=low, rdx=high)
    assert guest.run() == "stopped"
    assert guest.register("rbx") == 13


def test_programs_and_32_bit_code_are_refused(guest: XenGuest) -> None:
    user = {f"{name}_selector": 0x13 for name in ("ss", "ds", "es", "fs", "gs")}
    user |= {f"{name}_attr": 0xC0F3 for name in ("ss", "ds", "es", "fs", "gs")}
    guest.protected_mode(VMCALL + b"\xcc", rax=EVENTS, cs_attr=0xC0FB, cs_selector=0xB, **user)
    guest.vcpu.run()  # INT3, which nobody takes: all that is asked is the result before it
    assert guest.register("rax") & 0xFFFF_FFFF == EPERM & 0xFFFF_FFFF
    guest.protected_mode(VMCALL + STOP, rax=EVENTS)
    assert guest.run() == "stopped"
    assert guest.register("rax") & 0xFFFF_FFFF == ENOSYS & 0xFFFF_FFFF


def test_unknown_calls_say_so(guest: XenGuest) -> None:
    for number in (0, 1, 2, 26, 33, 127, 1 << 31):
        assert guest.call(number) == ENOSYS
    for number in (MEMORY, EVENTS, HVM, VCPU, SCHED):
        assert guest.call(number, 77) == ENOSYS
    assert guest.call(EVENTS, 11, bytes(32)) == ENOSYS, "no FIFO queues"


def test_ports_are_bound_and_told(guest: XenGuest) -> None:
    ipi = guest.bind_ipi()
    assert ipi == 1
    assert guest.call(EVENTS, 1, struct.pack("<III", 0, 0, 0)) == 0
    assert guest.answer("<I", 8) == (2,)
    assert guest.call(EVENTS, 1, struct.pack("<III", 0, 0, 0)) == EEXIST
    assert guest.call(EVENTS, 1, struct.pack("<III", 24, 0, 0)) == EINVAL
    assert guest.call(EVENTS, 1, struct.pack("<III", 0, 1, 0)) == ENOENT
    assert guest.call(EVENTS, 7, struct.pack("<II", 1, 0)) == ENOENT
    assert guest.call(EVENTS, 6, struct.pack("<HHI", SELF, SELF, 0)) == 0
    assert guest.answer("<I", 4) == (3,)
    assert guest.call(EVENTS, 6, struct.pack("<HHI", 9, 0, 0)) == ESRCH
    assert guest.call(EVENTS, 0, struct.pack("<HHII", SELF, 0, 3, 0)) == 0
    assert guest.answer("<I", 8) == (4,)
    assert guest.call(EVENTS, 0, struct.pack("<HHII", 0, 0, 3, 0)) == ESRCH
    assert guest.call(EVENTS, 0, struct.pack("<HHII", SELF, 0, 99, 0)) == EINVAL
    assert guest.call(EVENTS, 5, struct.pack("<HHI16x", SELF, 0, 1)) == 0
    assert guest.answer("<II", 8) == (5, 0), "an IPI"
    for port, kind, detail in ((2, 4, 0), (3, 2, 1), (0, 0, 0), (50, 0, 0)):
        assert guest.call(EVENTS, 5, struct.pack("<HHI16x", SELF, 0, port)) == 0
        assert (guest.answer("<I", 8)[0], guest.answer("<H", 16)[0]) == (kind, detail)
    assert guest.call(EVENTS, 5, struct.pack("<HHI16x", SELF, 0, 4096)) == EINVAL
    assert guest.call(EVENTS, 8, struct.pack("<II", 1, 0)) == EINVAL, "an IPI stays"
    assert guest.call(EVENTS, 8, struct.pack("<II", 3, 0)) == 0
    assert guest.call(EVENTS, 3, struct.pack("<I", 1)) == 0
    assert guest.call(EVENTS, 3, struct.pack("<I", 1)) == EINVAL
    assert guest.bind_ipi() == 1, "given again"
    assert guest.call(EVENTS, 10, struct.pack("<H", SELF)) == 0
    assert guest.bind_ipi() == 1
    assert guest.call(EVENTS, 10, struct.pack("<H", 3)) == ESRCH


@pytest.mark.parametrize("command", [0, 1, 3, 4, 5, 6, 7, 8, 9, 10])
def test_arguments_that_are_nowhere_are_a_fault(guest: XenGuest, command: int) -> None:
    assert guest.call(EVENTS, command, NOWHERE) == EFAULT


def test_event_is_in_memory(guest: XenGuest) -> None:
    guest.place()
    port = guest.bind_ipi()
    guest.vm.write_memory(MASK, bytes(8))
    assert guest.send(port) == 0
    assert guest.number(PENDING) == 1 << port
    assert guest.number(INFO + SELECTOR) == 1
    assert guest.vm.read_memory(INFO, 1) == b"\1"
    assert guest.send(0) == EINVAL
    assert guest.send(99) == EINVAL
    assert guest.send(1 << 31) == EINVAL
    assert guest.call(EVENTS, 3, struct.pack("<I", port)) == 0
    assert guest.number(PENDING) == 0, "a port that is closed has no event"


def test_masked_event_waits_for_its_unmasking(guest: XenGuest) -> None:
    guest.place()
    port = guest.bind_ipi()
    guest.vm.write_memory(MASK, struct.pack("<Q", 1 << port))
    assert guest.send(port) == 0
    assert guest.number(PENDING) == 1 << port
    assert guest.number(INFO + SELECTOR) == 0
    assert guest.unmask(port) == 0
    assert guest.number(MASK) == 0
    assert guest.number(INFO + SELECTOR) == 1
    assert guest.unmask(99) == EINVAL


def test_events_before_there_is_a_place_are_not_lost(guest: XenGuest) -> None:
    assert guest.call(MEMORY, 7, struct.pack("<HHIQQ", SELF, 0, 0, 0, SHARED >> 12)) == 0
    port = guest.bind_ipi()
    assert guest.send(port) == 0
    assert guest.vm.read_memory(SHARED, 1) == b"\1", "its vcpu_info of before"
    assert guest.call(VCPU, 10, 0, struct.pack("<QII", INFO >> 12, INFO & 0xFFF, 0)) == 0
    assert guest.vm.read_memory(INFO, 1) == b"\1"
    assert guest.number(INFO + SELECTOR) == 1


def test_upcall_reaches_the_vcpu(guest: XenGuest) -> None:
    guest.place()
    port = guest.bind_ipi()
    assert guest.call(HVM, 23, struct.pack("<IB3x", 0, VECTOR)) == 0
    assert guest.call(HVM, 23, struct.pack("<IB3x", 0, 15)) == EINVAL
    assert guest.call(HVM, 23, struct.pack("<IB3x", 1, VECTOR)) == ENOENT
    guest.vector(VECTOR, HANDLER, width=64)
    guest.vm.write_memory(HANDLER, bytes.fromhex("bb2a000000") + STOP)  # mov ebx, 42
    guest.vm.write_memory(DATA, struct.pack("<I", port))
    # mov r8d, SPURIOUS ; mov dword [r8], 0x1ff ; vmcall ; sti ; hlt
    code = bytes.fromhex("41b8") + struct.pack("<I", LAPIC + 0xF0)
    code += bytes.fromhex("41c700ff010000") + VMCALL + bytes.fromhex("fbf4")
    guest.long_mode(code, rax=EVENTS, rdi=4, rsi=DATA)
    assert guest.run() == "stopped"
    assert guest.register("rbx") == 42


def test_timer_is_due_when_its_time_has_come(guest: XenGuest) -> None:
    guest.place()
    assert guest.call(EVENTS, 1, struct.pack("<III", 0, 0, 0)) == 0
    domain = guest.xen.domain
    assert guest.call(VCPU, 7, 0) == 0
    assert guest.call(VCPU, 8, 0, struct.pack("<QII", domain.now_ns() + 10**13, 0, 0)) == 0
    assert guest.number(PENDING) == 0
    assert guest.call(VCPU, 9, 0) == 0
    assert guest.call(VCPU, 8, 0, struct.pack("<QII", 1, 1, 0)) == -62, "ETIME"
    assert guest.call(VCPU, 8, 1, struct.pack("<QII", 1, 0, 0)) == EINVAL, "another's"
    assert guest.call(VCPU, 9, 1) == EINVAL
    assert guest.call(VCPU, 8, 0, NOWHERE) == EFAULT

    def one_shot() -> int:
        return guest.call(VCPU, 8, 0, struct.pack("<QII", domain.now_ns() + 10**6, 0, 0))

    for start in (one_shot, lambda: guest.call(SET_TIMER, 1)):
        guest.vm.write_memory(PENDING, bytes(8))
        assert start() == 0
        end = time.monotonic() + LIMIT_S
        while guest.number(PENDING) != 1 << 1:
            assert time.monotonic() < end


def test_poll_comes_back(guest: XenGuest) -> None:
    guest.place()
    port = guest.bind_ipi()

    def poll(ports: int, count: int, timeout: int = 0) -> int:
        guest.vm.write_memory(DATA + 64, struct.pack("<I", port))
        return guest.call(SCHED, 3, struct.pack("<QIIQ", ports, count, 0, timeout))

    assert poll(DATA + 64, 1) == 0
    assert guest.send(port) == 0
    assert poll(DATA + 64, 1) == 0
    assert poll(DATA + 64, 1, 1) == 0
    assert poll(NOWHERE, 1) == EFAULT
    assert poll(DATA + 64, 129) == EINVAL
    assert poll(DATA, 1 << 31) == EINVAL
    assert guest.call(SCHED, 0) == 0, "yield"


def test_clock_in_memory_runs(guest: XenGuest) -> None:
    guest.place()
    version, tsc, ns, mul, shift, flags = struct.unpack(
        "<I4xQQIbB2x", guest.vm.read_memory(INFO + 32, 32)
    )
    assert (version % 2, flags & 1) == (0, 1)
    now = guest.vcpu.msr(0x10)
    assert now is not None
    ticks = now - tsc
    told = ns + ((ticks << shift if shift >= 0 else ticks >> -shift) * mul >> 32)
    assert abs(told - guest.xen.domain.now_ns()) < LIMIT_S * 10**9
    seconds, nanoseconds = struct.unpack("<4xII", guest.vm.read_memory(SHARED + 3072, 12))
    (high,) = struct.unpack("<I", guest.vm.read_memory(SHARED + 3084, 4))
    date = (high << 32) + seconds + nanoseconds / 1e9 + guest.xen.domain.now_ns() / 1e9
    assert abs(date - time.time()) < LIMIT_S
    area = 0x3_1000
    assert guest.call(VCPU, 13, 0, struct.pack("<Q", area)) == 0
    assert guest.vm.read_memory(area + 8, 22) == guest.vm.read_memory(INFO + 40, 22)
    assert guest.call(VCPU, 13, 0, struct.pack("<Q", area + 8)) == EINVAL
    assert guest.call(VCPU, 13, 0, struct.pack("<Q", NOWHERE)) == EFAULT
    assert guest.call(VCPU, 13, 1, struct.pack("<Q", area)) == ENOENT


def test_runstate_is_told(guest: XenGuest) -> None:
    assert guest.call(VCPU, 4, 0, bytes(48)) == 0
    state, since, running, runnable, blocked, offline = guest.answer("<i4xQ4Q")
    assert (state, since, runnable, blocked, offline) == (0, 0, 0, 0, 0)
    assert running > 0
    assert guest.call(VCPU, 5, 0, struct.pack("<Q", 0x3_1FF0)) == 0, "across two pages"
    assert guest.number(0x3_1FF0 + 16) >= running
    assert guest.call(VCPU, 5, 0, struct.pack("<Q", NOWHERE)) == EFAULT
    assert guest.call(VCPU, 4, 1 << 32) == EINVAL
    assert guest.call(VM_ASSIST, 0, 5) == 0
    assert guest.call(VM_ASSIST, 0, 1) == EINVAL


@pytest.mark.parametrize("frame", [1 << 20, 1 << 39, 1 << 40, (1 << 64) - 1])
def test_pages_of_the_hypervisor_lie_in_ram(guest: XenGuest, frame: int) -> None:
    assert guest.call(MEMORY, 7, struct.pack("<HHIQQ", SELF, 0, 0, 0, frame)) == EINVAL
    assert guest.call(VCPU, 10, 0, struct.pack("<QII", frame, 0, 0)) == EINVAL


def test_pages_of_the_hypervisor_are_as_they_are_asked(guest: XenGuest) -> None:
    add = struct.Struct("<HHIQQ")
    assert guest.call(MEMORY, 7, add.pack(3, 0, 0, 0, 0x20)) == ESRCH
    assert guest.call(MEMORY, 7, add.pack(SELF, 0, 1, 0, 0x20)) == EINVAL, "no grants yet"
    assert guest.call(MEMORY, 7, NOWHERE) == EFAULT
    info = struct.Struct("<QII")
    assert guest.call(VCPU, 10, 0, info.pack(0x30, 0xFC8, 0)) == EINVAL, "across two pages"
    assert guest.call(VCPU, 10, 0, info.pack(0x30, 4, 0)) == EINVAL
    assert guest.call(VCPU, 10, 0, info.pack(0x30, 0x1000, 0)) == EINVAL
    assert guest.call(VCPU, 10, 7, info.pack(0x30, 0, 0)) == ENOENT
    assert guest.call(VCPU, 10, 0, info.pack(0x30, 0xFC0, 0)) == 0


def test_memory_is_told_given_up_and_taken_back(guest: XenGuest) -> None:
    assert guest.call(MEMORY, 4, struct.pack("<H", SELF)) == 256
    assert guest.call(MEMORY, 9, struct.pack("<I4xQ", 4, DATA + 64)) == 0
    assert guest.answer("<I") == (1,)
    assert guest.answer("<QQI", 64) == (0, 1 << 20, 1)
    assert guest.call(MEMORY, 9, struct.pack("<I4xQ", 0, DATA + 64)) == EINVAL
    assert guest.call(MEMORY, 9, struct.pack("<I4xQ", 4, NOWHERE)) == EFAULT

    def reserve(command: int, *frames: int, order: int = 0, domid: int = SELF) -> int:
        guest.vm.write_memory(DATA + 128, struct.pack(f"<{len(frames)}Q", *frames))
        form = struct.Struct("<QQIIH6x")
        return guest.call(MEMORY, command, form.pack(DATA + 128, len(frames), order, 0, domid))

    guest.vm.write_memory(0x4_0000, b"secret")
    assert reserve(1, 0x40, 0x41) == 2
    assert guest.vm.read_memory(0x4_0000, 6) == bytes(6)
    assert guest.call(MEMORY, 3, struct.pack("<H", SELF)) == 254
    assert reserve(1, 0x40) == 0, "it is gone"
    assert reserve(1, 1 << 20) == 0
    assert reserve(1, 0xFF, order=1) == 0
    assert reserve(1, 0x42, 1 << 52) == 1
    assert reserve(6, 0x40, 0x50) == 1
    assert guest.call(MEMORY, 3, struct.pack("<H", SELF)) == 254
    assert reserve(1, 0x60, order=10) == EINVAL
    assert reserve(1, 0x60, domid=2) == ESRCH
    assert guest.call(MEMORY, 3, struct.pack("<H", 2)) == ESRCH


def test_parameters_are_kept(guest: XenGuest) -> None:
    param = struct.Struct("<HxxIQ")
    assert guest.call(HVM, 0, param.pack(SELF, 0, 2 << 56 | VECTOR)) == 0
    assert guest.call(HVM, 1, param.pack(SELF, 0, 0)) == 0
    assert guest.answer("<Q", 8) == (2 << 56 | VECTOR,)
    assert guest.call(HVM, 1, param.pack(SELF, 17, 9)) == 0
    assert guest.answer("<Q", 8) == (0,), "there is no console"
    assert guest.call(HVM, 0, param.pack(SELF, 17, 9)) == EINVAL
    assert guest.call(HVM, 1, param.pack(SELF, 40, 0)) == EINVAL
    assert guest.call(HVM, 1, param.pack(0, 1, 0)) == ESRCH


@pytest.mark.parametrize("reason", [0, 1, 3])
def test_shutdown_ends_as_it_says(guest: XenGuest, reason: int) -> None:
    assert guest.call(SCHED, 2, struct.pack("<I", reason)) == 0
    assert guest.ends == [reason]
    assert guest.call(SCHED, 2, struct.pack("<I", 99)) == EINVAL
    assert guest.call(SCHED, 2, NOWHERE) == EFAULT


def test_all_of_a_domain_is_saved_and_loaded() -> None:
    old, new = XenGuest(), XenGuest()
    old.place()
    ports = [old.bind_ipi() for _ in range(3)]
    old.call(EVENTS, 3, struct.pack("<I", ports[1]))
    old.call(HVM, 23, struct.pack("<IB3x", 0, VECTOR))
    state = old.xen.save()
    new.vm.write_memory(0, old.vm.read_memory(0, 1 << 20))
    new.xen.load(state)
    assert {**new.xen.save(), "domain": None} == {**state, "domain": None}
    assert new.send(ports[2]) == 0
    assert new.number(PENDING) == 1 << ports[2]
    assert new.send(ports[1]) == EINVAL
    new.xen.reset()
    assert new.send(ports[2]) == EINVAL


@pytest.mark.parametrize(
    "damage",
    [
        {"uuid": "zz"},
        {"uuid": []},
        {"parameters": 3},
        {"parameters": [-1] * 40},
        {"parameters": ["x"] * 40},
        {"given-up": [[1]]},
        {"given-up": ["x", 5]},
        {"given-up": [1 << 40]},
        {"domain": None},
        {"domain": {}},
    ],
)
def test_state_that_is_none_is_refused(damage: dict[str, object]) -> None:
    guest = XenGuest()
    with pytest.raises(StateError, match="saved state of 'xen' is none; save it again"):
        guest.xen.load(guest.xen.save() | damage)
    state = guest.xen.save()
    del state[next(iter(damage))]
    with pytest.raises(StateError, match="saved state of 'xen' is none"):
        guest.xen.load(state)


@pytest.mark.parametrize(
    "damage",
    [
        {"shared_info": 1 << 40},
        {"ports": [[9, 0, 0]]},
        {"ports": [[0, 0, 0], [2, 0, 7]]},
        {"ports": [[0, 0]]},
        {"vcpus": []},
        {"vcpus": [[1 << 50, 0, 0, 0]]},
        {"vcpus": [[0, 0, 999, 0]]},
    ],
)
def test_damaged_state_is_refused(damage: dict[str, object]) -> None:
    guest = XenGuest()
    state = guest.xen.save()
    state["domain"] |= damage
    with pytest.raises(StateError, match="saved state of 'xen' is none"):
        guest.xen.load(state)


def test_engine_kvm_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine kvm cannot have the platform xen; use engine bt"):
        Machine(engine="kvm", platform="xen")
